// group_merge: norm, scores, softmax, weighted sum and W_1h h of a tile of 8 groups.
//
// With up to 4 slots per group and 256·resident columns, a warp keeps its part of the rows in
// registers from the first read to the weighted sum. Otherwise (resident = 0) each phase reads x
// again, from L1 or L2.
#pragma once

#include "kernels/norm.cuh"

namespace variator::cuda {

struct MergeShared {
    union {
        float partial[partial_floats];
        float scores[warps][max_ratio][tile_groups];
    };
    Moments moments[warps * tile_rows];
    float mean[max_ratio][tile_groups], rstd[max_ratio][tile_groups];
    float weight[max_ratio][tile_groups];
};

template <class T, int resident>
struct MergeTile {
    static constexpr int kept = resident > 0 ? resident : 1;
    static constexpr int tiles = resident == 3 ? 2 : 4, pass = 8 * tiles;
    static constexpr int score_tiles = resident > 0 ? 1 : 2;

    const MergeParams& p;
    MergeShared& shared;
    const int first;  // the tile's first group
    const Lane at = Lane::here();
    const int group = first + at.row;
    const int k = static_cast<int>(p.groups.k);
    const BlockRange range =
        BlockRange::of_warp(at.warp, 0, static_cast<int>(ceil_div(p.d, block_columns)));

    VARIATOR_DEVICE int column(int block) const { return at.column(block); }
    VARIATOR_DEVICE bool inside(int block) const { return column(block) < p.d; }
    VARIATOR_DEVICE void load(const QuadRows& rows, int block, Vec16 (&x)[quad]) const {
        rows.load(p.x, p.x_stride, column(block), inside(block), x);
    }
    VARIATOR_DEVICE void norm(const QuadRows& rows, int block, Vec16 (&x)[quad]) const {
        norm_quad<T>(p.norm, rows, column(block), inside(block), x);
    }

    VARIATOR_DEVICE void run() {
        float score[score_tiles][4] = {};
        Vec16 kept_rows[kept][quad];
        for (int slot = 0; slot < k; slot += quad) {
            QuadRows rows = QuadRows::find(p.groups, group, slot);
            if constexpr (resident > 0) {
                VARIATOR_UNROLL
                for (int i = 0; i < kept; ++i)
                    if (range.first + i < range.last) load(rows, range.first + i, kept_rows[i]);
            }
            if (p.norm.kind != Norm::none) statistics(rows, kept_rows);
            if constexpr (resident > 0) {
                VARIATOR_UNROLL
                for (int i = 0; i < kept; ++i)
                    if (range.first + i < range.last) norm(rows, range.first + i, kept_rows[i]);
            } else if (at.warp == 0 && at.part == 0) {
                for (int i = 0; i < quad; ++i) {
                    shared.mean[slot + i][at.row] = rows.mean[i];
                    shared.rstd[slot + i][at.row] = rows.rstd[i];
                }
            }
            for_blocks<true>(rows, kept_rows, [&](int block, const Vec16(&h)[quad]) {
                scores(h, slot, column(block), inside(block), score);
            });
            if (p.projected != nullptr)
                for (int n = 0; n < p.r; n += pass) project(rows, kept_rows, slot, n);
        }
        softmax(score);
        weighted_sum(kept_rows);
    }

    // Calls f(block, its rows) for each of this warp's blocks, with normed rows if `with_norm`.
    // Resident rows are passed as they are.
    template <bool with_norm, class F>
    VARIATOR_DEVICE void for_blocks(const QuadRows& rows, Vec16 (&kept_rows)[kept][quad], F f) {
        if constexpr (resident > 0) {
            VARIATOR_UNROLL
            for (int i = 0; i < kept; ++i)
                if (range.first + i < range.last) f(range.first + i, kept_rows[i]);
        } else {
            for (int block = range.first; block < range.last; ++block) {
                Vec16 x[quad];
                load(rows, block, x);
                if constexpr (with_norm) norm(rows, block, x);
                f(block, x);
            }
        }
    }

    VARIATOR_DEVICE void statistics(QuadRows& rows, Vec16 (&kept_rows)[kept][quad]) {
        Moments mine[quad] = {};
        for_blocks<false>(rows, kept_rows, [&](int block, const Vec16(&x)[quad]) {
            join_moments<T>(p.norm, x, inside(block), mine);
        });
        join_statistics(at, p.norm, p.d, mine, shared.moments, rows);
    }

    // W_1h h for the quad's rows, in columns n .. n+pass-1.
    VARIATOR_DEVICE void project(const QuadRows& rows, Vec16 (&kept_rows)[kept][quad], int slot,
                                 int n) {
        float acc[2][tiles][4] = {};
        const bool both_pairs = k - slot > 2;
        for_blocks<true>(rows, kept_rows, [&](int block, const Vec16(&h)[quad]) {
            VARIATOR_UNROLL
            for (int tile = 0; tile < tiles; ++tile) {
                const int64_t out = n + spread<tiles>(tile, at.row);
                const Vec16 w =
                    load16_if(inside(block),
                              element(p.projection, out * p.projection_stride + column(block)));
                multiply<T>(acc[0][tile], h[0], h[1], w);
                if (both_pairs) multiply<T>(acc[1][tile], h[2], h[3], w);
            }
        });
        add_warps(at, acc, shared.partial, [&](int row, int column, const float (&sum)[tiles]) {
            const Groups::Slot at_slot =
                p.groups.slot(first + row % tile_groups, slot + row / tile_groups);
            if (at_slot.token < 0) return;
            float value[tiles];
            VARIATOR_UNROLL
            for (int i = 0; i < tiles; ++i) value[i] = at_slot.real ? sum[i] : 0.0f;
            store_up_to(p.projected + at_slot.token * p.projected_columns, n + column,
                        p.projected_columns, value);
        });
    }

