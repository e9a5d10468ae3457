// adapter_decompress: y = residual + u + W_2 φ(W_1u u + W_1h h + b_1) + b_2, with a single write of
// y; in a kept group y = residual + u.
#pragma once

#include "kernels/adapter.cuh"
#include "kernels/tokens.cuh"

namespace variator::cuda {

constexpr int pass_slots = 8;

struct DecompressShared {
    TileTokens tokens;
    GroupHalfShared half;
};

static_assert(sizeof(DecompressShared) % 16 == 0, "rows of 16-byte vectors follow");

// Shared memory: DecompressShared, q [tile_groups, r], t [pass_slots · tile_groups, r] of T.
VARIATOR_HD int64_t decompress_shared_bytes(int64_t r) {
    return static_cast<int64_t>(sizeof(DecompressShared)) + r * tile_groups * 4 +
           pass_slots * tile_groups * r * 2;
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
    const int k = static_cast<int>(p.groups.k), d = static_cast<int>(p.d);
    const int r = one_chunk ? bottleneck_chunk : static_cast<int>(p.r);
    DecompressShared& shared = *reinterpret_cast<DecompressShared*>(memory);
    float* const q = reinterpret_cast<float*>(memory + sizeof(DecompressShared));
    E* const t = reinterpret_cast<E*>(q + r * tile_groups);

    VARIATOR_DEVICE void run() {
        shared.tokens.find(p.groups, first, true);
        group_half<T>(at, p.groups, first, p.d, r, p.u, p.w1u, p.w1u_stride, p.b1, shared.half, q);
        for (int slot = 0; slot < k; slot += pass_slots) {
            bottleneck(slot);
            block_sync();
            for (int pass = 0; pass < pass_slots && slot + pass < k; pass += quad)
                expand(slot + pass, pass);
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

    // t lies as the left operand that a lane loads in 16 bytes: of a pair of slots, step by step of
    // 16 columns. Where that of a pair's lane is:
    VARIATOR_DEVICE E* operand(int pair, int step, int lane) const {
        return t + ((pair * (r / 16) + step) * 32 + lane) * 8;
    }

    // t = φ(W_1h h + q) for eight slots of each group, a warp per group. Rows of slots without a
    // token to be adapted are left as they are: what comes of them is not written.
    VARIATOR_DEVICE void bottleneck(int slot) {
        const int g = at.warp, columns = static_cast<int>(p.projected_columns);
        for (int s = 0; s < pass_slots && slot + s < k; ++s) {
            const int token = shared.tokens.code[slot + s][g];
            if (token < 0) continue;
            const float* projected = p.projected + static_cast<int64_t>(token) * columns;
            VARIATOR_UNROLL
            for (int chunk = 0; chunk < r / block_columns; ++chunk) {
                const int in_chunk = thread_index() % 32, c = chunk * block_columns + in_chunk;
                const float z = c < columns ? phi(projected[c] + q[g * r + c], p.phi) : 0.0f;
                const int step = 2 * chunk + in_chunk % 8 / 4, lane = 4 * g + in_chunk / 8;
                const int word = in_chunk % 4 / 2 * 2 + s % 2;
                operand(s / 2, step, lane)[2 * word + in_chunk % 2] = T::narrow(z);
            }
        }
    }

    // y of a quad's slots, which are `row_slot` and so on of the pass.
    VARIATOR_DEVICE void expand(int slot, int row_slot) {
        int code[quad];
        VARIATOR_UNROLL
        for (int i = 0; i < quad; ++i) code[i] = shared.tokens.code[slot + i][at.row];
        const BlockRange range = BlockRange::of_warp(at.warp, begin, end);
        for (int block = range.first; block < range.last; ++block) {
            const int column = at.column(block);
            const bool inside = column < d;
            float acc[2][4][4];  // pair, tile
            start(code, block, inside, acc);
            multiply_block(block, row_slot, slot, acc);
            VARIATOR_UNROLL
            for (int i = 0; i < quad; ++i) {
                if (code[i] < 0 || !inside) continue;
                float y[8];
                VARIATOR_UNROLL
                for (int c = 0; c < 8; ++c) y[c] = acc[i / 2][c / 2][i % 2 * 2 + c % 2];
                store16(element(p.y, static_cast<int64_t>(code[i]) * d + column), narrow<T>(y));
            }
        }
    }

    // acc = residual + u + b_2. Padding has its y already.
    VARIATOR_DEVICE void start(const int (&code)[quad], int block, bool inside,
                               float (&acc)[2][4][4]) const {
        const int column = at.column(block);
        Vec16 x[quad];
        VARIATOR_UNROLL
        for (int i = 0; i < quad; ++i) {
            const int token = TileTokens::owned(code[i]);
            x[i] = zero16();
            if (!inside || token < 0) continue;
            if (p.residual != nullptr)
                x[i] = load16_once(element(p.residual, token * p.residual_stride + column));
            if (code[i] < 0) store16(element(p.y, static_cast<int64_t>(token) * d + column), x[i]);
        }
        float u[8], common[8];
        widen<T>(load16_if(inside && group < p.groups.count,
                           element(p.u, static_cast<int64_t>(group) * d + column)),
                 u);
        load8<T>(p.b2, inside ? column : 0, 0, common);
        VARIATOR_UNROLL
        for (int c = 0; c < 8; ++c) common[c] += u[c];
        VARIATOR_UNROLL
        for (int i = 0; i < quad; ++i) {
            float v[8];
            widen<T>(x[i], v);
            VARIATOR_UNROLL
            for (int c = 0; c < 8; ++c) acc[i / 2][c / 2][i % 2 * 2 + c % 2] = common[c] + v[c];
        }
    }

    // acc += t · W_2ᵀ
    VARIATOR_DEVICE void multiply_block(int block, int row_slot, int slot,
                                        float (&acc)[2][4][4]) const {
        const int lane = thread_index() % 32, n = block * block_columns + spread(0, at.row);
        const int first_row = n < d ? n : 0;  // all rows of a lane lie in the weight, or none
        VARIATOR_UNROLL
        for (int chunk = 0; chunk < r / block_columns; ++chunk) {
            // Addresses that start at p.w2 each time leave sm_100 the registers that it needs.
            Vec16 w[4];
            VARIATOR_UNROLL
            for (int tile = 0; tile < 4; ++tile)
                w[tile] = load16(element(p.w2, static_cast<int64_t>(first_row + 2 * tile) * r +
                                                   8 * at.part + chunk * block_columns));
            VARIATOR_UNROLL
            for (int pair = 0; pair < 2; ++pair) {
                if (slot + 2 * pair >= k) break;
                VARIATOR_UNROLL
                for (int step = 0; step < 2; ++step) {
                    const Vec16 a = load16(operand(row_slot / 2 + pair, 2 * chunk + step, lane));
                    VARIATOR_UNROLL
                    for (int tile = 0; tile < 4; ++tile)
                        T::mma(acc[pair][tile], a.word,
                               {w[tile].word[2 * step], w[tile].word[2 * step + 1]});
                }
            }
        }
    }
};

// Grid: tiles, parts of the columns.
template <class T, bool one_chunk>
VARIATOR_KERNEL(threads, 2)
decompress_kernel(const DecompressParams p, int blocks_a_part) {
    const int blocks = static_cast<int>(ceil_div(p.d, block_columns));
    const int begin = static_cast<int>(block_y()) * blocks_a_part;
    const int end = begin + blocks_a_part < blocks ? begin + blocks_a_part : blocks;
    DecompressTile<T, one_chunk>{p, shared_memory(), static_cast<int>(block_x()) * tile_groups,
                                 begin, end}
        .run();
}

}  // namespace variator::cuda
