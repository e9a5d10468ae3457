// Weight gradients: leftᵀ · right, summed over tokens or groups, on tensor cores. Left factors
// (scores' and adapter's gradients) are fp32 and span many magnitudes, so the products are TF32: it
// keeps their range, has 11 bits of them, and right factors of 16 bits are exact in it.
//
// A thread block takes one slot of a share of the groups. Tiles of 32 rows are copied to shared
// memory ahead of their use; 4 x 2 warps divide rows and columns of `right`, and each has all of
// the piece's left columns. No atomics: warps, then shares, are added up in a fixed order.
#pragma once

#include "heuristics.h"
#include "kernels/norm.cuh"

namespace variator::cuda {

constexpr int gradient_stages = 4, gradient_rows = 32, gradient_steps_found = threads / 32;
constexpr int gradient_tiles = heuristics::gradient_tiles;  // of 8 left columns, at most
constexpr int gradient_columns = heuristics::gradient_columns;

struct GradientStage {
    // Row strides of 288 bytes: what 8 lanes read at once lies in different banks.
    uint16_t right[gradient_rows][gradient_columns + 16];
    float left[gradient_rows][8 * gradient_tiles];
    float moments[gradient_rows][2];
};
static_assert(sizeof(GradientStage::left) == sizeof(GradientStage::right), "the same stride");

struct WeightGradientShared {
    union {
        GradientStage stage[gradient_stages];
        float sums[4][gradient_tiles * 4][32][4];  // of four warps
    };
    int token[2][threads];  // of the rows of 8 steps
};

template <class T, bool normed>
struct WeightGradientTile {
    const WeightGradientParams& p;
    WeightGradientShared& shared;
    const int tiles;  // of 8 left columns, in this piece
    const int first_right, first_left, part;
    const Lane at = Lane::here();
    const int line = thread_index() / 8, eighth = thread_index() % 8;        // what a thread copies
    const int first_row = at.warp / 2 * 8, first_column = at.warp % 2 * 64;  // of this warp
    const int slots = p.by_group ? 1 : static_cast<int>(p.groups.k), slot = part % slots;
    const int each = static_cast<int>(ceil_div(p.groups.count, p.shares));
    const int first = part / slots * each, count = static_cast<int>(p.groups.count);
    const int last = each < count - first ? first + each : count;
    const int steps = last > first ? (last - first + gradient_rows - 1) / gradient_rows : 0;
    const int d = static_cast<int>(p.d), of_left = static_cast<int>(p.left_columns);
    const int of_scores = static_cast<int>(p.score_columns), columns = of_left + of_scores + p.ones;
    const int column = first_right + first_column + 8 * at.row;  // the first of this lane's 8

    // acc[tile][pair] of left columns 8·tile .. + 7 and, in turn, this lane's columns 2·pair +
    // 0, 1.
    VARIATOR_DEVICE void run() {
        float acc[gradient_tiles][4][4] = {};
        float weight[8] = {}, bias[8] = {};
        if (normed && column < d) {
            load8<T>(p.norm.weight, column, 1, weight);
            load8<T>(p.norm.bias, column, 0, bias);
        }
        find(0);
        block_sync();
        for (int step = 0; step < gradient_stages - 1; ++step) copy(step);
        for (int step = 0; step < steps; ++step) {
            const int ahead = step + gradient_stages - 1;
            if (ahead % gradient_steps_found == 0) find(ahead);
            copies_wait<gradient_stages - 2>();
            block_sync();
            copy(ahead);
            if (first_right + first_column < d)
                multiply(shared.stage[step % gradient_stages], weight, bias, acc);
        }
        join_warps(acc);
        if (first_row == 0 && column < d) write(acc);
    }

    // Looks up the tokens of 8 steps, one a thread.
    VARIATOR_DEVICE void find(int step) const {
        const int group = first + step * gradient_rows + thread_index();
        int token = -1;
        if (group < last)
            token = p.by_group ? group : static_cast<int>(p.groups.token(group, slot));
        shared.token[step / gradient_steps_found % 2][thread_index()] = token;
    }

    // Begins to copy the rows of a step; rows without a token become zeros.
    VARIATOR_DEVICE void copy(int step) const {
        if (step < steps) {
            GradientStage& to = shared.stage[step % gradient_stages];
            const int group = first + step * gradient_rows + line;
            const int token = shared.token[step / gradient_steps_found % 2]
                                          [step % gradient_steps_found * gradient_rows + line];
            const bool real = token >= 0;
            const int64_t row = real ? token : 0;
            const int at_column = first_right + 8 * eighth;
            const void* right = element(p.right, row * p.right_stride + at_column);
            VARIATOR_UNROLL
            for (int c = 0; c < gradient_columns; c += 64)
                copy_async<16>(&to.right[line][8 * eighth + c], element(right, c),
                               real && at_column + c < d);
            copy_left(to.left[line], p.left + row * of_left, real, group);
            if (normed && eighth == 0)
                copy_async<8>(to.moments[line],
                              p.moments + (real ? int64_t{group} * slots + slot : 0) * 2, real);
        }
        copies_commit();
    }

