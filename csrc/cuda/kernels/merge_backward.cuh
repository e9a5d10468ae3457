// Gradients of group_merge with respect to each token. With h = norm(x), s = W_c·concat(h) + b_c, a
// = softmax(s), g = Σ a_j h_j:
//   da_j = dg·h_j,  ds = a (da - Σ a da),  dh_j = a_j dg + W_c[:, slot j]ᵀ ds + W_1hᵀ dp_j,
// and dx follows through the norm. weight_gradient.cuh has the weight gradients, sums over tokens.
#pragma once

#include "kernels/hidden_gradient.cuh"

namespace variator::cuda {

// After the struct: dp of a quad's rows as T [tile_rows, bottleneck_stride(r)].
VARIATOR_HD int64_t merge_backward_shared_bytes(int64_t r) {
    return static_cast<int64_t>(sizeof(MergeBackwardShared)) + tile_rows * bottleneck_stride(r) * 2;
}

template <class T, bool one_chunk>
struct MergeBackwardTile {
    const MergeBackwardParams& p;
    char* memory;
    const int64_t tile;
    const int64_t first = tile * tile_groups;
    const Lane at = Lane::here();
    const int64_t group = first + at.row;
    const int k = static_cast<int>(p.groups.k);
    const BlockRange range =
        BlockRange::of_warp(at.warp, 0, static_cast<int>(ceil_div(p.d, block_columns)));
    MergeBackwardShared& shared = *reinterpret_cast<MergeBackwardShared*>(memory);
    const HiddenGradient<T, one_chunk> hidden{
        p, shared, reinterpret_cast<typename T::Element*>(memory + sizeof(MergeBackwardShared)),
        first};

    VARIATOR_DEVICE int column(int block) const { return at.column(block); }
    VARIATOR_DEVICE bool inside(int block) const { return column(block) < p.d; }

    VARIATOR_DEVICE void run() {
        shared.tokens.find(p.groups, first, false);
        block_sync();
        for (int slot = 0; slot < k; slot += quad) {
            statistics(slot);
            dots(slot);
        }
        through_softmax();
        for (int slot = 0; slot < k; slot += quad) {
            hidden.load_dp(slot);
            through_norm(slot);
        }
    }

    VARIATOR_DEVICE QuadRows rows_of(int slot) const {
        QuadRows rows = QuadRows::of(shared.tokens, at.row, slot);
        VARIATOR_UNROLL
        for (int i = 0; i < quad; ++i) {
            rows.mean[i] = shared.mean[slot + i][at.row];
            rows.rstd[i] = shared.rstd[slot + i][at.row];
        }
        return rows;
    }

    VARIATOR_DEVICE void statistics(int slot) {
        QuadRows rows = QuadRows::of(shared.tokens, at.row, slot);
        if (p.norm.kind != Norm::none) {
            Moments mine[quad] = {};
            for (int block = range.first; block < range.last; ++block) {
                Vec16 x[quad];
                rows.load(p.x, p.x_stride, column(block), inside(block), x);
                join_moments<T>(p.norm, x, inside(block), mine);
            }
            join_statistics(at, p.norm, p.d, mine, shared.moments, rows);
        }
        if (at.warp == 0 && at.part == 0)
            for (int i = 0; i < quad; ++i) {
                shared.mean[slot + i][at.row] = rows.mean[i];
                shared.rstd[slot + i][at.row] = rows.rstd[i];
                if (slot + i >= k || group >= p.groups.count) continue;
                float* out = p.moments + (group * k + slot + i) * 2;
                out[0] = rows.mean[i], out[1] = rows.rstd[i];
            }
        block_sync();
    }

    // This warp's part of da = dg·h for the quad's slots.
    VARIATOR_DEVICE void dots(int slot) {
        const QuadRows rows = rows_of(slot);
        float dot[quad] = {};
        for (int block = range.first; block < range.last; ++block) {
            Vec16 h[quad];
            rows.load(p.x, p.x_stride, column(block), inside(block), h);
            norm_quad<T>(p.norm, rows, column(block), inside(block), h);
            float dg[8];
            widen<T>(hidden.group_row(block), dg);
            VARIATOR_UNROLL
            for (int i = 0; i < quad; ++i) {
                float v[8];
                widen<T>(h[i], v);
                VARIATOR_UNROLL
                for (int c = 0; c < 8; ++c) dot[i] += dg[c] * v[c];
            }
        }
        VARIATOR_UNROLL
        for (int i = 0; i < quad; ++i) {
            dot[i] = row_sum(dot[i]);
            if (at.part == 0) shared.dots[at.warp][slot + i][at.row] = dot[i];
        }
    }

    // One warp per group, one lane per slot. Absent slots have a = 0, hence ds = 0.
    VARIATOR_DEVICE void through_softmax() {
        block_sync();
        const int slot = thread_index() % 32;
        const int64_t mine = first + at.warp;
        const bool exists = slot < k && shared.tokens.code[slot][at.warp] >= 0;
        float da = 0, a = 0;
        if (exists) {
            for (int warp = 0; warp < warps; ++warp) da += shared.dots[warp][slot][at.warp];
            a = p.weights[mine * k + slot];
        }
        float mean = a * da;
        VARIATOR_UNROLL
        for (int lanes = 1; lanes < 32; lanes *= 2) mean += shuffle_xor(mean, lanes);
        const float ds = exists ? a * (da - mean) : 0.0f;
        shared.weight[slot][at.warp] = a;
        shared.ds[slot][at.warp] = ds;
        if (slot < k && mine < p.groups.count) p.d_scores[mine * k + slot] = ds;
        block_sync();
    }

