// Products of a few query vectors with keys and values where they lie, rows at any distance.
#pragma once

#include "attention_keys.h"

namespace variator {
namespace VARIATOR_ISA {

template <class V, DType dtype>
const typename Storage<V, dtype>::Element* vector_of(const HeadRows& t, int64_t row, int64_t token,
                                                     int64_t head) {
    return static_cast<const typename Storage<V, dtype>::Element*>(t.data) + row * t.row +
           token * t.token + head * t.head;
}

// Lane i: what combine() makes of the lanes of rows[i], for `count` = V::width rows. Fewer rows
// leave their partial results side by side, so that these vectors can be folded further.
template <int count, class V, class F>
inline __attribute__((always_inline)) V fold(V* rows, F combine) {
    if constexpr (count > 1) {
        constexpr int many = count / 2;
#pragma GCC unroll 8
        for (int i = 0; i < many; ++i) {
            V low, high;
            V::interleave(rows[i], rows[i + many], low, high);
            rows[i] = combine(low, high);
        }
        return fold<many>(rows, combine);
    }
    return rows[0];
}

// Rows of one head: the i-th is at data + list[i] * distance.
template <class E>
struct ListedRows {
    const E* data;
    const int64_t* list;
    int64_t distance;
    const E* row(int64_t i) const { return data + list[i] * distance; }
};

// scores[q][i] = queries[q] · keys[i] of `many` queries [width] and V::width keys from `first` on;
// queries hold zeros behind d.
template <class V, DType dtype, int many>
void row_dots(const typename V::Scalar* queries, int64_t width,
              const ListedRows<typename Storage<V, dtype>::Element>& keys, int64_t first, int64_t d,
              typename V::Scalar* scores, int64_t stride) {
    using T = Storage<V, dtype>;
    constexpr int together = V::tile_vectors, groups = V::width / together;
    static_assert(V::width % together == 0);
    const auto add = [](V a, V b) { return a + b; };
    V parts[many][groups];
#pragma GCC unroll 8
    for (int g = 0; g < groups; ++g) {
        const typename T::Element* key[together];
        V sum[many][together];
#pragma GCC unroll 4
        for (int j = 0; j < together; ++j) {
            key[j] = keys.row(first + g + j * groups);
#pragma GCC unroll 8
            for (int q = 0; q < many; ++q) sum[q][j] = V::zero();
        }
        const auto step = [&](int64_t at, auto load) {
            V k[together];
#pragma GCC unroll 4
            for (int j = 0; j < together; ++j) k[j] = load(key[j] + at);
#pragma GCC unroll 8
            for (int q = 0; q < many; ++q) {
                const V x = V::load(queries + q * width + at);
#pragma GCC unroll 4
                for (int j = 0; j < together; ++j) sum[q][j] = V::fma(x, k[j], sum[q][j]);
            }
        };
        int64_t at = 0;
        for (; at + V::width <= d; at += V::width)
            step(at, [](const typename T::Element* from) { return T::load(from); });
        const int left = static_cast<int>(d - at);
        if (left > 0)
            step(at, [=](const typename T::Element* from) { return T::load(from, left); });
#pragma GCC unroll 8
        for (int q = 0; q < many; ++q) parts[q][g] = fold<together>(sum[q], add);
    }
#pragma GCC unroll 8
    for (int q = 0; q < many; ++q) fold<groups>(parts[q], add).store(scores + q * stride);
}

// sums[q] += Σ_i weights[q][i] values[i] over `count` values, `vectors` vectors of each, or the
// `left` elements of a partial one.
template <class V, DType dtype, int many, int vectors, bool partial>
void row_sums(const typename V::Scalar* weights, int64_t stride,
              const ListedRows<typename Storage<V, dtype>::Element>& values, int64_t count,
              int left, typename V::Scalar* sums, int64_t width) {
    using T = Storage<V, dtype>;
    V sum[many][vectors];
#pragma GCC unroll 8
    for (int q = 0; q < many; ++q)
#pragma GCC unroll 4
        for (int n = 0; n < vectors; ++n) sum[q][n] = V::zero();
    for (int64_t i = 0; i < count; ++i) {
        const typename T::Element* from = values.row(i);
        V x[vectors];
#pragma GCC unroll 4
        for (int n = 0; n < vectors; ++n)
            x[n] = partial ? T::load(from, left) : T::load(from + n * V::width);
#pragma GCC unroll 8
        for (int q = 0; q < many; ++q) {
            const V weight = V::set(weights[q * stride + i]);
#pragma GCC unroll 4
            for (int n = 0; n < vectors; ++n) sum[q][n] = V::fma(weight, x[n], sum[q][n]);
        }
    }
#pragma GCC unroll 8
    for (int q = 0; q < many; ++q)
#pragma GCC unroll 4
        for (int n = 0; n < vectors; ++n) {
            typename V::Scalar* to = sums + q * width + n * V::width;
            (V::load(to) + sum[q][n]).store(to);
        }
}

// f(many) with `many`, of queries, known when it is compiled.
template <int value>
using Constant = std::integral_constant<int, value>;
template <class V, class F>
inline __attribute__((always_inline)) void with_constant(int64_t many, F f) {
#define VARIATOR_QUERIES(N)                                \
    case N:                                                \
        if constexpr (N <= V::tile_rows) f(Constant<N>{}); \
        break
    switch (many) {
        VARIATOR_QUERIES(1);
        VARIATOR_QUERIES(2);
        VARIATOR_QUERIES(3);
        VARIATOR_QUERIES(4);
        VARIATOR_QUERIES(5);
        VARIATOR_QUERIES(6);
    }
#undef VARIATOR_QUERIES
}

// scores [count][stride] of all `count` queries and of `columns` keys, a multiple of V::width.
template <class V, DType dtype>
void all_dots(const typename V::Scalar* queries, int64_t count, int64_t width,
              const ListedRows<typename Storage<V, dtype>::Element>& keys, int64_t columns,
              int64_t d, typename V::Scalar* scores, int64_t stride) {
    for (int64_t c = 0; c < columns; c += V::width)  // the keys stay in the first-level cache
        for (int64_t q = 0; q < count; q += V::tile_rows)
            with_constant<V>(smaller(V::tile_rows, count - q), [&](auto many) {
                row_dots<V, dtype, many.value>(queries + q * width, width, keys, c, d,
                                               scores + q * stride + c, stride);
            });
}

// sums [count][width] += weights [count][stride] · the first `rows` values.
template <class V, DType dtype>
void all_sums(const typename V::Scalar* weights, int64_t count, int64_t stride,
              ListedRows<typename Storage<V, dtype>::Element> values, int64_t rows, int64_t d,
              typename V::Scalar* sums, int64_t width) {
    const auto columns = [&](auto vectors, auto partial, int64_t at) {
        const auto part = values;
        for (int64_t q = 0; q < count; q += V::tile_rows)
            with_constant<V>(smaller(V::tile_rows, count - q), [&](auto many) {
                row_sums<V, dtype, many.value, vectors.value, partial.value != 0>(
                    weights + q * stride, stride, {part.data + at, part.list, part.distance}, rows,
                    static_cast<int>(d - at), sums + q * width + at, width);
            });
    };
    int64_t at = 0;
    constexpr int most = V::tile_vectors;
    for (; at + most * V::width <= d; at += most * V::width)
        columns(Constant<most>{}, Constant<0>{}, at);
    if constexpr (most > 2)
        if (at + 2 * V::width <= d) columns(Constant<2>{}, Constant<0>{}, at), at += 2 * V::width;
    if (at + V::width <= d) columns(Constant<1>{}, Constant<0>{}, at), at += V::width;
    if (at < d) columns(Constant<1>{}, Constant<1>{}, at);
}

}  // namespace VARIATOR_ISA
}  // namespace variator