    // A row's left columns, by the 8 threads that copy it: four at a time, where they lie together.
    VARIATOR_DEVICE void copy_left(float* to, const float* left, bool real, int group) const {
        const bool aligned = of_left % 4 == 0;
        for (int c = 4 * eighth; c < 8 * tiles; c += 32) {
            if (aligned && first_left + c < of_left) {
                copy_async<16>(to + c, left + first_left + c, real);
                continue;
            }
            for (int i = c; i < c + 4; ++i) {
                const int from = first_left + i, score = from - of_left;
                if (score < 0)
                    copy_async<4>(to + i, left + from, real);
                else if (score < of_scores)
                    copy_async<4>(to + i,
                                  p.scores + (real ? int64_t{group} * of_scores + score : 0), real);
                else
                    to[i] = real && from < columns ? 1.0f : 0.0f;
            }
        }
    }

    // The warp's 8 rows: products with rows part and part + 4 of them in this lane.
    VARIATOR_DEVICE void multiply(const GradientStage& from, const float (&weight)[8],
                                  const float (&bias)[8],
                                  float (&acc)[gradient_tiles][4][4]) const {
        constexpr int at_once = 3;  // tiles: as many loads are in flight
        const int low = first_row + at.part, high = low + 4;
        uint32_t right[2][8];
        load_right(from, low, weight, bias, right[0]);
        load_right(from, high, weight, bias, right[1]);
        VARIATOR_UNROLL
        for (int begin = 0; begin < gradient_tiles; begin += at_once) {
            if (begin >= tiles) break;
            uint32_t left[at_once][2];
            VARIATOR_UNROLL
            for (int i = 0; i < at_once; ++i) {
                const int c = 8 * (begin + i) + at.row;
                left[i][0] = to_tf32<false>(from.left[low][c]);
                left[i][1] = to_tf32<false>(from.left[high][c]);
            }
            VARIATOR_UNROLL
            for (int i = 0; i < at_once; ++i) VARIATOR_UNROLL
            for (int pair = 0; pair < 4; ++pair) {
                const uint32_t two[4] = {right[0][2 * pair], right[0][2 * pair + 1],
                                         right[1][2 * pair], right[1][2 * pair + 1]};
                mma_tf32(acc[begin + i][pair], two, left[i]);
            }
        }
    }

    // This lane's 8 columns of a row, normed.
    VARIATOR_DEVICE void load_right(const GradientStage& from, int row, const float (&weight)[8],
                                    const float (&bias)[8], uint32_t (&right)[8]) const {
        float x[8];
        widen<T>(load16(&from.right[row][first_column + 8 * at.row]), x);
        VARIATOR_UNROLL
        for (int c = 0; c < 8; ++c) {
            if (normed)
                x[c] = (x[c] - from.moments[row][0]) * from.moments[row][1] * weight[c] + bias[c];
            right[c] = to_tf32<!normed>(x[c]);
        }
    }

    // Adds up the four warps of the same columns, in two rounds, into the first of them.
    VARIATOR_DEVICE void join_warps(float (&acc)[gradient_tiles][4][4]) const {
        const int mine = at.warp / 2, lane = thread_index() % 32;
        VARIATOR_UNROLL
        for (int half = 2; half > 0; half /= 2) {
            block_sync();
            if (mine >= half && mine < 2 * half) exchange<true>(mine - half, lane, acc);
            block_sync();
            if (mine < half) exchange<false>(mine, lane, acc);
        }
    }
    template <bool store>
    VARIATOR_DEVICE void exchange(int pair_of_warps, int lane,
                                  float (&acc)[gradient_tiles][4][4]) const {
        const int place = 2 * pair_of_warps + at.warp % 2;
        VARIATOR_UNROLL
        for (int tile = 0; tile < gradient_tiles; ++tile) {
            if (tile >= tiles) break;
            VARIATOR_UNROLL
            for (int pair = 0; pair < 4; ++pair) {
                float* sums = shared.sums[place][4 * tile + pair][lane];
                if (store) {
                    store4(sums, acc[tile][pair]);
                } else {
                    float other[4];
                    load4(sums, other);
                    VARIATOR_UNROLL
                    for (int i = 0; i < 4; ++i) acc[tile][pair][i] += other[i];
                }
            }
        }
    }

    // A lane has two left columns of each tile, and 8 adjacent ones of `right`.
    VARIATOR_DEVICE void write(const float (&acc)[gradient_tiles][4][4]) const {
        VARIATOR_UNROLL
        for (int tile = 0; tile < gradient_tiles; ++tile) {
            VARIATOR_UNROLL
            for (int i = 0; i < 2; ++i) {
                const int c = first_left + 8 * tile + 2 * at.part + i;
                if (tile >= tiles || c >= columns) continue;
                float row[8];
                VARIATOR_UNROLL
                for (int pair = 0; pair < 4; ++pair) {
                    row[2 * pair] = acc[tile][pair][i];
                    row[2 * pair + 1] = acc[tile][pair][2 + i];
                }
                float* out = p.out + (int64_t{part} * columns + c) * d + column;
                store4(out, row);
                store4(out + 4, row + 4);
            }
        }
    }
};

// Grid: tiles of columns of `right`, pieces of `left`, shares x slots.
template <class T, bool normed>
VARIATOR_KERNEL(threads, 1)
weight_gradient_kernel(const WeightGradientParams p, const int tiles) {
    WeightGradientTile<T, normed>{p,
                                  *reinterpret_cast<WeightGradientShared*>(shared_memory()),
                                  tiles,
                                  static_cast<int>(block_x()) * gradient_columns,
                                  static_cast<int>(block_y()) * 8 * tiles,
                                  static_cast<int>(block_z())}
        .run();
}

}  // namespace variator::cuda
