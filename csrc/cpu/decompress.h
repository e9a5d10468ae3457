// adapter_decompress: y = residual + u + W_2 φ(W_1u u + W_1h h + b_1) + b_2, one write of y; of a
// kept group y = residual + u.
#pragma once

#include "adapter_activation.h"
#include "gemm.h"
#include "group_chunks.h"
#include "row_norm.h"
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

// work(token) over the tokens that exist in a group, in order.
template <class F>
void for_tokens(const Groups& groups, int64_t g, F work) {
    for (int64_t j = 0; j < smaller(groups.k, groups.span[g]); ++j)
        if (groups.has(g, j)) work(groups.start[g] + j);
}

// work(block) over the tokens of groups first..last-1 that the adapter restores, in order;
// whole(token, group) over those that stay whole.
template <class F, class G>
void for_token_blocks(const Groups& groups, int64_t first, int64_t last, F work, G whole) {
    TokenBlock block;
    for (int64_t g = first; g < last; ++g) {
        if (groups.whole(g)) {
            for_tokens(groups, g, [&](int64_t token) { whole(token, g); });
            continue;
        }
        for_tokens(groups, g, [&](int64_t token) {
            block.token[block.count] = token;
            block.group[block.count] = g;
            if (++block.count == block_tokens) {
                work(block);
                block.count = 0;
            }
        });
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

// Rows first.. of u in scratch [rows, padded], as the products read them.
template <class V, DType dtype, class Out>
void copy_rows(const void* u, int64_t first, int64_t rows, int64_t d, int64_t padded,
               typename Out::Element* out) {
    const auto* source = static_cast<const typename Storage<V, dtype>::Element*>(u) + first * d;
    for (int64_t m = 0; m < rows; ++m)
        normed_row<V, dtype, Out>(source + m * d, d, padded, {0, 1}, nullptr, nullptr,
                                  out + m * padded);
}

// q [rows, ldq] = W_1u u + b_1 for the rows `u` of some groups.
template <class V, class Products>
void group_half(Strided<typename Products::Element> u, int64_t rows, int64_t d, int64_t r,
                const void* packed, const void* b1, typename V::Scalar* q, int64_t ldq) {
    using S = typename V::Scalar;
    product<Products, V>(u, rows, {static_cast<const typename Products::Element*>(packed), 0}, ldq,
                         q, ldq, round_up(d, Products::step), false);
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t i = 0; i < r; ++i) q[m * ldq + i] += static_cast<const S*>(b1)[i];
}

// Fetches the rows of residual and y that the next block of tokens will want, some lines at a time,
// while the products of this one leave the path to memory idle.
template <class E>
struct RowsAfter {
    const DecompressParams& p;
    const TokenBlock& block;
    int64_t lines;  // a call
    int64_t token = 0, at = 0;

    void operator()() {
        constexpr int64_t line = 64 / sizeof(E);
        for (int64_t n = 0; n < lines && token < block.count; ++n) {
            // Usually the token that follows; where it is not, a hint is wasted.
            const int64_t next = block.token[token] + block_tokens;
            __builtin_prefetch(static_cast<const E*>(p.y) + next * p.d + at, 1, 2);
            if (p.residual)
                __builtin_prefetch(
                    static_cast<const E*>(p.residual) + next * p.residual_stride + at, 0, 2);
            if ((at += line) >= p.d) at = 0, ++token;
        }
    }
};

template <class V, DType dtype, class Products, class Out>
struct DecompressForward {
    using S = typename V::Scalar;
    using T = Storage<V, dtype>;
    using E = typename T::Element;
    using Operated = typename Products::Element;
    const DecompressParams& p;
    const int64_t padded = apart<Products>(round_up(p.d, larger(V::width, Products::step)));
    const int64_t bottleneck = round_up(p.r, larger(V::width, Products::step));
    const int64_t halves = round_up(p.r, V::width);  // columns of q
    const int64_t inner = round_up(p.r, Products::step);
    const int64_t columns = round_up(p.d, V::width);
    const bool in_place =
        std::is_same_v<E, Operated> && !Products::tiles && p.d % Products::step == 0;
    // A row's lines among the tiles of its panels.
    const int64_t lines_after =
        tile_height<Products, V>() * panel_columns<V>() * int64_t{sizeof(E)} / 64 + 1;

    void chunk(int64_t first, int64_t last) const {
        const int64_t rows = last - first;
        Carver carver;
        const int64_t u_at = carver.reserve<Operated>((in_place ? 0 : read_rows<Products>(rows)) *
                                                      padded),
                      q_at = carver.reserve<S>(rows * halves),
                      t_at = carver.reserve<Operated>(block_tokens * bottleneck),
                      shared_at = carver.reserve<S>(rows * padded);
        char* base = static_cast<char*>(thread_scratch(carver.bytes));
        auto* q = reinterpret_cast<S*>(base + q_at);
        auto* t = reinterpret_cast<Operated*>(base + t_at);
        auto* shared = reinterpret_cast<S*>(base + shared_at);
        [[maybe_unused]] const typename Products::Session session;
        for (int64_t m = 0; m < rows; ++m) shared_row(first + m, shared + m * padded);
        Strided<Operated> u{reinterpret_cast<Operated*>(base + u_at), padded, 1};
        if constexpr (std::is_same_v<E, Operated>)
            if (in_place) u = {static_cast<const E*>(p.u) + first * p.d, p.d, 1};
        if (!in_place)
            copy_rows<V, dtype, Out>(p.u, first, rows, p.d, padded,
                                     reinterpret_cast<Operated*>(base + u_at));
        group_half<V, Products>(u, rows, p.d, p.r, p.w1u_packed, p.b1, q, halves);
        auto restore = [&](const TokenBlock& block) {
            for (int64_t i = 0; i < block.count; ++i)
                bottleneck_row<V, Out>(static_cast<const S*>(p.projected) + block.token[i] * p.r,
                                       q + (block.group[i] - first) * halves, p.r, bottleneck,
                                       p.phi, t + i * bottleneck);
            RowsAfter<E> after{p, block, lines_after};
            for (int64_t n = 0; n < columns; n += panel_columns<V>()) {
                const int64_t width = smaller(panel_columns<V>(), columns - n);
                panel_product<Products, V>(
                    Strided{t, bottleneck, 1}, block.count, 0, inner,
                    static_cast<const Operated*>(p.w2_packed) + n * inner, width * Products::step,
                    width,
                    [&](int64_t row) {
                        const int64_t group = block.group[row] - first;
                        return row_of_y(block.token[row], n, shared + group * padded + n);
                    },
                    after);
            }
        };
        for_token_blocks(p.groups, first, last, restore,
                         [&](int64_t token, int64_t group) { whole_row(token, group); });
    }

    V poison_of(int64_t group) const {
        return V::set(p.poison ? static_cast<const S*>(p.poison)[group] : S(0));
    }

    // u + b_2, what all tokens of a group have in common.
    void shared_row(int64_t group, S* out) const {
        const V poison = poison_of(group);
        for_parts<V>(p.d, [&](Part<V> part) {
            part.template store<Acc<V>>(
                out, part.template load<T>(static_cast<const E*>(p.u) + group * p.d) +
                         part.template load<Acc<V>>(static_cast<const S*>(p.b2)) + poison);
        });
    }

    // y of a token that stays whole.
    void whole_row(int64_t token, int64_t group) const {
        const V poison = poison_of(group);
        const E* u = static_cast<const E*>(p.u) + group * p.d;
        const E* x = static_cast<const E*>(p.residual);
        if (x) x += token * p.residual_stride;
        E* y = static_cast<E*>(p.y) + token * p.d;
        for_parts<V>(p.d, [&](Part<V> part) {
            V o = part.template load<T>(u) + poison;
            if (x) o = o + part.template load<T>(x);
            part.template store<T>(y, o);
        });
    }

    // Takes W_2 t and writes y, from column `at` of a token on; `common` is u + b_2 from there on.
    auto row_of_y(int64_t token, int64_t at, const S* common) const {
        E* y = static_cast<E*>(p.y) + token * p.d + at;
        const E* x = static_cast<const E*>(p.residual);
        if (x) x += token * p.residual_stride + at;
        const int64_t left = p.d - at;
        return [=](int64_t column, V delta) {
            const Part<V> part{column, static_cast<int>(smaller(V::width, left - column))};
            V o = delta + V::load(common + column);
            if (x) o = o + part.template load<T>(x);
            part.template store<T>(y, o);
        };
    }
};

template <class V, DType dtype>
void decompress(const DecompressParams& p) {
#ifdef VARIATOR_BF16_PRODUCTS
    if constexpr (dtype == DType::bfloat16) {
        DecompressForward<V, dtype, BestPairs, Storage<V, DType::bfloat16>> forward{p};
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
