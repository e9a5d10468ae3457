// The two products of attention, and the panels they read: acc elements, or pairs of bf16 where the
// instruction set has products of them.
#pragma once

#include "attention_rows.h"

namespace variator {
namespace VARIATOR_ISA {

// Whether anybody sees key j: what an invisible one holds must not be read, it may be NaN.
template <class V>
bool seen(const AttentionParams& p, int64_t row, int64_t j) {
    using S = typename V::Scalar;
    if (j >= p.keys) return false;
    return !p.bias || static_cast<const S*>(p.bias)[row * p.keys + j] != -infinity<S>();
}

// One row in acc, zeros up to `padded`, and of a key that nobody sees (null).
template <class V, DType dtype>
void widen(const typename Storage<V, dtype>::Element* from, int64_t d, int64_t padded,
           typename V::Scalar* to) {
    if (from)
        for_parts<V>(d, [&](Part<V> part) {
            part.template store<Acc<V>>(to, part.template load<Storage<V, dtype>>(from));
        });
    for (int64_t i = from ? d : 0; i < padded; ++i) to[i] = 0;
}

// V::width rows of `words` become columns of a panel, out [words][columns].
template <class V>
void transpose(const typename V::Scalar* rows, int64_t stride, int64_t words,
               typename V::Scalar* out, int64_t columns) {
    for (int64_t at = 0; at < words; at += V::width) {
        V v[V::width], turned[V::width];
        for (int i = 0; i < V::width; ++i) v[i] = V::load(rows + i * stride + at);
        for (int round = 1; round < V::width; round *= 2) {
            for (int i = 0; i < V::width / 2; ++i)
                V::interleave(v[i], v[i + V::width / 2], turned[2 * i], turned[2 * i + 1]);
            for (int i = 0; i < V::width; ++i) v[i] = turned[i];
        }
        const int64_t many = smaller(V::width, words - at);
        for (int64_t i = 0; i < many; ++i) v[i].store(out + (at + i) * columns);
    }
}

// Into panels for q · kᵀ, inner dimension `words`, a column a key: V::width keys from j on, of rows
// of round_up(words, V::width).
template <class V>
void pack_keys(int64_t j, int64_t padded, int64_t words, const typename V::Scalar* rows,
               typename V::Scalar* packed) {
    const int64_t panel = j / panel_columns<V>() * panel_columns<V>();
    const int64_t columns = smaller(panel_columns<V>(), padded - panel);
    transpose<V>(rows, round_up(words, V::width), words, packed + panel * words + (j - panel),
                 columns);
}

// The vectors of one head in acc.
template <class V, DType dtype>
struct WideHead {
    using S = typename V::Scalar;
    using Row = const typename Storage<V, dtype>::Element*;
    const AttentionParams& p;
    const HeadRows& of;  // keys or values
    int64_t row, head, width;

    Row visible(int64_t j) const {
        return seen<V>(p, row, j) ? vector_of<V, dtype>(of, row, j, head) : nullptr;
    }
    // Keys j .. j + V::width - 1 into panels of `padded` keys; `staged`: [V::width][width]. Pads
    // repeat the last key: zeros times an infinite query would be NaN.
    void columns(int64_t j, int64_t padded, S* staged, S* panels) const {
        for (int64_t i = 0; i < V::width; ++i)
            widen<V, dtype>(visible(smaller(j + i, p.keys - 1)), p.d, width, staged + i * width);
        pack_keys<V>(j, padded, p.d, staged, panels);
    }
    // Key j as a row of its own; zeros where there is none.
    void row_of(int64_t j, S* rows) const {
        widen<V, dtype>(visible(j), p.d, width, rows + j * width);
    }
};

// Products of acc elements.
template <class V, DType dtype>
struct WideProducts {
    using S = typename V::Scalar;
    using Element = S;
    using Session = Nothing;
    static constexpr int64_t key_unit = V::width;
    static constexpr int64_t block = 8 * V::tile_rows, tile = 256, few = 32;
    static constexpr int64_t step = panel_columns<V>();  // a part of a tile may begin there
    const AttentionParams& p;
    int64_t padded = round_up(p.keys, key_unit), width = round_up(p.d, V::width);
    S *keys = nullptr, *values = nullptr, *queries = nullptr, *staged = nullptr;

    static void put(S* to, V value) { value.store(to); }
    static constexpr int64_t weights() { return block * tile; }
    void arrange(Arrays& arrays, int64_t blocks) {
        arrays.take(keys, padded * p.d);
        arrays.take(values, padded * width);
        arrays.take(queries, blocks * block * p.d);
        arrays.take(staged, V::width * width);
    }
    // False where only wider products give right results.
    bool pack(int64_t row, int64_t head) {
        const WideHead<V, dtype> k{p, p.k, row, head, width}, v{p, p.v, row, head, width};
        for (int64_t j = 0; j < padded; j += V::width) k.columns(j, padded, staged, keys);
        for (int64_t j = 0; j < padded; ++j) v.row_of(j, values);
        return true;
    }
    // Query `begin` and those that follow, as the at-th block.
    bool load_queries(int64_t row, int64_t head, int64_t begin, int64_t count, int64_t at) {
        for (int64_t i = 0; i < count; ++i)
            widen<V, dtype>(vector_of<V, dtype>(p.q, row, begin + i, head), p.d, p.d,
                            queries + (at * block + i) * p.d);
        return true;
    }
    void scores(int64_t at, int64_t count, int64_t first, int64_t columns, S* scores) const {
        product<Plain<V>, V>(Strided{queries + at * block * p.d, p.d, 1}, count,
                             Operand<S>{keys + first * p.d, 0}, columns, scores, tile, p.d, false);
    }
    void weighted(const S* weights, int64_t count, int64_t first, int64_t columns, S* sums) const {
        product<Plain<V>, V>(Strided{weights, tile, 1}, count,
                             Operand<S>{values + first * width, width}, width, sums, width, columns,
                             true);
    }
};

template <class V, DType dtype>
struct Multiply : WideProducts<V, dtype> {};

}  // namespace VARIATOR_ISA
}  // namespace variator
