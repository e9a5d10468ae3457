// What the products of gemm.h are made of.
#pragma once

#include <type_traits>

#include "params.h"

namespace variator {
namespace VARIATOR_ISA {

template <class V>
constexpr int64_t panel_columns() {
    return V::width * V::tile_vectors;
}

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

struct Nothing {
    void operator()() const {}
};

// What a product is made of: `Element` of A, `Packed` of B, `step` inner steps at a time; `Session`
// lives while such products run on a thread. Those in `tiles` read whole blocks of 16 rows of A.
//
// Products of acc elements, one inner step at a time.
template <class V>
struct Plain {
    using Session = Nothing;
    static constexpr bool tiles = false;
    using Element = typename V::Scalar;
    using Packed = Element;
    static constexpr int step = 1;
    static inline __attribute__((always_inline)) V multiply_add(V sum, const Element* a, V b) {
        return V::fma(V::set(*a), b, sum);
    }
    static V load(const Element* b) { return V::load(b); }
};

// A of a product: rows at a fixed distance, elements of a row `inner_stride` apart.
template <class E>
struct Strided {
    const E* data;
    int64_t row_stride, inner_stride;
    const E* row(int64_t m) const { return data + m * row_stride; }
};
template <class E>
Strided(E*, int64_t, int64_t) -> Strided<std::remove_const_t<E>>;
// A of a product: each row where it happens to be.
template <class E>
struct RowList {
    const E* const* rows;
    static constexpr int64_t inner_stride = 1;
    const E* row(int64_t m) const { return rows[m]; }
};

// B of a product: `ld` elements from one inner step to the next, or 0 for packed panels.
template <class E>
struct Operand {
    const E* data;
    int64_t ld;
};

#ifdef VARIATOR_BF16_PRODUCTS
// Products of bf16 pairs with fp32 sums.
struct Pairs {
    using Session = Nothing;
    static constexpr bool tiles = false;
    using Element = uint16_t;
    using Packed = Element;
    static constexpr int step = 2;
    struct Loaded {
        const uint16_t* b;
    };
    static inline __attribute__((always_inline)) Vec multiply_add(Vec sum, const Element* a,
                                                                  Loaded b) {
        return dot_pairs(sum, a, b.b);
    }
    static Loaded load(const Element* b) { return {b}; }
};
#endif

}  // namespace VARIATOR_ISA
}  // namespace variator
