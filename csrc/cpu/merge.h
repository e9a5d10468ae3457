// group_merge: norm, scores, softmax, weighted sum and W_1h h, with one trip of x into cache.
#pragma once

#include "gemm.h"
#include "group_chunks.h"
#include "row_norm.h"
#include "scratch.h"

namespace variator {
namespace VARIATOR_ISA {

// Softmax over the slots that exist, in place; the others get 0.
template <class S>
void masked_softmax(S* scores, const S* bias, const Groups& groups, int64_t group) {
    const int64_t k = groups.k;
    S top = 0;
    bool any = false;
    for (int64_t j = 0; j < k; ++j) {
        if (!groups.has(group, j)) continue;
        scores[j] += bias[j];
        // Not `if (scores[j] > top)`: a NaN must win.
        if (!any || !(scores[j] <= top)) top = scores[j];
        any = true;
    }
    S sum = 0;
    for (int64_t j = 0; j < k; ++j) {
        scores[j] = groups.has(group, j) ? exponential(scores[j] - top) : S(0);
        sum += scores[j];
    }
    if (any)
        for (int64_t j = 0; j < k; ++j) scores[j] /= sum;
}

template <class S>
S sum_of(const S* values, int64_t n) {
    S sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += values[i];
    return sum;
}

// g = Σ_j a_j h_j for one group, from x and its rows' statistics.
template <class V, DType dtype>
void weighted_sum(const MergeParams& p, int64_t group, const typename V::Scalar* a,
                  const Statistics<typename V::Scalar>* stats,
                  const typename Storage<V, dtype>::Element** rows, typename V::Scalar* factors,
                  typename V::Scalar* means) {
    using S = typename V::Scalar;
    using T = Storage<V, dtype>;
    using E = typename T::Element;
    E* out = static_cast<E*>(p.merged) + group * p.d;
    const S* weight = static_cast<const S*>(p.norm_weight);
    const S* bias = static_cast<const S*>(p.norm_bias);
    const bool centred = p.norm == Norm::layer;
    int64_t count = 0;
    for (int64_t j = 0; j < p.groups.k; ++j) {
        if (!p.groups.has(group, j)) continue;  // never 0 · x: an absent row may hold NaN
        rows[count] = static_cast<const E*>(p.x) + (p.groups.start[group] + j) * p.x_stride;
        factors[count] = a[j] * stats[j].rstd;
        means[count] = stats[j].mean;
        ++count;
    }
    if (count == 0) return zero_row<V>(out, p.d);
    auto finish = [&](Part<V> part, V g) {
        if (weight) g = g * part.template load<Acc<V>>(weight);
        if (bias) g = g + part.template load<Acc<V>>(bias);
        part.template store<T>(out, g);
    };
    int64_t i = 0;
    for (; i + 4 * V::width <= p.d; i += 4 * V::width) {
        V g[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
        for (int64_t j = 0; j < count; ++j) {
            const V factor = V::set(factors[j]);
            // Centred before the sum: taking a large mean off the sum would cancel.
            const V mean = V::set(centred ? means[j] : S(0));
#pragma GCC unroll 4
            for (int n = 0; n < 4; ++n)
                g[n] = V::fma(factor, T::load(rows[j] + i + n * V::width) - mean, g[n]);
        }
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) finish(Part<V>{i + n * V::width, V::width}, g[n]);
    }
    for_parts<V>(p.d - i, [&](Part<V> part) {
        part.at += i;
        V g = V::zero();
        for (int64_t j = 0; j < count; ++j)
            g = V::fma(V::set(factors[j]),
                       part.template load<T>(rows[j]) - V::set(centred ? means[j] : S(0)), g);
        finish(part, g);
    });
}

// scores[i] += factor * W_c[i] · row for K scores; rows of W_c are ld apart, `row` is of type T.
template <class V, class T, int K>
void add_scores(const typename T::Element* row, int64_t d, typename V::Scalar factor,
                const typename V::Scalar* merge, int64_t ld, typename V::Scalar* scores) {
    V sums[K];
#pragma GCC unroll 8
    for (int i = 0; i < K; ++i) sums[i] = V::zero();
    for_parts<V>(d, [&](Part<V> part) {
        const V value = part.template load<T>(row);
#pragma GCC unroll 8
        for (int i = 0; i < K; ++i)
            sums[i] = V::fma(value, part.template load<Acc<V>>(merge + i * ld), sums[i]);
    });
#pragma GCC unroll 8
    for (int i = 0; i < K; ++i) scores[i] += factor * sums[i].sum();
}

// Fetches the rows of one slot of a chunk into the second-level cache, some lines at a time: a
// product over one slot hides the way to memory of the next.
template <class E>
struct RowsAhead {
    const MergeParams& p;
    int64_t slot, group, end;
    int64_t lines;  // a call
    int64_t at = 0;

