// Products with weights of int8, and rows that are quantised to uint8 on the way.
//
// Where a processor multiplies quadruples of uint8 and int8 only by way of sums of two products in
// int16, which saturate, weights have 7 bits, so that none does.
#pragma once

#include "ffn_activation.h"
#include "row_norm.h"
#include "rows_split.h"

namespace variator {
namespace VARIATOR_ISA {

struct Int8Quads {
    using Session = Nothing;
    static constexpr bool tiles = false;
    using Element = uint8_t;
    using Packed = int8_t;
    static constexpr int step = 4;
    static IntVec load(const int8_t* b) { return IntVec::load(b); }
    static inline __attribute__((always_inline)) IntVec multiply_add(IntVec sum, const uint8_t* a,
                                                                     IntVec b) {
        int32_t quad;
        __builtin_memcpy(&quad, a, sizeof quad);
        return IntVec::add_products(sum, IntVec::set(quad), b);
    }
};

#ifdef VARIATOR_TILES
using Int8Operands = TileQuads;
#else
using Int8Operands = Int8Quads;
#endif

// Panels as gemm.h has them, [inner / 4][columns][4], zeros beyond the weight.
inline int64_t int8_packed_bytes(const Int8PackParams& p) {
    return round_up(p.columns, IntVec::width) * round_up(p.inner, Int8Operands::step);
}
inline void int8_pack(const Int8PackParams& p) {
    constexpr int step = Int8Quads::step;
    const int64_t columns = round_up(p.columns, IntVec::width);
    const int64_t inner = round_up(p.inner, Int8Operands::step);
    for (int64_t c = 0; c < columns; ++c) {
        const int64_t first = c / panel_columns<IntVec>() * panel_columns<IntVec>();
        const int64_t width = smaller(panel_columns<IntVec>(), columns - first);
        int8_t* out = p.packed + first * inner + (c - first) * step;
        for (int64_t i = 0; i < inner; ++i) {
            const bool inside = c < p.columns && i < p.inner;
            out[i / step * width * step + i % step] =
                inside ? p.source[c * p.inner + i] : int8_t{0};
        }
    }
}

// How far numbers reach from 0, and 0, or NaN where one of them is no number.
struct Reach {
    Vec top = Vec::zero(), bottom = Vec::zero(), nothing = Vec::zero();
    inline __attribute__((always_inline)) void add(Vec v) {
        top = Vec::maximum(top, v);
        bottom = Vec::maximum(bottom, Vec::zero() - v);
        nothing = Vec::fma(v, Vec::zero(), nothing);
    }
    void join(const Reach& other) {
        top = Vec::maximum(top, other.top);
        bottom = Vec::maximum(bottom, other.bottom);
        nothing = nothing + other.nothing;
    }
};

template <DType dtype>
struct Int8Product {
    using T = Storage<Vec, dtype>;
    using Element = typename T::Element;
    const Int8LinearParams& p;
    const int64_t inner = round_up(p.inner, Int8Operands::step);
    const int64_t padded = apart<Int8Operands>(round_up(p.inner, Vec::width));

    // A quantised row: x is scale * (q - zero).
    struct Scale {
        float scale;
        int32_t zero;
    };

    // Row `m` of x, through the norm if there is one, by way of `normed`.
    Scale row(int64_t m, float* normed, uint8_t* quantised) const {
        const Element* x = static_cast<const Element*>(p.x) + m * p.x_stride;
        if (p.norm == Norm::none) return quantise<T>(x, quantised);
        const auto s = statistics<Vec, dtype>(x, p.inner, p.norm, p.eps);
        normed_row<Vec, dtype, Acc<Vec>>(x, p.inner, p.inner, s, p.norm_weight, p.norm_bias,
                                         normed);
        return quantise<Acc<Vec>>(normed, quantised);
    }

