// The whole sublayer in one cooperative launch, for few groups: merge, the FFN's two
// GEMMs and decompress, each spread over all thread blocks, with a grid barrier between them. Every
// sum has a fixed order: the down projection is split over f, and its partial sums are stored and
// then added one after the other.
#pragma once

#include "kernels/decompress.cuh"
#include "kernels/merge.cuh"
#include "kernels/skinny_gemm.cuh"

namespace variator::cuda {

// The shared memory of the phase that needs most.
VARIATOR_HD int64_t one_launch_shared_bytes(int64_t r) {
    const int64_t merge = sizeof(MergeShared), gemm = sizeof(SkinnyGemmShared),
                  decompress = decompress_shared_bytes(r);
    const int64_t larger = merge > gemm ? merge : gemm;
    return larger > decompress ? larger : decompress;
}

template <class T, int resident>
struct OneLaunch {
    const LayerParams& p;
    const int64_t groups = p.merge.groups.count, d = p.merge.d;
    SkinnyGemmShared& shared = *reinterpret_cast<SkinnyGemmShared*>(shared_memory());

    VARIATOR_DEVICE void run() {
        merge();
        grid_sync();
        up_projection();
        grid_sync();
        down_projection();
        grid_sync();
        add_parts();
        grid_sync();
        decompress();
    }

    VARIATOR_DEVICE void merge() {
        const int64_t tiles = ceil_div(p.merge.groups.launched, tile_groups);
        for (int64_t tile = block_x(); tile < tiles; tile += grid_x()) {
            MergeTile<T, resident>{p.merge, *reinterpret_cast<MergeShared*>(shared_memory()),
                                   static_cast<int>(tile) * tile_groups}
                .run();
            block_sync();
        }
    }

    // inner = activation(g · w_inᵀ + b_in) [* (g · w_gateᵀ + b_gate)]
    VARIATOR_DEVICE void up_projection() {
        const int64_t across = ceil_div(p.f, skinny_gemm_tile);
        const int64_t units = ceil_div(groups, skinny_gemm_tile) * across;
        const int blocks = static_cast<int>(ceil_div(d, block_columns));
        for (int64_t unit = block_x(); unit < units; unit += grid_x()) {
            const SkinnyGemm gemm{unit / across * skinny_gemm_tile,
                                  unit % across * skinny_gemm_tile, groups, p.f, d};
            float acc[2][4][4] = {};
            gemm.multiply_half<T>(p.merge.merged, p.w_in, 0, blocks, acc);
            gemm.add_halves(acc, shared, [&](int64_t row, int64_t column, float (&sum)[8]) {
                add_bias(p.b_in, column, sum);
                VARIATOR_UNROLL
                for (int c = 0; c < 8; ++c) sum[c] = activate(sum[c], p.activation);
                store16(element(p.inner, row * p.f + column), narrow<T>(sum));
            });
            if (p.w_gate == nullptr) continue;
            VARIATOR_UNROLL
            for (int i = 0; i < 32; ++i) acc[i / 16][i / 4 % 4][i % 4] = 0;
            gemm.multiply_half<T>(p.merge.merged, p.w_gate, 0, blocks, acc);
            // Each lane reads what it wrote to `inner` itself.
            gemm.add_halves(acc, shared, [&](int64_t row, int64_t column, float (&sum)[8]) {
                add_bias(p.b_gate, column, sum);
                void* out = element(p.inner, row * p.f + column);
                float inner[8];
                widen<T>(load16(out), inner);
                VARIATOR_UNROLL
                for (int c = 0; c < 8; ++c) sum[c] *= inner[c];
                store16(out, narrow<T>(sum));
            });
        }
    }

    VARIATOR_DEVICE void add_bias(const void* bias, int64_t column, float (&sum)[8]) const {
        if (bias == nullptr) return;
        float b[8];
        widen<T>(load16(element(bias, column)), b);
        VARIATOR_UNROLL
        for (int c = 0; c < 8; ++c) sum[c] += b[c];
    }

    // partial[s] = inner · w_outᵀ over part s of f
    VARIATOR_DEVICE void down_projection() {
        const int64_t across = ceil_div(d, skinny_gemm_tile);
        const int64_t tiles = ceil_div(groups, skinny_gemm_tile) * across;
        const int blocks = static_cast<int>(ceil_div(p.f, block_columns));
        const int each = static_cast<int>(ceil_div(blocks, p.splits));
        for (int64_t unit = block_x(); unit < tiles * p.splits; unit += grid_x()) {
            const int64_t tile = unit % tiles, part = unit / tiles;
            const SkinnyGemm gemm{tile / across * skinny_gemm_tile,
                                  tile % across * skinny_gemm_tile, groups, d, p.f};
            const int begin =
                static_cast<int>(part) * each < blocks ? static_cast<int>(part) * each : blocks;
            const int end = begin + each < blocks ? begin + each : blocks;
            float acc[2][4][4] = {};
            gemm.multiply_half<T>(p.inner, p.w_out, begin, end, acc);
            float* out = p.partial + part * groups * d;
            gemm.add_halves(acc, shared, [&](int64_t row, int64_t column, float (&sum)[8]) {
                store4(out + row * d + column, sum);
                store4(out + row * d + column + 4, sum + 4);
            });
        }
    }

    // u = Σ partial + b_out
    VARIATOR_DEVICE void add_parts() {
        const int64_t vectors = groups * d / 8;
        for (int64_t i = block_x() * threads + thread_index(); i < vectors;
             i += grid_x() * threads) {
            float sum[8] = {};
            for (int64_t part = 0; part < p.splits; ++part) {
                float v[8];
                load4(p.partial + part * groups * d + 8 * i, v);
                load4(p.partial + part * groups * d + 8 * i + 4, v + 4);
                VARIATOR_UNROLL
                for (int c = 0; c < 8; ++c) sum[c] += v[c];
            }
            add_bias(p.b_out, 8 * i % d, sum);
            store16(element(p.u, 8 * i), narrow<T>(sum));
        }
    }

    VARIATOR_DEVICE void decompress() {
        const DecompressParams& q = p.decompress;
        const int blocks = static_cast<int>(ceil_div(d, block_columns));
        const int each = static_cast<int>(p.blocks_a_part);
        const int64_t parts = ceil_div(blocks, each);
        const int64_t units = ceil_div(q.groups.launched, tile_groups) * parts;
        for (int64_t unit = block_x(); unit < units; unit += grid_x()) {
            const int begin = static_cast<int>(unit % parts) * each;
            const int end = begin + each < blocks ? begin + each : blocks;
            DecompressTile<T, true>{q, shared_memory(),
                                    static_cast<int>(unit / parts) * tile_groups, begin, end}
                .run();
            block_sync();
        }
    }
};

template <class T, int resident>
VARIATOR_KERNEL(threads, 1)
one_launch_kernel(const LayerParams p) {
    OneLaunch<T, resident>{p}.run();
}

}  // namespace variator::cuda
