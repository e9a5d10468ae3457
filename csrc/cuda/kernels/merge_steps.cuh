// What group_merge does with a quad of rows at a block of columns or some: load, norm, statistics,
// projection, scores.
//
// h = x · weight · rstd of RMSNorm is linear in rstd. Where x · weight has the range of T, that
// product is the operand, and rstd, which is known last, scales the sums: each element is rounded
// once either way.
#pragma once

#include "kernels/norm.cuh"

namespace variator::cuda {

constexpr int score_tiles = max_ratio / 8;

struct MergeShared {
    TileTokens tokens;
    float partial[partial_floats];
    float scores[warps][tile_groups][max_ratio + 8];  // stored without bank conflicts
    union {
        Moments moments[warps * tile_rows];
        float squares[warps][tile_rows];
    };
    float mean[max_ratio][tile_groups], rstd[max_ratio][tile_groups];
    float weight[max_ratio][tile_groups];
};

template <class T>
struct MergeSteps {
    const MergeParams& p;
    MergeShared& shared;
    const int first;  // the tile's first group
    const Lane at = Lane::here();
    const int k = static_cast<int>(p.groups.k), d = static_cast<int>(p.d);
    // Whether rstd scales sums instead of elements.
    const bool scaled_sums = T::fp32_range && p.norm.kind == Norm::rms &&
                             p.norm.weight.data != nullptr && !p.norm.weight.wide;

    VARIATOR_DEVICE int column(int block) const { return at.column(block); }
    VARIATOR_DEVICE bool inside(int block) const { return column(block) < d; }
    // Where to read a weight: beyond the columns x is 0, and anything finite will do.
    VARIATOR_DEVICE int readable(int block) const { return inside(block) ? column(block) : 0; }
    VARIATOR_DEVICE float scale(int slot, int of_group) const {
        return scaled_sums ? shared.rstd[slot][of_group] : 1.0f;
    }

    // Whether a quad's second pair has slots; its rows are 0 otherwise.
    VARIATOR_DEVICE bool both(int slot) const { return k - slot > 2; }

    // Loads the rows at `blocks` blocks from `first_block` on; zeros where there is nothing.
    template <int blocks>
    VARIATOR_DEVICE void load(const QuadRows& rows, int slot, int first_block,
                              Vec16 (&x)[blocks][quad]) const {
        if (inside(first_block + blocks - 1) && (rows.token[0] | rows.token[1]) >= 0 &&
            (!both(slot) || (rows.token[2] | rows.token[3]) >= 0)) {
            VARIATOR_UNROLL
            for (int i = 0; i < quad; ++i) {
                if (i >= 2 && !both(slot)) {
                    VARIATOR_UNROLL
                    for (int b = 0; b < blocks; ++b) x[b][i] = zero16();
                    continue;
                }
                const void* row = element(p.x, rows.token[i] * p.x_stride + column(first_block));
                VARIATOR_UNROLL
                for (int b = 0; b < blocks; ++b)
                    x[b][i] = load16_once(element(row, b * block_columns));
            }
        } else {
            VARIATOR_UNROLL
            for (int b = 0; b < blocks; ++b)
                rows.load(p.x, p.x_stride, column(first_block + b), inside(first_block + b), x[b]);
        }
    }

    // h from x, without rstd where that scales sums.
    VARIATOR_DEVICE void norm(int slot, int block, const Vec16 (&x)[quad], Pair (&h)[2]) const {
        if (p.norm.kind == Norm::none || scaled_sums) {
            Vec16 weight = ones16<T>();
            if (scaled_sums) weight = load16(element(p.norm.weight.data, readable(block)));
            VARIATOR_UNROLL
            for (int i = 0; i < quad; ++i) VARIATOR_UNROLL
            for (int c = 0; c < 4; ++c)
                h[i / 2].word(i % 2, c) = T::product(x[i].word[c], weight.word[c]);
            return;
        }
        float weight[8], bias[8];
        load8<T>(p.norm.weight, readable(block), 1, weight);
        load8<T>(p.norm.bias, readable(block), 0, bias);
        VARIATOR_UNROLL
        for (int i = 0; i < quad; ++i) {
            const bool exists = inside(block) && shared.tokens.code[slot + i][at.row] >= 0;
            const Vec16 v = normed<T>(x[i], shared.mean[slot + i][at.row],
                                      shared.rstd[slot + i][at.row], weight, bias);
            VARIATOR_UNROLL
            for (int c = 0; c < 4; ++c) h[i / 2].word(i % 2, c) = exists ? v.word[c] : 0;
        }
    }