    // n = (x - mean) rstd of the quad's rows in a block of columns, and the norm's weight there.
    VARIATOR_DEVICE void normalised(const QuadRows& rows, int block, float (&n)[quad][8],
                                    float (&weight)[8]) const {
        Vec16 x[quad];
        rows.load(p.x, p.x_stride, column(block), inside(block), x);
        load8<T>(inside(block) ? p.norm.weight : Vector{}, column(block), 1, weight);
        VARIATOR_UNROLL
        for (int i = 0; i < quad; ++i) {
            widen<T>(x[i], n[i]);
            VARIATOR_UNROLL
            for (int c = 0; c < 8; ++c) n[i][c] = (n[i][c] - rows.mean[i]) * rows.rstd[i];
        }
    }

    // dx from dh: with e = weight·dh, dx = rstd (e - n mean(e n)) for RMSNorm, and
    // rstd (e - mean(e) - n mean(e n)) for LayerNorm. dh is computed twice, which is cheaper than
    // writing it to memory and reading it back.
    VARIATOR_DEVICE void through_norm(int slot) {
        const QuadRows rows = rows_of(slot);
        float mean_e[quad] = {}, mean_en[quad] = {};
        if (p.norm.kind != Norm::none) {
            for (int block = range.first; block < range.last; ++block) {
                float dh[quad][8], n[quad][8], weight[8];
                hidden.gradient(slot, block, dh);
                normalised(rows, block, n, weight);
                VARIATOR_UNROLL
                for (int i = 0; i < quad; ++i) VARIATOR_UNROLL
                for (int c = 0; c < 8; ++c) {
                    const float e = dh[i][c] * weight[c];  // 0 outside the columns
                    mean_e[i] += e;
                    mean_en[i] += e * n[i][c];
                }
            }
            join_means(mean_e, mean_en);
        }
        for (int block = range.first; block < range.last; ++block)
            write(rows, slot, block, mean_e, mean_en);
    }

    VARIATOR_DEVICE void join_means(float (&mean_e)[quad], float (&mean_en)[quad]) {
        VARIATOR_UNROLL
        for (int i = 0; i < quad; ++i) {
            mean_e[i] = row_sum(mean_e[i]);
            mean_en[i] = row_sum(mean_en[i]);
            if (at.part != 0) continue;
            float (&mine)[2] = shared.sums[at.warp][i * tile_groups + at.row];
            mine[0] = mean_e[i], mine[1] = mean_en[i];
        }
        block_sync();
        VARIATOR_UNROLL
        for (int i = 0; i < quad; ++i) {
            float e = 0, en = 0;
            for (int warp = 0; warp < warps; ++warp) {
                e += shared.sums[warp][i * tile_groups + at.row][0];
                en += shared.sums[warp][i * tile_groups + at.row][1];
            }
            mean_e[i] = p.norm.kind == Norm::layer ? e / static_cast<float>(p.d) : 0.0f;
            mean_en[i] = en / static_cast<float>(p.d);
        }
        block_sync();
    }

    VARIATOR_DEVICE void write(const QuadRows& rows, int slot, int block,
                               const float (&mean_e)[quad], const float (&mean_en)[quad]) const {
        float dh[quad][8], n[quad][8], weight[8], d_weight[8] = {}, d_bias[8] = {};
        hidden.gradient(slot, block, dh);
        normalised(rows, block, n, weight);
        VARIATOR_UNROLL
        for (int i = 0; i < quad; ++i) {
            const int64_t token = TileTokens::owned(rows.token[i]);
            if (token < 0) continue;
            float dx[8] = {};
            if (rows.token[i] >= 0) {
                VARIATOR_UNROLL
                for (int c = 0; c < 8; ++c) {
                    d_weight[c] += dh[i][c] * n[i][c];
                    d_bias[c] += dh[i][c];
                    dx[c] = p.norm.kind == Norm::none
                                ? dh[i][c]
                                : rows.rstd[i] *
                                      (dh[i][c] * weight[c] - mean_e[i] - n[i][c] * mean_en[i]);
                }
            }
            if (inside(block)) store16(element(p.dx, token * p.d + column(block)), narrow<T>(dx));
        }
        add_to_norm(p.d_norm_weight, slot, block, d_weight);
        add_to_norm(p.d_norm_bias, slot, block, d_bias);
    }

    // Accumulates the tile's sum, one quad after the other.
    VARIATOR_DEVICE void add_to_norm(float* out, int slot, int block, float (&sum)[8]) const {
        if (out == nullptr) return;
        VARIATOR_UNROLL
        for (int c = 0; c < 8; ++c) VARIATOR_UNROLL
        for (int lanes = 4; lanes < 32; lanes *= 2) sum[c] += shuffle_xor(sum[c], lanes);
        if (at.row != 0 || !inside(block)) return;
        float* to = out + tile * p.d + column(block);
        VARIATOR_UNROLL
        for (int c = 0; c < 8; ++c) to[c] = slot == 0 ? sum[c] : to[c] + sum[c];
    }
};

template <class T, bool one_chunk>
VARIATOR_KERNEL(threads, 1)
merge_backward_kernel(const MergeBackwardParams p) {
    MergeBackwardTile<T, one_chunk>{p, shared_memory(), block_x()}.run();
}

}  // namespace variator::cuda
