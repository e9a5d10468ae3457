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
                      base_at = carver.reserve<S>(rows * padded),
                      c_at = carver.reserve<S>(block_tokens * panel_columns<V>());
        char* base = static_cast<char*>(thread_scratch(carver.bytes));
        auto* q = reinterpret_cast<S*>(base + q_at);
        auto* t = reinterpret_cast<Operated*>(base + t_at);
        auto* sums = reinterpret_cast<S*>(base + c_at);
        auto* shared = reinterpret_cast<S*>(base + base_at);
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
                                           width * Products::step, width, sums, width, inner,
                                           false);
                for (int64_t i = 0; i < block.count; ++i)
                    write(block.token[i], n, smaller(width, p.d - n), sums + i * width,
                          shared + (block.group[i] - first) * padded + n);
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

    // One token's piece of y, `count` columns from `at` on. The next piece of the row is fetched
    // ahead: pieces of a row are a block apart in time, which hides them from the hardware.
    void write(int64_t token, int64_t at, int64_t count, const S* delta, const S* shared) const {
        E* y = static_cast<E*>(p.y) + token * p.d + at;
        constexpr int64_t line = 64 / sizeof(E);
        for (int64_t i = 0; i < panel_columns<V>(); i += line)
            __builtin_prefetch(y + panel_columns<V>() + i, 1);
        if (!p.residual) {
            for_parts<V>(count, [&](Part<V> part) {
                part.template store<T>(
                    y, part.template load<Acc<V>>(delta) + part.template load<Acc<V>>(shared));
            });
            return;
        }
        const E* x = static_cast<const E*>(p.residual) + token * p.residual_stride + at;
        for (int64_t i = 0; i < panel_columns<V>(); i += line)
            __builtin_prefetch(x + panel_columns<V>() + i);
        for_parts<V>(count, [&](Part<V> part) {
            V o = part.template load<Acc<V>>(delta) + part.template load<Acc<V>>(shared);
            part.template store<T>(y, o + part.template load<T>(x));
        });
    }
};

template <class V, DType dtype>
void decompress(const DecompressParams& p) {
#ifdef VARIATOR_BF16_PRODUCTS
    if constexpr (dtype == DType::bf16) {
        DecompressForward<V, dtype, Pairs, Storage<V, DType::bf16>> forward{p};
        return for_chunks(p.groups.count, p.threads,
                          [&](int64_t first, int64_t last, int) { forward.chunk(first, last); });
    }
#endif
    DecompressForward<V, dtype, Plain<V>, Acc<V>> forward{p};
    for_chunks(p.groups.count, p.threads,
               [&](int64_t first, int64_t last, int) { forward.chunk(first, last); });
}

}  // namespace VARIATOR_ISA
}  // namespace variator