    void operator()() {
        constexpr int64_t line = 64 / sizeof(E);
        for (int64_t n = 0; n < lines && group < end; ++n) {
            if (slot < p.groups.span[group])
                __builtin_prefetch(
                    static_cast<const E*>(p.x) + (p.groups.start[group] + slot) * p.x_stride + at,
                    0, 2);
            if ((at += line) >= p.d) at = 0, ++group;
        }
    }
};

// Products is Plain<V> on acc elements, or BestPairs on bf16 ones; Out stores what it multiplies.
//
// With a folded norm (see MergeParams) scores and projection come from the rows of x where they
// lie, and what a row's norm multiplies it by is applied to the few sums. Rows that the products
// cannot read (storage other than what they
// multiply, an odd d with pairs), and all rows of a norm that is not folded, go through
// scratch.
template <class V, DType dtype, class Products, class Out>
struct MergeForward {
    using S = typename V::Scalar;
    using E = typename Storage<V, dtype>::Element;
    using Operated = typename Products::Element;
    const MergeParams& p;
    const int64_t padded = apart<Products>(round_up(p.d, larger(V::width, Products::step)));
    const int64_t inner = round_up(p.d, Products::step);
    const int64_t scores_columns = round_up(p.groups.k, V::width);
    const int64_t projected_columns = round_up(p.r, V::width);
    const bool direct = p.groups.k <= direct_scores;
    const bool in_place =
        p.folded && std::is_same_v<E, Operated> && !Products::tiles && p.d % Products::step == 0;
    // A row's lines among the tiles of its product.
    const int64_t lines_ahead =
        tile_height<Products, V>() * (p.d * int64_t{sizeof(E)} / 64 + 1) /
            larger(1, (inner + inner_block<Products, V>() - 1) / inner_block<Products, V>() *
                          ((projected_columns + panel_columns<V>() - 1) / panel_columns<V>())) +
        1;

    void chunk(int64_t first, int64_t last) const {
        const int64_t k = p.groups.k, rows = last - first;
        Carver carver;
        const int64_t h_at = carver.reserve<Operated>((in_place ? 0 : read_rows<Products>(rows)) *
                                                      padded),
                      zeros_at = carver.reserve<Operated>(padded),
                      a_at = carver.reserve<const Operated*>(rows),
                      scale_at = carver.reserve<S>(rows),
                      s_at = carver.reserve<S>(rows * scores_columns),
                      t_at = carver.reserve<S>(rows * projected_columns),
                      stats_at = carver.reserve<Statistics<S>>(rows * k),
                      rows_at = carver.reserve<const E*>(k), factors_at = carver.reserve<S>(2 * k);
        char* base = static_cast<char*>(thread_scratch(carver.bytes));
        auto* h = reinterpret_cast<Operated*>(base + h_at);
        auto* zeros = reinterpret_cast<Operated*>(base + zeros_at);
        auto* a = reinterpret_cast<const Operated**>(base + a_at);
        auto* scale = reinterpret_cast<S*>(base + scale_at);
        auto* scores = reinterpret_cast<S*>(base + s_at);
        auto* tile = reinterpret_cast<S*>(base + t_at);
        auto* stats = reinterpret_cast<Statistics<S>*>(base + stats_at);

        [[maybe_unused]] const typename Products::Session session;
        zero_row<V>(zeros, padded);
        if (direct) zero_row<V>(scores, rows * scores_columns);
        for (int64_t j = 0; j < k; ++j) {
            for (int64_t m = 0; m < rows; ++m) {
                a[m] = zeros, scale[m] = 0;
                if (!p.groups.has(first + m, j)) {
                    if (Products::tiles) zero_row<V>(h + m * padded, padded);
                    continue;
                }
                const E* x = row_of_x(first + m, j);
                stats[m * k + j] = statistics<V, dtype>(x, p.d, p.norm, p.eps);
                a[m] = operand(x, stats[m * k + j], h + m * padded);
                scale[m] = p.folded ? stats[m * k + j].rstd : S(1);
                if (direct) score(a[m], j, scale[m], scores + m * scores_columns);
            }
            const auto list = rows_of(a, h);
            if (!direct)
                product<Products, V>(
                    list, rows,
                    {static_cast<const Operated*>(p.merge_weight) + j * scores_columns * inner, 0},
                    scores_columns, scores, scores_columns, inner, j > 0, scale);
            if (!p.projected) continue;
            const bool more = j + 1 < k;
            product<Products, V>(
                list, rows, {static_cast<const Operated*>(p.projection_packed), 0},
                projected_columns, tile, projected_columns, inner, false, scale,
                RowsAhead<E>{p, more ? j + 1 : 0, more ? first : last,
                             more ? last : smaller(last + rows, p.groups.count), lines_ahead});
            for (int64_t m = 0; m < rows; ++m) {
                if (!p.groups.has(first + m, j)) continue;
                S* out = static_cast<S*>(p.projected) + (p.groups.start[first + m] + j) * p.r;
                __builtin_memcpy(out, tile + m * projected_columns, p.r * sizeof(S));
            }
        }
        for (int64_t m = 0; m < rows; ++m) {
            S* weights = scores + m * scores_columns;
            masked_softmax(weights, static_cast<const S*>(p.merge_bias), p.groups, first + m);
            if (p.softmax)
                __builtin_memcpy(static_cast<S*>(p.softmax) + (first + m) * k, weights,
                                 k * sizeof(S));
            if (p.poison) static_cast<S*>(p.poison)[first + m] = sum_of(weights, k) * S(0);
            weighted_sum<V, dtype>(p, first + m, weights, stats + m * k,
                                   reinterpret_cast<const E**>(base + rows_at),
                                   reinterpret_cast<S*>(base + factors_at),
                                   reinterpret_cast<S*>(base + factors_at) + k);
        }
    }