    // Only the lanes with part = row / 2 get sums.
    template <int blocks>
    VARIATOR_DEVICE void add_squares(const Vec16 (&x)[blocks][quad], int slot,
                                     float (&sums)[quad]) const {
        VARIATOR_UNROLL
        for (int j = 0; j < quad; ++j) {
            if (j >= 2 && !both(slot)) break;
            Squares squares;
            VARIATOR_UNROLL
            for (int b = 0; b < blocks; ++b) squares.template add<T>(x[b][j]);
            sums[j] += squares.sum(at);
        }
    }
    // The rows' rstd, from the squares each warp has of its own columns. Called by all threads.
    VARIATOR_DEVICE void join_squares(const float (&squares)[quad], int slot) const {
        VARIATOR_UNROLL
        for (int j = 0; j < quad; ++j)
            if (at.row / 2 == at.part)
                shared.squares[at.warp][j * tile_groups + at.row] = squares[j];
        block_sync();
        const int row = thread_index();
        if (row < tile_rows) {
            float sum = 0;
            VARIATOR_UNROLL
            for (int warp = 0; warp < warps; ++warp) sum += shared.squares[warp][row];
            const int i = slot + row / tile_groups, in_tile = row % tile_groups;
            // 0 where there is no token: of a row of zeros it may be infinite.
            shared.rstd[i][in_tile] =
                shared.tokens.code[i][in_tile] >= 0 ? norm_rstd(p.norm, sum, p.d) : 0.0f;
            shared.mean[i][in_tile] = 0;
        }
        block_sync();
    }
    VARIATOR_DEVICE void join_means(Moments (&mine)[quad], int slot) const {
        QuadRows rows;
        join_statistics(at, p.norm, p.d, mine, shared.moments, rows);
        if (at.warp == 0 && at.part == 0) VARIATOR_UNROLL
        for (int i = 0; i < quad; ++i) {
            shared.mean[slot + i][at.row] = rows.mean[i];
            shared.rstd[slot + i][at.row] = rows.rstd[i];
        }
        block_sync();
    }

    // acc[i] += h · W_1hᵀ for the quad's rows, in tile first_tile + i of columns n .. n+31.
    VARIATOR_DEVICE void project(const Pair (&h)[2], int slot, int block, int n, int first_tile,
                                 float (&acc)[2][2][4]) const {
        const int stride = static_cast<int>(p.projection_stride);
        const void* row = element(p.projection, (n + spread(0, at.row)) * p.projection_stride);
        VARIATOR_UNROLL
        for (int i = 0; i < 2; ++i) {
            const Vec16 w = load16(element(row, 2 * (first_tile + i) * stride + readable(block)));
            multiply<T>(acc[i][0], h[0], w);
            if (both(slot)) multiply<T>(acc[i][1], h[1], w);
        }
    }
    VARIATOR_DEVICE void store_projected(int slot, int n) const {
        add_warps(shared.partial, [&](int row, int at_column, const float (&sum)[4]) {
            const int i = slot + row / tile_groups, in_tile = row % tile_groups;
            const int code = shared.tokens.code[i][in_tile], token = TileTokens::owned(code);
            if (token < 0) return;
            const float by = scale(i, in_tile);
            float value[4];
            VARIATOR_UNROLL
            for (int c = 0; c < 4; ++c) value[c] = code >= 0 ? by * sum[c] : 0.0f;
            const int columns = static_cast<int>(p.projected_columns);
            store_up_to(p.projected + static_cast<int64_t>(token) * columns, n + at_column, columns,
                        value);
        });
    }

    // sum += h_j W_c[8m .. 8m+7, slot j]ᵀ, in rows 0-7 for an even j, in rows 8-15 for an odd one.
    VARIATOR_DEVICE void scores(const Pair (&h)[2], int slot, int j, int block, int m,
                                float (&sum)[4]) const {
        const int out = 8 * m + at.row < k ? 8 * m + at.row : 0;
        const Vec16 w = load16(element(p.merge_weight, (out * k + slot + j) * d + readable(block)));
        multiply<T>(sum, h[j / 2], w);
    }
    VARIATOR_DEVICE void add_scores(const float (&sums)[quad][4], int slot, int m) const {
        float* to = &shared.scores[at.warp][at.row][8 * m + 2 * at.part];
        float score[2] = {slot > 0 ? to[0] : 0.0f, slot > 0 ? to[1] : 0.0f};
        VARIATOR_UNROLL
        for (int j = 0; j < quad; ++j) {
            const float by = scale(slot + j, at.row);
            score[0] += by * sums[j][j % 2 * 2], score[1] += by * sums[j][j % 2 * 2 + 1];
        }
        store2(to, score);
    }
};

}  // namespace variator::cuda
