// adapter_decompress: y = residual + u + W_2 φ(W_1u u + W_1h h + b_1) + b_2, with a single write of
// y; in a kept group y = residual + u.
#pragma once

#include "kernels/adapter.cuh"

namespace variator::cuda {

// Shared memory: GroupHalfShared, q [r, tile_groups], t [pass_rows, bottleneck_stride(r)] of T.
VARIATOR_HD int64_t decompress_shared_bytes(int64_t r) {
    return static_cast<int64_t>(sizeof(GroupHalfShared)) + r * tile_groups * 4 +
           pass_rows * bottleneck_stride(r) * 2;
}

template <class T, bool one_chunk>
struct DecompressTile {
    using E = typename T::Element;
    const DecompressParams& p;
    char* memory;
    const int first;       // the tile's first group
    const int begin, end;  // column blocks to write
    const Lane at = Lane::here();
    const int group = first + at.row;
    const int k = static_cast<int>(p.groups.k);
    float* const q = reinterpret_cast<float*>(memory + sizeof(GroupHalfShared));
    E* const t = reinterpret_cast<E*>(q + p.r * tile_groups);
    const int64_t stride = bottleneck_stride(p.r);

    VARIATOR_DEVICE void run() {
        group_half<T>(at, p.groups, first, p.d, p.r, p.u, p.w1u, p.w1u_stride, p.b1,
                      *reinterpret_cast<GroupHalfShared*>(memory), q);
        for (int slot = 0; slot < k; slot += pass_slots) {
            bottleneck(slot);
            block_sync();
            expand(slot);
            block_sync();
        }
        if (p.groups.kept != nullptr) write_whole();
    }

    // The tokens of kept groups, of which `expand` writes nothing; one warp per group.
    VARIATOR_DEVICE void write_whole() {
        const int64_t last = static_cast<int64_t>(end) * block_columns;
        for (int g = at.warp; g < tile_groups; g += warps) {
            const int64_t whole = first + g;
            if (!p.groups.whole(whole)) continue;
            for (int slot = 0; slot < k; ++slot) {
                const Groups::Slot found = p.groups.slot(whole, slot);
                const int64_t token = found.token;
                if (token < 0) continue;
                for (int64_t c = begin * block_columns + thread_index() % 32 * 8;
                     c < last && c < p.d; c += 256) {
                    float u[8], y[8] = {};
                    widen<T>(load16_if(found.real, element(p.u, whole * p.d + c)), u);
                    if (p.residual != nullptr)
                        widen<T>(load16_once(element(p.residual, token * p.residual_stride + c)),
                                 y);
                    VARIATOR_UNROLL
                    for (int i = 0; i < 8; ++i) y[i] += u[i];
                    store16(element(p.y, token * p.d + c), narrow<T>(y));
                }
            }
        }
    }

    // t = φ(W_1h h + q) for eight slots of each group, one warp per row.
    VARIATOR_DEVICE void bottleneck(int slot) {
        for (int row = at.warp; row < pass_rows; row += warps) {
            const int g = row % tile_groups;
            const int64_t token = p.groups.token(first + g, slot + row / tile_groups);
            for (int64_t c = thread_index() % 32; c < p.r; c += 32) {
                float z = 0;
                if (token >= 0 && c < p.projected_columns)
                    z = phi(p.projected[token * p.projected_columns + c] + q[c * tile_groups + g],
                            p.phi);
                t[row * stride + c] = T::narrow(z);
            }
        }
    }

    VARIATOR_DEVICE void expand(int slot) {
        Expansion<T, one_chunk> expansion{p.w2, p.d, p.r, at, {}};
        const BlockRange range = BlockRange::of_warp(at.warp, begin, end);
        for (int block = range.first; block < range.last; ++block) {
            const int column = block * block_columns + 8 * at.part;
            const bool inside = column < p.d && !p.groups.whole(group);
            expansion.start(block);
            const Vec16 u =
                load16_if(inside && group < p.groups.count, element(p.u, group * p.d + column));
            VARIATOR_UNROLL
            for (int s = 0; s < pass_slots; s += quad) {
                if (slot + s >= k) break;
                write_quad(slot + s, s, block, column, inside, expansion, u);
            }
        }
    }

    VARIATOR_DEVICE void write_quad(int slot, int row_slot, int block, int column, bool inside,
                                    const Expansion<T, one_chunk>& expansion, const Vec16& u) {
        int token[quad];
        bool real[quad];
        Vec16 x[quad];
        VARIATOR_UNROLL
        for (int i = 0; i < quad; ++i) {
            const Groups::Slot found = p.groups.slot(group, slot + i);
            token[i] = inside ? static_cast<int>(found.token) : -1;
            real[i] = found.real;
            x[i] = zero16();
            if (token[i] >= 0 && p.residual != nullptr)
                x[i] = load16_once(element(p.residual, token[i] * p.residual_stride + column));
        }
        VARIATOR_UNROLL
        for (int pair = 0; pair < 2; ++pair) {
            if (slot + 2 * pair >= k) break;
            float acc[4][4] = {};
            const E* low = t + ((row_slot + 2 * pair) * tile_groups + at.row) * stride;
            expansion.add(block, low, low + tile_groups * stride, acc);
            if (!inside) continue;
            float common[8], b2[8];  // u + b_2, shared by the group's tokens
            widen<T>(u, common);
            load8<T>(p.b2, column, 0, b2);
            VARIATOR_UNROLL
            for (int c = 0; c < 8; ++c) common[c] += b2[c];
            VARIATOR_UNROLL
            for (int i = 2 * pair; i < 2 * pair + 2; ++i) {
                if (token[i] < 0) continue;
                float y[8];
                widen<T>(x[i], y);
                VARIATOR_UNROLL
                for (int c = 0; c < 8; ++c) y[c] += common[c] + acc[c / 2][i % 2 * 2 + c % 2];
                store16(element(p.y, token[i] * p.d + column), real[i] ? narrow<T>(y) : x[i]);
            }
        }
    }
};

// Grid: tiles, parts of the columns.
template <class T, bool one_chunk>
VARIATOR_KERNEL(threads, one_chunk ? 2 : 1)
decompress_kernel(const DecompressParams p, int blocks_a_part) {
    const int blocks = static_cast<int>(ceil_div(p.d, block_columns));
    const int begin = static_cast<int>(block_y()) * blocks_a_part;
    const int end = begin + blocks_a_part < blocks ? begin + blocks_a_part : blocks;
    DecompressTile<T, one_chunk>{p, shared_memory(), static_cast<int>(block_x()) * tile_groups,
                                 begin, end}
        .run();
}

}  // namespace variator::cuda
