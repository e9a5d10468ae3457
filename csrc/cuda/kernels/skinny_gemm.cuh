// GEMM for few rows, in tiles of [64, 64]: operands go from L2 straight into mma.sync's registers,
// so there is no shared-memory pipeline to fill. The 8 warps split the tile 2 x 2 and the inner
// dimension in two.
#pragma once

#include "kernels/mma_tile.cuh"

namespace variator::cuda {

constexpr int skinny_gemm_tile = 64;

struct SkinnyGemmShared {
    float half[4][32][36];
};

// acc [32, 32] of this warp += a · weightᵀ over this warp's half of column blocks begin .. end-1.
// Rows past the end of `a` or `weight`, and columns past `inner`, count as 0.
struct SkinnyGemm {
    int64_t row0, column0;  // of the tile
    int64_t rows, columns, inner;
    const Lane at = Lane::here();
    const int warp_row = at.warp % 2 * 32, warp_column = at.warp / 2 % 2 * 32;

    template <class T>
    VARIATOR_DEVICE void multiply_half(const void* a, const void* weight, int begin, int end,
                                       float (&acc)[2][4][4]) const {
        const int middle = begin + (end - begin + 1) / 2;
        const int first = at.warp < 4 ? begin : middle, last = at.warp < 4 ? middle : end;
        for (int block = first; block < last; ++block) {
            const int64_t k = static_cast<int64_t>(block) * block_columns + 8 * at.part;
            const bool inside = k < inner;
            Vec16 left[4], right[4];
            VARIATOR_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int64_t row = row0 + warp_row + 8 * i + at.row;
                left[i] = load16_if(inside && row < rows, element(a, row * inner + k));
                const int64_t column = column0 + warp_column + spread(i, at.row);
                right[i] =
                    load16_if(inside && column < columns, element(weight, column * inner + k));
            }
            VARIATOR_UNROLL
            for (int tile = 0; tile < 4; ++tile) {
                multiply<T>(acc[0][tile], left[0], left[1], right[tile]);
                multiply<T>(acc[1][tile], left[2], left[3], right[tile]);
            }
        }
    }

    // Adds the two halves; the first four warps call store(row, column, 8 adjacent results).
    template <class Store>
    VARIATOR_DEVICE void add_halves(const float (&acc)[2][4][4], SkinnyGemmShared& shared,
                                    Store store) const {
        float (&half)[32][36] = shared.half[at.warp % 4];
        block_sync();
        if (at.warp >= 4) VARIATOR_UNROLL
        for (int i = 0; i < 4; ++i) VARIATOR_UNROLL
        for (int c = 0; c < 8; ++c)
            half[8 * i + at.row][8 * at.part + c] = acc[i / 2][c / 2][i % 2 * 2 + c % 2];
        block_sync();
        if (at.warp >= 4) return;
        VARIATOR_UNROLL
        for (int i = 0; i < 4; ++i) {
            const int64_t row = row0 + warp_row + 8 * i + at.row;
            const int64_t column = column0 + warp_column + 8 * at.part;
            float sum[8];
            VARIATOR_UNROLL
            for (int c = 0; c < 8; ++c)
                sum[c] =
                    acc[i / 2][c / 2][i % 2 * 2 + c % 2] + half[8 * i + at.row][8 * at.part + c];
            if (row < rows && column < columns) store(row, column, sum);
        }
    }
};

}  // namespace variator::cuda
