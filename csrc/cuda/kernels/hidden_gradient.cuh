// The gradient of a tile's hidden vectors h in the backward pass of group_merge:
//   dh_j = a_j dg + W_c[:, slot j]ᵀ ds + W_1hᵀ dp_j.
#pragma once

#include "kernels/adapter.cuh"
#include "kernels/norm.cuh"

namespace variator::cuda {

struct MergeBackwardShared {
    TileTokens tokens;
    Moments moments[warps * tile_rows];
    float mean[max_ratio][tile_groups], rstd[max_ratio][tile_groups];
    float weight[max_ratio][tile_groups], ds[max_ratio][tile_groups];
    float dots[warps][max_ratio][tile_groups];
    float sums[warps][tile_rows][2];
};

static_assert(sizeof(MergeBackwardShared) % 16 == 0, "rows of 16-byte vectors follow");

template <class T, bool one_chunk>
struct HiddenGradient {
    using E = typename T::Element;
    const MergeBackwardParams& p;
    const MergeBackwardShared& shared;
    E* const dp;  // a quad's rows [tile_rows, bottleneck_stride(r)] in shared memory
    const int64_t first;
    const Lane at = Lane::here();
    const int64_t group = first + at.row;
    const int k = static_cast<int>(p.groups.k);

    VARIATOR_DEVICE bool inside(int block) const { return at.column(block) < p.d; }

    VARIATOR_DEVICE Vec16 group_row(int block) const {
        return load16_if(inside(block) && group < p.groups.count,
                         element(p.d_merged, group * p.d + at.column(block)));
    }

    // Called by all threads.
    VARIATOR_DEVICE void load_dp(int slot) const {
        if (p.d_projected == nullptr) return;
        block_sync();
        for (int row = at.warp; row < tile_rows; row += warps) {
            const int64_t token = shared.tokens.code[slot + row / tile_groups][row % tile_groups];
            for (int64_t c = thread_index() % 32; c < p.r; c += 32)
                dp[row * bottleneck_stride(p.r) + c] =
                    T::narrow(token >= 0 && c < p.projected_columns
                                  ? p.d_projected[token * p.projected_columns + c]
                                  : 0.0f);
        }
        block_sync();
    }

    // dh of a quad's rows at a block of columns.
    VARIATOR_DEVICE void gradient(int slot, int block, float (&dh)[quad][8]) const {
        float acc[2][4][4] = {};
        if (p.d_projected != nullptr) {
            Expansion<T, one_chunk> expansion{p.projection_transpose, p.d, p.r, at, {}};
            expansion.start(block);
            const int64_t stride = bottleneck_stride(p.r);
            VARIATOR_UNROLL
            for (int pair = 0; pair < 2; ++pair) {
                const E* low = dp + (2 * pair * tile_groups + at.row) * stride;
                expansion.add(block, low, low + tile_groups * stride, acc[pair]);
            }
        }
        float dg[8];
        widen<T>(group_row(block), dg);
        VARIATOR_UNROLL
        for (int i = 0; i < quad; ++i) {
            const float a = shared.weight[slot + i][at.row];
            VARIATOR_UNROLL
            for (int c = 0; c < 8; ++c) dh[i][c] = a * dg[c] + acc[i / 2][c / 2][i % 2 * 2 + c % 2];
        }
        VARIATOR_UNROLL
        for (int i = 0; i < quad; ++i) {
            if (slot + i >= k) break;
            for (int s = 0; s < k; ++s) {
                const float ds = shared.ds[s][at.row];
                const int64_t row = static_cast<int64_t>(s) * k + slot + i;
                float w[8];
                widen<T>(
                    load16_if(inside(block), element(p.merge_weight, row * p.d + at.column(block))),
                    w);
                VARIATOR_UNROLL
                for (int c = 0; c < 8; ++c) dh[i][c] += ds * w[c];
            }
        }
    }
};

}  // namespace variator::cuda