    // s [outputs, groups] += W_c[:, slot j] h_jᵀ: the weight is the left operand.
    VARIATOR_DEVICE void scores(const Vec16 (&h)[quad], int slot, int64_t at_column, bool within,
                                float (&score)[score_tiles][4]) {
        VARIATOR_UNROLL
        for (int i = 0; i < quad; ++i) {
            if (slot + i >= k) break;
            VARIATOR_UNROLL
            for (int m = 0; m < score_tiles; ++m) {
                if (16 * m >= k) break;
                const int low = 16 * m + at.row, high = low + 8;
                const int64_t j = (slot + i) * p.d + at_column, width = k * p.d;
                multiply<T>(
                    score[m],
                    load16_if(within && low < k, element(p.merge_weight, low * width + j)),
                    load16_if(within && high < k, element(p.merge_weight, high * width + j)), h[i]);
            }
        }
    }

    // One warp per group, one lane per slot.
    VARIATOR_DEVICE void softmax(const float (&score)[score_tiles][4]) {
        VARIATOR_UNROLL
        for (int i = 0; i < 4 * score_tiles; ++i)
            shared.scores[at.warp][16 * (i / 4) + i % 4 / 2 * 8 + at.row][2 * at.part + i % 2] =
                score[i / 4][i % 4];
        block_sync();
        const int slot = thread_index() % 32;
        const int mine = first + at.warp;
        const bool exists = slot < k && p.groups.token(mine, slot) >= 0;
        float s = 0;
        VARIATOR_UNROLL
        for (int warp = 0; warp < warps && slot < 16 * score_tiles; ++warp)
            s += shared.scores[warp][slot][at.warp];
        s = exists ? s + load1<T>(p.merge_bias, slot) : -INFINITY;
        float top = s;
        VARIATOR_UNROLL
        for (int lanes = 1; lanes < 32; lanes *= 2) top = fmaxf(top, shuffle_xor(top, lanes));
        const float e = exists ? expf(s - top) : 0.0f;
        float sum = e;
        VARIATOR_UNROLL
        for (int lanes = 1; lanes < 32; lanes *= 2) sum += shuffle_xor(sum, lanes);
        const float a = exists ? e / sum : 0.0f;
        shared.weight[slot][at.warp] = a;
        if (p.weights != nullptr && slot < k && mine < p.groups.count)
            p.weights[static_cast<int64_t>(mine) * k + slot] = a;
        block_sync();
    }

    VARIATOR_DEVICE void weighted_sum(const Vec16 (&kept_rows)[kept][quad]) {
        if constexpr (resident > 0) {
            VARIATOR_UNROLL
            for (int i = 0; i < kept; ++i) {
                float sum[8] = {};
                add_quad(kept_rows[i], 0, sum);
                store_merged(range.first + i, sum);
            }
        } else {
            for (int block = range.first; block < range.last; ++block) {
                float sum[8] = {};
                for (int slot = 0; slot < k; slot += quad) {
                    QuadRows rows = QuadRows::find(p.groups, group, slot);
                    VARIATOR_UNROLL
                    for (int i = 0; i < quad; ++i) {
                        rows.mean[i] = shared.mean[slot + i][at.row];
                        rows.rstd[i] = shared.rstd[slot + i][at.row];
                    }
                    Vec16 h[quad];
                    load(rows, block, h);
                    norm(rows, block, h);
                    add_quad(h, slot, sum);
                }
                store_merged(block, sum);
            }
        }
    }

    VARIATOR_DEVICE void add_quad(const Vec16 (&h)[quad], int slot, float (&sum)[8]) {
        VARIATOR_UNROLL
        for (int i = 0; i < quad; ++i) {
            const float a = shared.weight[slot + i][at.row];
            float v[8];
            widen<T>(h[i], v);  // 0 where there is no token, and so is a
            VARIATOR_UNROLL
            for (int c = 0; c < 8; ++c) sum[c] += a * v[c];
        }
    }

    VARIATOR_DEVICE void store_merged(int block, const float (&sum)[8]) {
        if (block < range.last && group < p.groups.count && inside(block))
            store16(element(p.merged, group * p.d + column(block)), narrow<T>(sum));
    }
};

template <class T, int resident>
VARIATOR_KERNEL(threads, resident == 4 ? 1 : 2)
merge_kernel(const MergeParams p) {
    auto& shared = *reinterpret_cast<MergeShared*>(shared_memory());
    MergeTile<T, resident>{p, shared, static_cast<int>(block_x()) * tile_groups}.run();
}

}  // namespace variator::cuda