    // What the products read: rows of x among others, or all of them in `h`.
    auto rows_of(const Operated** a, const Operated* h) const {
        if constexpr (Products::tiles)
            return Strided<Operated>{h, padded, 1};
        else
            return RowList<Operated>{a};
    }

    const E* row_of_x(int64_t group, int64_t slot) const {
        return static_cast<const E*>(p.x) + (p.groups.start[group] + slot) * p.x_stride;
    }

    // The row that the products read: x itself, or what `h` is given.
    const Operated* operand(const E* x, Statistics<S> stats, Operated* h) const {
        if constexpr (std::is_same_v<E, Operated>)
            if (in_place) return x;
        if (p.folded)
            normed_row<V, dtype, Out>(x, p.d, padded, {0, 1}, nullptr, nullptr, h);
        else
            normed_row<V, dtype, Out>(x, p.d, padded, stats, static_cast<const S*>(p.norm_weight),
                                      static_cast<const S*>(p.norm_bias), h);
        return h;
    }

    void score(const Operated* row, int64_t slot, S factor, S* scores) const {
        const S* merge = static_cast<const S*>(p.merge_weight) + slot * p.d;
        const int64_t ld = p.groups.k * p.d;
        static_assert(direct_scores == 8, "a case for each ratio");
#define VARIATOR_SCORES(K) \
    case K:                \
        return add_scores<V, Out, K>(row, p.d, factor, merge, ld, scores)
        switch (p.groups.k) {
            VARIATOR_SCORES(1);
            VARIATOR_SCORES(2);
            VARIATOR_SCORES(3);
            VARIATOR_SCORES(4);
            VARIATOR_SCORES(5);
            VARIATOR_SCORES(6);
            VARIATOR_SCORES(7);
            VARIATOR_SCORES(8);
        }
#undef VARIATOR_SCORES
    }
};

template <class V, DType dtype>
void merge(const MergeParams& p) {
#ifdef VARIATOR_BF16_PRODUCTS
    if constexpr (dtype == DType::bfloat16) {
        MergeForward<V, dtype, BestPairs, Storage<V, DType::bfloat16>> forward{p};
        return for_chunks<V>(p.groups.count, p.threads,
                             [&](int64_t first, int64_t last, int) { forward.chunk(first, last); });
    }
#endif
    MergeForward<V, dtype, Plain<V>, Acc<V>> forward{p};
    for_chunks<V>(p.groups.count, p.threads,
                  [&](int64_t first, int64_t last, int) { forward.chunk(first, last); });
}

}  // namespace VARIATOR_ISA
}  // namespace variator
