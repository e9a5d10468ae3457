// The adapter's matrix products, shared by decompress and the backward passes.
#pragma once

#include "kernels/mma_tile.cuh"

namespace variator::cuda {

constexpr int bottleneck_chunk = 64;

// The row stride, in elements, of T [rows, r] in shared memory. A quarter of a warp reads 64 bytes
// of two rows at once; a stride of a multiple of 128 bytes plus 64 puts them into different banks.
VARIATOR_HD int64_t bottleneck_stride(int64_t r) { return r + 32; }

struct GroupHalfShared {
    float partial[warps][tile_groups][bottleneck_chunk + 4];  // stored without bank conflicts
};

static_assert(sizeof(GroupHalfShared) % 16 == 0, "rows of 16-byte vectors follow");

// q [tile_groups, r] = W_1u u + b_1 for the tile's groups. Each warp sums over its own columns,
// then the warps' sums are added up. Called by all threads.
template <class T>
VARIATOR_DEVICE void group_half(const Lane& at, const Groups& groups, int64_t first, int64_t d,
                                int64_t r, const void* u, const void* w1u, int64_t w1u_stride,
                                const Vector& b1, GroupHalfShared& shared, float* q) {
    const int64_t group = first + at.row;
    const BlockRange range =
        BlockRange::of_warp(at.warp, 0, static_cast<int>(ceil_div(d, block_columns)));
    const int stride = static_cast<int>(w1u_stride);
    for (int64_t n = 0; n < r; n += bottleneck_chunk) {
        float acc[8][4] = {};
        const void* weight = element(w1u, (n + spread(0, at.row)) * w1u_stride);
        for (int block = range.first; block < range.last; ++block) {
            const int column = at.column(block);
            const bool inside = column < d;
            const Pair left =
                Pair::of(load16_if(inside && group < groups.count, element(u, group * d + column)),
                         zero16());
            VARIATOR_UNROLL
            for (int tile = 0; tile < 8; ++tile) {
                const int row = tile / 4 * block_columns + tile % 4 * 2;
                multiply<T>(acc[tile], left,
                            load16(element(weight, row * stride + (inside ? column : 0))));
            }
        }
        VARIATOR_UNROLL
        for (int tile = 0; tile < 8; tile += 2) {
            const float four[4] = {acc[tile][0], acc[tile][1], acc[tile + 1][0], acc[tile + 1][1]};
            store4(&shared.partial[at.warp][at.row]
                                  [tile / 4 * block_columns + 8 * at.part + tile % 4 * 2],
                   four);
        }
        block_sync();
        const int of = thread_index() / 16, column = thread_index() % 16 * 4;
        if (of < tile_groups) {
            float sum[4];
            VARIATOR_UNROLL
            for (int i = 0; i < 4; ++i) sum[i] = load1<T>(b1, n + column + i);
            VARIATOR_UNROLL
            for (int warp = 0; warp < warps; ++warp) {
                float part[4];
                load4(&shared.partial[warp][of][column], part);
                VARIATOR_UNROLL
                for (int i = 0; i < 4; ++i) sum[i] += part[i];
            }
            store4(q + of * r + n + column, sum);
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
