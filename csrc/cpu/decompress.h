// adapter_decompress: y = residual + u + W_2 φ(W_1u u + W_1h h + b_1) + b_2, one write of y.
#pragma once

#include "chunks.h"
#include "gemm.h"
#include "phi.h"
#include "rows.h"
#include "scratch.h"

namespace variator {
namespace VARIATOR_ISA {

// Tokens whose bottleneck vectors are worked on together.
constexpr int64_t block_tokens = 48;

// Up to block_tokens tokens of a chunk's groups: their place in the token list, and their group.
struct TokenBlock {
    int64_t token[block_tokens];
    int64_t group[block_tokens];
    int64_t count = 0;
};

// work(block) over the tokens that exist in groups first..last-1, in order.
template <class F>
void for_token_blocks(const Groups& groups, int64_t first, int64_t last, F work) {
    TokenBlock block;
    for (int64_t g = first; g < last; ++g)
        for (int64_t j = 0; j < smaller(groups.k, groups.length[g]); ++j) {
            if (!groups.has(g, j)) continue;
            block.token[block.count] = groups.start[g] + j;
            block.group[block.count] = g;
            if (++block.count == block_tokens) {
                work(block);
                block.count = 0;
            }
        }
    if (block.count) work(block);
}

// t = φ(projected + q), q = W_1u u + b_1, for one token; zeros from r to padded.
template <class V, class Out>
void bottleneck_row(const typename V::Scalar* projected, const typename V::Scalar* q, int64_t r,
                    int64_t padded, Phi phi, typename Out::Element* t) {
    for_parts<V>(r, [&](Part<V> part) {
        V z = part.template load<Acc<V>>(projected) + part.template load<Acc<V>>(q);
        part.template store<Out>(t, phi == Phi::tanh ? tanh(z) : z);
    });
    for (int64_t i = r; i < padded; ++i) t[i] = 0;
}

// q [rows, ldq] = W_1u u + b_1 for groups first..; `rows_of_u` is scratch [rows, padded].
template <class V, DType dtype, class Products, class Out>
void group_half(const void* u, int64_t first, int64_t rows, int64_t d, int64_t padded, int64_t r,
                const void* packed, const void* b1, typename Products::Element* rows_of_u,
                typename V::Scalar* q, int64_t ldq) {
    using S = typename V::Scalar;
    using T = Storage<V, dtype>;
    for (int64_t m = 0; m < rows; ++m)
        normed_row<V, dtype, Out>(static_cast<const typename T::Element*>(u) + (first + m) * d, d,
                                  padded, {0, 1}, nullptr, nullptr, rows_of_u + m * padded);
    product<Products, V>(rows_of_u, padded, 1, rows,
                         {static_cast<const typename Products::Element*>(packed), 0}, ldq, q, ldq,
                         round_up(d, Products::step), false);
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t i = 0; i < r; ++i) q[m * ldq + i] += static_cast<const S*>(b1)[i];
}

template <class V, DType dtype, class Products, class Out>
struct DecompressForward {
    using S = typename V::Scalar;
    using T = Storage<V, dtype>;
    using E = typename T::Element;
    using Operated = typename Products::Element;
    const DecompressParams& p;
    const int64_t padded = round_up(p.d, larger(V::width, Products::step));
    const int64_t bottleneck = round_up(p.r, larger(V::width, Products::step));
    const int64_t inner = round_up(p.r, Products::step);
    const int64_t columns = round_up(p.d, V::width);

    void chunk(int64_t first, int64_t last) const {
        const int64_t rows = last - first;
        Carver carver;
        const int64_t u_at = carver.reserve<Operated>(rows * padded),
                      q_at = carver.reserve<S>(rows * bottleneck),
                      t_at = carver.reserve<Operated>(block_tokens * bottleneck),
                      shared_at = carver.reserve<S>(rows * padded);
        char* base = static_cast<char*>(thread_scratch(carver.bytes));
        auto* q = reinterpret_cast<S*>(base + q_at);
        auto* t = reinterpret_cast<Operated*>(base + t_at);
        auto* shared = reinterpret_cast<S*>(base + shared_at);
        for (int64_t m = 0; m < rows; ++m) shared_row(first + m, shared + m * padded);
        group_half<V, dtype, Products, Out>(p.u, first, rows, p.d, padded, p.r, p.w1u_packed, p.b1,
                                            reinterpret_cast<Operated*>(base + u_at), q,
                                            bottleneck);
        for_token_blocks(p.groups, first, last, [&](const TokenBlock& block) {
            for (int64_t i = 0; i < block.count; ++i)
                bottleneck_row<V, Out>(static_cast<const S*>(p.projected) + block.token[i] * p.r,
                                       q + (block.group[i] - first) * bottleneck, p.r, bottleneck,
                                       p.phi, t + i * bottleneck);
            for (int64_t n = 0; n < columns; n += panel_columns<V>()) {
                const int64_t width = smaller(panel_columns<V>(), columns - n);
                panel_product<Products, V>(t, bottleneck, 1, block.count,
                                           static_cast<const Operated*>(p.w2_packed) + n * inner,
                                           width * Products::step, width, inner,
                                           [&](int64_t row, int64_t column, V delta) {
                                               const int64_t group = block.group[row] - first;
                                               write(block.token[row], n + column, delta,
                                                     V::load(shared + group * padded + n + column));
                                           });
            }
        });
    }

    // u + b_2, what all tokens of a group have in common.
    void shared_row(int64_t group, S* out) const {
        const V poison = V::set(p.poison ? static_cast<const S*>(p.poison)[group] : S(0));
        for_parts<V>(p.d, [&](Part<V> part) {
            part.template store<Acc<V>>(
                out, part.template load<T>(static_cast<const E*>(p.u) + group * p.d) +
                         part.template load<Acc<V>>(static_cast<const S*>(p.b2)) + poison);
        });
    }

    // One vector of y, at column `at` of a token. The same column of the next panel is fetched
    // ahead: pieces of a row are used a block apart in time, which hides them from the hardware.
    inline __attribute__((always_inline)) void write(int64_t token, int64_t at, V delta,
                                                     V shared) const {
        E* y = static_cast<E*>(p.y) + token * p.d + at;
        __builtin_prefetch(y + panel_columns<V>(), 1);
        const Part<V> part{0, static_cast<int>(smaller(V::width, p.d - at))};
        V o = delta + shared;
        if (p.residual) {
            const E* x = static_cast<const E*>(p.residual) + token * p.residual_stride + at;
            __builtin_prefetch(x + panel_columns<V>());
            o = o + part.template load<T>(x);
        }
        part.template store<T>(y, o);
    }
};

template <class V, DType dtype>
void decompress(const DecompressParams& p) {
#ifdef VARIATOR_BF16_PRODUCTS
    if constexpr (dtype == DType::bf16) {
        DecompressForward<V, dtype, Pairs, Storage<V, DType::bf16>> forward{p};
        return for_chunks<V>(p.groups.count, p.threads,
                             [&](int64_t first, int64_t last, int) { forward.chunk(first, last); });
    }
#endif
    DecompressForward<V, dtype, Plain<V>, Acc<V>> forward{p};
    for_chunks<V>(p.groups.count, p.threads,
                  [&](int64_t first, int64_t last, int) { forward.chunk(first, last); });
}

}  // namespace VARIATOR_ISA
}  // namespace variator
