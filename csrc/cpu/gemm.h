// Small matrix products on one thread, C [+]= A · B, for cache-sized operands.
//
// B comes as panels of `panel_columns` columns, or as plain rows in scratch memory. C and B are
// padded to whole vectors, so a tile never needs a mask. A is read by broadcasting one element (one
// bf16 pair) at a time, so its rows may lie anywhere (RowList), and it may be transposed (Strided).
#pragma once

#include "operands.h"
#include "tiles.h"

namespace variator {
namespace VARIATOR_ISA {

// sink(row) gives what takes a row's finished vectors, (column, sum) each, so a product's result
// can go where it is wanted without a trip through memory. It is asked once a row: what it returns
// holds the row's addresses in registers, which stores could otherwise seem to change.
template <class P, class V, int rows, int vectors, class A, class Sink>
inline __attribute__((always_inline)) void tile(const A& a, int64_t first_row, int64_t first_inner,
                                                int64_t inner, const typename P::Packed* b,
                                                int64_t ld, Sink& sink) {
    const typename P::Element* am[rows];
    V sum[rows][vectors];
#pragma GCC unroll 8
    for (int m = 0; m < rows; ++m) {
        am[m] = a.row(first_row + m) + first_inner * a.inner_stride;
#pragma GCC unroll 4
        for (int n = 0; n < vectors; ++n) sum[m][n] = V::zero();
    }
    for (int64_t k = 0; k < inner; k += P::step, b += ld) {
        const int64_t at = k * a.inner_stride;
#pragma GCC unroll 8
        for (int m = 0; m < rows; ++m)
#pragma GCC unroll 4
            for (int n = 0; n < vectors; ++n)
                sum[m][n] =
                    P::multiply_add(sum[m][n], am[m] + at, P::load(b + n * V::width * P::step));
    }
#pragma GCC unroll 8
    for (int m = 0; m < rows; ++m) {
        const auto put = sink(first_row + m);
#pragma GCC unroll 4
        for (int n = 0; n < vectors; ++n) put(int64_t{n} * V::width, sum[m][n]);
    }
}

// Part of A, from inner step `first` on, and of one panel of B, its columns a multiple of V::width
// and at most a tile's. meanwhile() runs before each tile and may use what a product leaves idle,
// the path to memory.
template <class P, class V, int vectors, class A, class Sink, class Meanwhile>
void panel_rows(const A& a, int64_t rows, int64_t first, int64_t inner, const typename P::Packed* b,
                int64_t ld, Sink& sink, Meanwhile& meanwhile) {
    if constexpr (P::tiles) {
        tile_rows<P, V, vectors>(a, rows, first, inner, b, sink, meanwhile);
    } else {
        for (int64_t m = 0; m < rows; m += V::tile_rows) {
            meanwhile();
#define VARIATOR_TILE(R)                                                                          \
    case R:                                                                                       \
        if constexpr (R <= V::tile_rows) tile<P, V, R, vectors>(a, m, first, inner, b, ld, sink); \
        break
            switch (smaller(V::tile_rows, rows - m)) {
                VARIATOR_TILE(1);
                VARIATOR_TILE(2);
                VARIATOR_TILE(3);
                VARIATOR_TILE(4);
                VARIATOR_TILE(5);
                VARIATOR_TILE(6);
            }
#undef VARIATOR_TILE
        }
    }
}

template <class P, class V, class A, class Sink, class Meanwhile>
void panel_product(const A& a, int64_t rows, int64_t first, int64_t inner,
                   const typename P::Packed* b, int64_t ld, int64_t columns, Sink sink,
                   Meanwhile& meanwhile) {
#define VARIATOR_VECTORS(N)                                                     \
    case N:                                                                     \
        if constexpr (N <= V::tile_vectors)                                     \
            panel_rows<P, V, N>(a, rows, first, inner, b, ld, sink, meanwhile); \
        break
    switch (columns / V::width) {
        VARIATOR_VECTORS(1);
        VARIATOR_VECTORS(2);
        VARIATOR_VECTORS(3);
        VARIATOR_VECTORS(4);
    }
#undef VARIATOR_VECTORS
}

// So much of a panel as stays in the first-level cache beside A and C.
template <class P, class V>
constexpr int64_t inner_block() {
    if (P::tiles) return int64_t{1} << 40;  // sums would have to be read again
    return 24576 / (panel_columns<V>() * sizeof(typename P::Packed)) / 2 * 2;
}

// C [rows, columns] [+]= factors · (A · B); columns a multiple of V::width, inner one of P::step;
// `factors` one a row, or null.
template <class P, class V, class A, class Meanwhile = Nothing>
void product(const A& a, int64_t rows, Operand<typename P::Packed> b, int64_t columns,
             typename V::Scalar* c, int64_t ldc, int64_t inner, bool add,
             const typename V::Scalar* factors = nullptr, Meanwhile meanwhile = {}) {
    using S = typename V::Scalar;
    if (inner == 0 && !add) {
        for (int64_t m = 0; m < rows; ++m)
            for (int64_t n = 0; n < columns; ++n) c[m * ldc + n] = 0;
        return;
    }
    constexpr int64_t block = inner_block<P, V>();
    for (int64_t k = 0; k < inner; k += block) {
        int64_t depth = smaller(block, inner - k);
        for (int64_t n = 0; n < columns; n += panel_columns<V>()) {
            int64_t width = smaller(panel_columns<V>(), columns - n);
            int64_t ld = b.ld ? b.ld * P::step : width * P::step;
            const typename P::Packed* panel = b.ld ? b.data + n * P::step : b.data + n * inner;
            const bool sums = add || k > 0;
            panel_product<P, V>(
                a, rows, k, depth, panel + k / P::step * ld, ld, width,
                [=](int64_t row) {
                    S* out = c + row * ldc + n;
                    const V factor = V::set(factors ? factors[row] : S(1));
                    return [=](int64_t column, V sum) {
                        // Added only now: partial sums of a block each round less than one long
                        // sum.
                        const V before = sums ? V::load(out + column) : V::zero();
                        V::fma(factor, sum, before).store(out + column);
                    };
                },
                meanwhile);
        }
    }
}

// The layout `product` reads: panels one after the other, each [inner / step][columns][step], the
// inner dimension a multiple of `unit`.
template <class V, class E, int step, int unit, class Convert>
void pack_panels(const PackParams& p, Convert convert) {
    using S = typename V::Scalar;
    const int64_t columns = round_up(p.columns, V::width), inner = round_up(p.inner, unit);
    for (int64_t m = 0; m < p.matrices; ++m) {
        const S* source = static_cast<const S*>(p.source) + m * p.matrix_stride;
        E* packed = static_cast<E*>(p.packed) + m * columns * inner;
        for (int64_t c = 0; c < columns; ++c) {
            int64_t first = c / panel_columns<V>() * panel_columns<V>();
            int64_t width = smaller(panel_columns<V>(), columns - first);
            E* out = packed + first * inner + (c - first) * step;
            for (int64_t i = 0; i < inner; ++i) {
                bool inside = c < p.columns && i < p.inner;
                out[i / step * width * step + i % step] =
                    convert(inside ? source[i * p.inner_stride + c * p.column_stride] : S(0));
            }
        }
    }
}

}  // namespace VARIATOR_ISA
}  // namespace variator
