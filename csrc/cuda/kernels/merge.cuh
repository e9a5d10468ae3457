// group_merge: norm, scores, softmax, weighted sum and W_1h h of a tile of 8 groups.
//
// A quad of rows is read once for its statistics, scores and projection: into registers, where a
// warp's part has at most `resident` blocks of columns, else (resident = 0) block by block. The
// weighted sum takes the rows of groups with one quad from registers and reads others again, from
// L2.
#pragma once

#include "kernels/merge_steps.cuh"

namespace variator::cuda {

template <class T, int resident>
struct MergeTile {
    static constexpr int kept = resident > 0 ? resident : 1;

    const MergeParams& p;
    MergeShared& shared;
    const int first;  // the tile's first group
    const MergeSteps<T> steps{p, shared, first};
    const Lane at = steps.at;
    const int group = first + at.row;
    const int k = steps.k, d = steps.d;
    const int r = static_cast<int>(p.r);
    // This warp's blocks; those beyond the columns hold zeros.
    const BlockRange range =
        resident > 0 ? BlockRange{at.warp * resident, (at.warp + 1) * resident}
                     : BlockRange::of_warp(at.warp, 0, (d + block_columns - 1) / block_columns);

    VARIATOR_DEVICE void run() {
        shared.tokens.find(p.groups, first, false);
        block_sync();
        Pair rows_kept[kept][2];
        for (int slot = 0; slot < k; slot += quad) {
            const QuadRows rows = QuadRows::of(shared.tokens, at.row, slot);
            if constexpr (resident > 0)
                in_registers(rows, slot, rows_kept);
            else
                by_blocks(rows, slot);
        }
        softmax();
        weighted_sum(rows_kept);
    }

    // Leaves the quad's rows as h in registers.
    VARIATOR_DEVICE void in_registers(const QuadRows& rows, int slot, Pair (&h)[kept][2]) {
        Vec16 x[kept][quad];
        steps.load(rows, slot, range.first, x);
        if (p.norm.kind == Norm::rms) {
            float squares[quad] = {};
            steps.add_squares(x, slot, squares);
            steps.join_squares(squares, slot);
        } else if (p.norm.kind == Norm::layer) {
            Moments mine[quad] = {};
            VARIATOR_UNROLL
            for (int i = 0; i < kept; ++i)
                join_moments<T>(p.norm, x[i], steps.inside(range.first + i), mine);
            steps.join_means(mine, slot);
        }
        VARIATOR_UNROLL
        for (int i = 0; i < kept; ++i) steps.norm(slot, range.first + i, x[i], h[i]);
        for (int n = 0; n < r; n += block_columns) {
            VARIATOR_UNROLL
            for (int tile = 0; tile < 4; tile += 2) {
                float acc[2][2][4] = {};
                VARIATOR_UNROLL
                for (int i = 0; i < kept; ++i)
                    steps.project(h[i], slot, range.first + i, n, tile, acc);
                put_partial(at, tile, acc[0], acc[1], shared.partial);
            }
            steps.store_projected(slot, n);
        }
        for (int m = 0; 8 * m < k; ++m) {
            float sums[quad][4] = {};
            VARIATOR_UNROLL
            for (int j = 0; j < quad; ++j) VARIATOR_UNROLL
            for (int i = 0; i < kept; ++i)
                if (slot + j < k) steps.scores(h[i], slot, j, range.first + i, m, sums[j]);
            steps.add_scores(sums, slot, m);
        }
    }

    VARIATOR_DEVICE void by_blocks(const QuadRows& rows, int slot) {
        if (p.norm.kind != Norm::none && !steps.scaled_sums) read_statistics(rows, slot);
        // 64 columns of the projection at a time; without one, once for the scores.
        for (int n = 0; n == 0 || n < r; n += 2 * block_columns) {
            float squares[quad] = {}, acc[4][2][2][4] = {}, sums[score_tiles][quad][4] = {};
            for (int block = range.first; block < range.last; ++block) {
                Vec16 x[1][quad];
                steps.load(rows, slot, block, x);
                if (n == 0 && steps.scaled_sums) steps.add_squares(x, slot, squares);
                Pair h[2];
                steps.norm(slot, block, x[0], h);
                if (n == 0) VARIATOR_UNROLL
                for (int m = 0; m < score_tiles; ++m) VARIATOR_UNROLL
                for (int j = 0; j < quad; ++j)
                    if (8 * m < k && slot + j < k) steps.scores(h, slot, j, block, m, sums[m][j]);
                if (r == 0) continue;
                VARIATOR_UNROLL
                for (int i = 0; i < 4; ++i)
                    steps.project(h, slot, block, n + i / 2 * block_columns, i % 2 * 2, acc[i]);
            }
            if (n == 0) {
                if (steps.scaled_sums) steps.join_squares(squares, slot);
                VARIATOR_UNROLL
                for (int m = 0; m < score_tiles; ++m)
                    if (8 * m < k) steps.add_scores(sums[m], slot, m);
            }
            if (r == 0) continue;
            VARIATOR_UNROLL
            for (int half = 0; half < 2; ++half) {
                VARIATOR_UNROLL
                for (int i = 0; i < 2; ++i)
                    put_partial(at, 2 * i, acc[2 * half + i][0], acc[2 * half + i][1],
                                shared.partial);
                steps.store_projected(slot, n + half * block_columns);
            }
        }
    }

