// Gradients of adapter_decompress with respect to each token and group. With z = W_1u u + W_1h h +
// b_1, t = φ(z), o = u + W_2 t + b_2:
//   dt = W_2ᵀ do,  dz = φ'(z) dt,  d(W_1h h) = dz,  dq = Σ_j dz,  du = Σ_j do + W_1uᵀ dq;
// in a kept group t and dz are 0.
// weight_gradient.cuh has the weight gradients, sums over tokens.
#pragma once

#include "kernels/adapter.cuh"
#include "kernels/norm.cuh"

namespace variator::cuda {

struct DecompressBackwardShared {
    TileTokens tokens;
    union {
        float partial[partial_floats];
        GroupHalfShared half;
    };
    float dz[quad][tile_groups][block_columns];
};

static_assert(sizeof(DecompressBackwardShared) % 16 == 0, "rows of 16-byte vectors follow");

// After the struct: q [tile_groups, r], dq [r, tile_groups], dq as T [tile_groups,
// bottleneck_stride(r)].
VARIATOR_HD int64_t decompress_backward_shared_bytes(int64_t r) {
    return static_cast<int64_t>(sizeof(DecompressBackwardShared)) + 2 * r * tile_groups * 4 +
           tile_groups * bottleneck_stride(r) * 2;
}

template <class T, bool one_chunk>
struct DecompressBackwardTile {
    using E = typename T::Element;
    const DecompressBackwardParams& p;
    char* memory;
    const int64_t first;
    const Lane at = Lane::here();
    const int64_t group = first + at.row;
    const int k = static_cast<int>(p.groups.k);
    const BlockRange range =
        BlockRange::of_warp(at.warp, 0, static_cast<int>(ceil_div(p.d, block_columns)));
    DecompressBackwardShared& shared = *reinterpret_cast<DecompressBackwardShared*>(memory);
    float* const q = reinterpret_cast<float*>(memory + sizeof(DecompressBackwardShared));
    float* const dq = q + p.r * tile_groups;
    E* const dq_rows = reinterpret_cast<E*>(dq + p.r * tile_groups);

    VARIATOR_DEVICE int column(int block) const { return at.column(block); }

    VARIATOR_DEVICE void run() {
        shared.tokens.find(p.groups, first, false);
        group_half<T>(at, p.groups, first, p.d, p.r, p.u, p.w1u, p.w1u_stride, p.b1, shared.half,
                      q);
        for (int64_t i = thread_index(); i < p.r * tile_groups; i += threads) dq[i] = 0;
        for (int slot = 0; slot < k; slot += quad) {
            const QuadRows rows = QuadRows::of(shared.tokens, at.row, slot);
            for (int n = 0; n < p.r; n += block_columns) through_adapter(rows, slot, n);
        }
        block_sync();
        for (int64_t i = thread_index(); i < p.r * tile_groups; i += threads) {
            const int64_t c = i / tile_groups, g = i % tile_groups;
            dq_rows[g * bottleneck_stride(p.r) + c] = T::narrow(dq[i]);
            if (first + g < p.groups.count && c < p.projected_columns)
                p.d_q[(first + g) * p.projected_columns + c] = dq[i];
        }
        block_sync();
        for (int block = range.first; block < range.last; ++block) group_gradient(block);
    }

    // dt, then dz, in columns n .. n+31 of the bottleneck for a quad's rows.
    VARIATOR_DEVICE void through_adapter(const QuadRows& rows, int slot, int n) {
        float acc[4][2][4] = {};  // tile, pair
        for (int block = range.first; block < range.last; ++block) {
            const bool inside = column(block) < p.d;
            Vec16 dy[quad];
            rows.load(p.dy, p.dy_stride, column(block), inside, dy);
            VARIATOR_UNROLL
            for (int tile = 0; tile < 4; ++tile) {
                const int64_t c = n + spread(tile, at.row);
                const Vec16 w = load16_if(inside, element(p.w2_transpose, c * p.d + column(block)));
                multiply<T>(acc[tile][0], dy[0], dy[1], w);
                multiply<T>(acc[tile][1], dy[2], dy[3], w);
            }
        }
        VARIATOR_UNROLL
        for (int tile = 0; tile < 4; tile += 2)
            put_partial(at, tile, acc[tile], acc[tile + 1], shared.partial);
        add_warps(shared.partial, [&](int row, int at_column, const float (&dt)[4]) {
            const int g = row % tile_groups;
            const int code = shared.tokens.code[slot + row / tile_groups][g];
            const int64_t token = TileTokens::owned(code);
            const bool adapted = code >= 0 && !p.groups.whole(first + g);
            VARIATOR_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int64_t c = n + at_column + i, here = token * p.projected_columns + c;
                float dz = 0;
                if (token >= 0 && c < p.projected_columns) {
                    const float t = adapted ? phi(p.projected[here] + q[g * p.r + c], p.phi) : 0.0f;
                    if (adapted) dz = dt[i] * phi_slope(t, p.phi);
                    p.d_projected[here] = dz;
                    p.bottleneck[here] = t;
                }
                shared.dz[row / tile_groups][g][at_column + i] = dz;
            }
        });
        // One thread per group and column sums over the slots, always in the same order.
        const int g = thread_index() / block_columns, c = thread_index() % block_columns;
        float sum = dq[(n + c) * tile_groups + g];
        for (int i = 0; i < quad; ++i) sum += shared.dz[i][g][c];
        dq[(n + c) * tile_groups + g] = sum;
    }

    VARIATOR_DEVICE void group_gradient(int block) {
        const bool inside = column(block) < p.d;
        Expansion<T, one_chunk> expansion{p.w1u_transpose, p.d, p.r, at, {}};
        expansion.start(block);
        float acc[4][4] = {};
        expansion.add(block, dq_rows + at.row * bottleneck_stride(p.r), nullptr, acc);
        float du[8];
        VARIATOR_UNROLL
        for (int i = 0; i < 8; ++i) du[i] = acc[i / 2][i % 2];
        for (int slot = 0; slot < k; slot += quad) {
            Vec16 dy[quad];
            QuadRows::of(shared.tokens, at.row, slot)
                .load(p.dy, p.dy_stride, column(block), inside, dy);
            VARIATOR_UNROLL
            for (int i = 0; i < quad; ++i) {
                float v[8];
                widen<T>(dy[i], v);
                VARIATOR_UNROLL
                for (int c = 0; c < 8; ++c) du[c] += v[c];
            }
        }
        if (inside && group < p.groups.count)
            store16(element(p.du, group * p.d + column(block)), narrow<T>(du));
    }
};

template <class T, bool one_chunk>
VARIATOR_KERNEL(threads, 1)
decompress_backward_kernel(const DecompressBackwardParams p) {
    DecompressBackwardTile<T, one_chunk>{p, shared_memory(), block_x() * tile_groups}.run();
}

}  // namespace variator::cuda