    // NaN, which makes the whole row of y NaN, is the scale where x holds NaN or infinity. A row
    // too small for fp32 to divide by counts as zeros.
    template <class From>
    Scale quantise(const typename From::Element* x, uint8_t* quantised) const {
        constexpr int lanes = 4;  // or each step would wait for the one before
        Reach reach[lanes];
        int64_t i = 0;
        for (; i + lanes * Vec::width <= p.inner; i += lanes * Vec::width)
#pragma GCC unroll 4
            for (int n = 0; n < lanes; ++n) reach[n].add(From::load(x + i + n * Vec::width));
        for_parts<Vec>(p.inner - i,
                       [&](Part<Vec> part) { reach[0].add(part.template load<From>(x + i)); });
        for (int n = 1; n < lanes; ++n) reach[0].join(reach[n]);
        const float least = reach[0].bottom.largest(), range = reach[0].top.largest() + least;
        const float poison = reach[0].nothing.sum();
        if (!(range > 1e-30f) || poison != 0) {
            zero_row<Vec>(quantised, padded);
            return {poison, 0};
        }
        const float factor = 255 / range;
        const int32_t zero = static_cast<int32_t>(__builtin_lrintf(least * factor));
        for_parts<Vec>(p.inner, [&](Part<Vec> part) {
            const Vec v = part.template load<From>(x) * Vec::set(factor);
            v.store_uint8(quantised + part.at, zero);
        });
        return {range / 255, zero};
    }

    // Columns from `n` on of row `m`, of which `sums` are the products.
    template <Activation activation>
    inline __attribute__((always_inline)) void finish(int64_t m, Scale row, int64_t n,
                                                      int64_t columns, const int32_t* sums) const {
        const int64_t start = m * p.columns + n;
        Element* y = static_cast<Element*>(p.y) + start;
        const auto at = [=](const void* given) {
            return given ? static_cast<const Element*>(given) + start : nullptr;
        };
        const Element *other = at(p.other), *residual = at(p.residual);
        const Vec scale = Vec::set(row.scale);
        const IntVec zero = IntVec::set(row.zero);
        for_parts<Vec>(columns, [&](Part<Vec> part) {
            const Vec factor = scale * Vec::load(p.scales + n + part.at);
            const Vec shift = p.bias ? Vec::load(p.bias + n + part.at) : Vec::zero();
            const IntVec sum =
                IntVec::load(sums + part.at) - zero * IntVec::load(p.sums + n + part.at);
            Vec v = activate<activation>(Vec::fma(sum.to_float(), factor, shift));
            if (other) v = v * part.template load<T>(other);
            if (residual) v = v + part.template load<T>(residual);
            part.template store<T>(y, v);
        });
    }

    // Panels first_panel .. last_panel - 1 of some rows.
    void run(int64_t first, int64_t rows, PanelRange panels, uint8_t* quantised, Scale* row_scales,
             int32_t* sums, float* normed) const {
        for (int64_t m = 0; m < rows; ++m)
            row_scales[m] = row(first + m, normed, quantised + m * padded);
        const auto multiply = [&](auto activation) {
            panel_blocks<Int8Operands, IntVec>(
                Strided{static_cast<const uint8_t*>(quantised), padded, int64_t{1}}, rows, inner,
                p.packed, p.columns, panels, sums,
                [&](int64_t m, int64_t n, int64_t columns, const int32_t* of) {
                    finish<decltype(activation)::value>(first + m, row_scales[m], n, columns, of);
                });
        };
        with_activation(p.activation, multiply);
    }

    // Rows worked on together stay quantised in the second-level cache while the weights pass.
    void all() const {
        const auto split =
            RowsSplit::of<Int8Operands, IntVec>(p.rows, p.columns, padded, 262144, p.threads);
        Carver carver;
        const int64_t at = carver.reserve<uint8_t>(split.size * padded);
        const int64_t scales_at = carver.reserve<Scale>(split.size);
        const int64_t sums_at = carver.reserve<int32_t>(sums_of_blocks<Int8Operands, IntVec>);
        const int64_t normed_at = carver.reserve<float>(p.norm == Norm::none ? 0 : p.inner);
        split.each(p.threads, [&](int64_t first, int64_t rows, PanelRange panels) {
            char* scratch = static_cast<char*>(thread_scratch(carver.bytes));
            run(first, rows, panels, reinterpret_cast<uint8_t*>(scratch + at),
                reinterpret_cast<Scale*>(scratch + scales_at),
                reinterpret_cast<int32_t*>(scratch + sums_at),
                reinterpret_cast<float*>(scratch + normed_at));
        });
    }
};

inline void int8_linear(const Int8LinearParams& p) {
    if (p.rows == 0) return;
    switch (p.dtype) {
        case DType::float32:
            return Int8Product<DType::float32>{p}.all();
        case DType::bfloat16:
            return Int8Product<DType::bfloat16>{p}.all();
        case DType::float16:
            return Int8Product<DType::float16>{p}.all();
        case DType::float64:
            return;  // refused in bindings.cpp
    }
}

}  // namespace VARIATOR_ISA
}  // namespace variator
