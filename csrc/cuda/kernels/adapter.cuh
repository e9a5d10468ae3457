// The adapter's matrix products, shared by decompress and the backward passes.
#pragma once

#include "kernels/mma_tile.cuh"

namespace variator::cuda {

constexpr int bottleneck_chunk = 64;
constexpr int pass_slots = 8, pass_rows = pass_slots * tile_groups;

// The row stride, in elements, of T [rows, r] in shared memory. A quarter of a warp reads 64 bytes
// of two rows at once; a stride of a multiple of 128 bytes plus 64 puts them into different banks.
VARIATOR_HD int64_t bottleneck_stride(int64_t r) { return r + 32; }

struct GroupHalfShared {
    float partial[warps][bottleneck_chunk][tile_groups];
};

static_assert(sizeof(GroupHalfShared) % 16 == 0, "rows of 16-byte vectors follow");

// q [r, tile_groups] = W_1u u + b_1 for the tile's groups. Each warp sums over its own columns,
// then the warps' sums are added up. Called by all threads.
template <class T>
VARIATOR_DEVICE void group_half(const Lane& at, const Groups& groups, int64_t first, int64_t d,
                                int64_t r, const void* u, const void* w1u, int64_t w1u_stride,
                                const Vector& b1, GroupHalfShared& shared, float* q) {
    const int64_t group = first + at.row;
    const BlockRange range =
        BlockRange::of_warp(at.warp, 0, static_cast<int>(ceil_div(d, block_columns)));
    for (int64_t n = 0; n < r; n += bottleneck_chunk) {
        float acc[4][4] = {};
        for (int block = range.first; block < range.last; ++block) {
            const int64_t column = static_cast<int64_t>(block) * block_columns + 8 * at.part;
            const bool inside = column < d;
            const Vec16 right =
                load16_if(inside && group < groups.count, element(u, group * d + column));
            VARIATOR_UNROLL
            for (int m = 0; m < 4; ++m) {
                const int64_t low = n + 16 * m + at.row;
                multiply<T>(acc[m], load16_if(inside, element(w1u, low * w1u_stride + column)),
                            load16_if(inside, element(w1u, (low + 8) * w1u_stride + column)),
                            right);
            }
        }
        VARIATOR_UNROLL
        for (int m = 0; m < 4; ++m) VARIATOR_UNROLL
        for (int i = 0; i < 4; ++i)
            shared.partial[at.warp][16 * m + i / 2 * 8 + at.row][2 * at.part + i % 2] = acc[m][i];
        block_sync();
        for (int i = thread_index(); i < bottleneck_chunk * tile_groups; i += threads) {
            float sum = load1<T>(b1, n + i / tile_groups);
            for (int warp = 0; warp < warps; ++warp)
                sum += shared.partial[warp][i / tile_groups][i % tile_groups];
            q[n * tile_groups + i] = sum;
        }
        block_sync();
    }
}

// The right operand [d, r] for one block of 32 output columns, kept in registers if r is one chunk.
template <class T, bool one_chunk>
struct Expansion {
    const void* weight;  // T [d, r]
    int64_t d, r;
    const Lane& at;
    Vec16 kept[4][2];

    VARIATOR_DEVICE Vec16 load(int block, int tile, int64_t chunk) const {
        const int64_t n = static_cast<int64_t>(block) * block_columns + spread(tile, at.row);
        return load16_if(n < d, element(weight, n * r + chunk * block_columns + 8 * at.part));
    }
    VARIATOR_DEVICE void start(int block) {
        if constexpr (one_chunk) {
            VARIATOR_UNROLL
            for (int tile = 0; tile < 4; ++tile) {
                kept[tile][0] = load(block, tile, 0);
                kept[tile][1] = load(block, tile, 1);
            }
        }
    }
    // acc[tile] += (low, high) · weightᵀ, with rows of T in shared memory; a null `high` is zeros.
    VARIATOR_DEVICE void add(int block, const typename T::Element* low,
                             const typename T::Element* high, float (&acc)[4][4]) const {
        if constexpr (one_chunk) {
            VARIATOR_UNROLL
            for (int chunk = 0; chunk < 2; ++chunk) {
                const Vec16 a = load16(low + chunk * block_columns + 8 * at.part);
                const Vec16 b =
                    load16_if(high != nullptr, high + chunk * block_columns + 8 * at.part);
                VARIATOR_UNROLL
                for (int tile = 0; tile < 4; ++tile)
                    multiply<T>(acc[tile], a, b, kept[tile][chunk]);
            }
        } else {
            for (int64_t chunk = 0; chunk < r / block_columns; ++chunk) {
                const Vec16 a = load16(low + chunk * block_columns + 8 * at.part);
                const Vec16 b =
                    load16_if(high != nullptr, high + chunk * block_columns + 8 * at.part);
                VARIATOR_UNROLL
                for (int tile = 0; tile < 4; ++tile)
                    multiply<T>(acc[tile], a, b, load(block, tile, chunk));
            }
        }
    }
};

}  // namespace variator::cuda