    VARIATOR_DEVICE void read_statistics(const QuadRows& rows, int slot) {
        float squares[quad] = {};
        Moments mine[quad] = {};
        for (int block = range.first; block < range.last; ++block) {
            Vec16 x[1][quad];
            steps.load(rows, slot, block, x);
            if (p.norm.kind == Norm::layer)
                join_moments<T>(p.norm, x[0], steps.inside(block), mine);
            else
                steps.add_squares(x, slot, squares);
        }
        if (p.norm.kind == Norm::layer)
            steps.join_means(mine, slot);
        else
            steps.join_squares(squares, slot);
    }

    // One warp per group, one lane per slot.
    VARIATOR_DEVICE void softmax() {
        block_sync();
        const int slot = thread_index() % 32;
        const int mine = first + at.warp;
        const bool exists = slot < k && shared.tokens.code[slot][at.warp] >= 0;
        float s = -INFINITY;
        if (exists) {
            s = load1<T>(p.merge_bias, slot);
            VARIATOR_UNROLL_LESS
            for (int warp = 0; warp < warps; ++warp) s += shared.scores[warp][at.warp][slot];
        }
        float top = s;
        VARIATOR_UNROLL
        for (int lanes = 1; lanes < 32; lanes *= 2) top = fmaxf(top, shuffle_xor(top, lanes));
        const float e = exists ? expf(s - top) : 0.0f;
        float sum = e;
        VARIATOR_UNROLL
        for (int lanes = 1; lanes < 32; lanes *= 2) sum += shuffle_xor(sum, lanes);
        const float a = exists ? e / sum : 0.0f;
        shared.weight[slot][at.warp] = exists ? a * steps.scale(slot, at.warp) : 0.0f;
        if (p.weights != nullptr && slot < k && mine < p.groups.count)
            p.weights[static_cast<int64_t>(mine) * k + slot] = a;
        block_sync();
    }

    VARIATOR_DEVICE void weighted_sum(const Pair (&rows_kept)[kept][2]) {
        if (resident > 0 && k <= quad) {
            VARIATOR_UNROLL
            for (int i = 0; i < kept; ++i) {
                float sum[8] = {};
                add_quad(rows_kept[i], 0, sum);
                store_merged(range.first + i, sum);
            }
            return;
        }
        for (int block = range.first; block < range.last; block += kept) {
            float sum[kept][8] = {};
            for (int slot = 0; slot < k; slot += quad) {
                const QuadRows rows = QuadRows::of(shared.tokens, at.row, slot);
                VARIATOR_UNROLL
                for (int i = 0; i < kept; ++i) {
                    Vec16 x[1][quad];
                    steps.load(rows, slot, block + i, x);
                    Pair h[2];
                    steps.norm(slot, block + i, x[0], h);
                    add_quad(h, slot, sum[i]);
                }
            }
            VARIATOR_UNROLL
            for (int i = 0; i < kept; ++i) store_merged(block + i, sum[i]);
        }
    }

    VARIATOR_DEVICE void add_quad(const Pair (&h)[2], int slot, float (&sum)[8]) const {
        VARIATOR_UNROLL
        for (int i = 0; i < quad; ++i) {
            if (i >= 2 && !steps.both(slot)) break;
            const float a = shared.weight[slot + i][at.row];
            float v[8];
            widen<T>(h[i / 2].row(i % 2), v);  // 0 where there is no token, and so is a
            VARIATOR_UNROLL
            for (int c = 0; c < 8; ++c) sum[c] += a * v[c];
        }
    }

    VARIATOR_DEVICE void store_merged(int block, const float (&sum)[8]) const {
        if (group < p.groups.count && steps.inside(block))
            store16(element(p.merged, static_cast<int64_t>(group) * d + steps.column(block)),
                    narrow<T>(sum));
    }
};

template <class T, int resident>
VARIATOR_KERNEL(threads, resident == 4 || resident == 0 ? 1 : 2)
merge_kernel(const MergeParams p) {
    auto& shared = *reinterpret_cast<MergeShared*>(shared_memory());
    MergeTile<T, resident>{p, shared, static_cast<int>(block_x()) * tile_groups}.run();
}

}  // namespace variator::cuda
