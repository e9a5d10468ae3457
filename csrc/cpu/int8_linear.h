// Products with weights of int8, and rows that are quantised to uint8 on the way.
//
// Where a processor multiplies quadruples of uint8 and int8 only by way of sums of two products in
// int16, which saturate, weights have 7 bits, so that none does.
#pragma once

#include "ffn_activation.h"
#include "group_chunks.h"
#include "row_norm.h"

namespace variator {
namespace VARIATOR_ISA {

struct Int8Quads {
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

// Panels as gemm.h has them, [inner / 4][columns][4], zeros beyond the weight.
inline int64_t int8_packed_bytes(const Int8PackParams& p) {
    return round_up(p.columns, IntVec::width) * round_up(p.inner, Int8Quads::step);
}
inline void int8_pack(const Int8PackParams& p) {
    constexpr int step = Int8Quads::step;
    const int64_t columns = round_up(p.columns, IntVec::width), inner = round_up(p.inner, step);
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

template <DType dtype>
struct Int8Product {
    using T = Storage<Vec, dtype>;
    using Element = typename T::Element;
    const Int8LinearParams& p;
    const int64_t padded = round_up(p.inner, larger(Vec::width, Int8Quads::step));

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
        Vec top = Vec::zero(), bottom = Vec::zero(), nothing = Vec::zero();
        for_parts<Vec>(p.inner, [&](Part<Vec> part) {
            const Vec v = part.template load<From>(x);
            top = Vec::maximum(top, v);
            bottom = Vec::maximum(bottom, Vec::zero() - v);
            nothing = Vec::fma(v, Vec::zero(), nothing);
        });
        const float least = bottom.largest(), range = top.largest() + least;
        const float poison = nothing.sum();
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

    // Rows from `first` and columns from `n` on, of which `sums` are the products.
    template <Activation activation>
    void finish(int64_t first, int64_t rows, int64_t n, int64_t columns, const int32_t* sums,
                const Scale* row_scales) const {
        for (int64_t m = 0; m < rows; ++m, sums += panel_columns<IntVec>()) {
            const int64_t start = (first + m) * p.columns + n;
            Element* y = static_cast<Element*>(p.y) + start;
            const auto at = [=](const void* given) {
                return given ? static_cast<const Element*>(given) + start : nullptr;
            };
            const Element *other = at(p.other), *residual = at(p.residual);
            const Vec scale = Vec::set(row_scales[m].scale);
            const IntVec zero = IntVec::set(row_scales[m].zero);
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
    }

    // Panels first_panel .. last_panel - 1 of some rows.
    void run(int64_t first, int64_t rows, int64_t first_panel, int64_t last_panel,
             uint8_t* quantised, Scale* row_scales, int32_t* sums, float* normed) const {
        for (int64_t m = 0; m < rows; ++m)
            row_scales[m] = row(first + m, normed, quantised + m * padded);
        constexpr int64_t most = panel_columns<IntVec>();
        const int64_t inner = round_up(p.inner, Int8Quads::step);
        for (int64_t n = first_panel * most; n < last_panel * most; n += most) {
            const int64_t columns = smaller(most, p.columns - n);
            const int64_t width = round_up(columns, IntVec::width);
            Nothing meanwhile;
            panel_product<Int8Quads, IntVec>(
                Strided{quantised, padded, 1}, rows, 0, inner, p.packed + n * inner,
                width * Int8Quads::step, width,
                [=](int64_t row) {
                    int32_t* out = sums + row * most;
                    return [=](int64_t column, IntVec sum) { sum.store(out + column); };
                },
                meanwhile);
#define VARIATOR_CASE(name, value)                                           \
    case Activation::name:                                                   \
        finish<Activation::name>(first, rows, n, columns, sums, row_scales); \
        break;
            switch (p.activation) { VARIATOR_FFN_ACTIVATIONS(VARIATOR_CASE) }
#undef VARIATOR_CASE
        }
    }

    // Rows worked on together stay quantised in the second-level cache while the weights pass.
    void all() const {
        constexpr int64_t tile = IntVec::tile_rows;
        const int64_t most = larger(tile, smaller(96, 262144 / padded) / tile * tile);
        const int64_t threads = larger(1, p.threads);
        // A chunk or less: threads share the columns, so that each reads a part of the weights.
        const bool by_columns = p.rows <= most;
        const int64_t parts = by_columns ? threads : 1;
        const int64_t chunks = by_columns ? 1 : round_up((p.rows + most - 1) / most, threads);
        const int64_t size = round_up((p.rows + chunks - 1) / chunks, tile);
        const int64_t panels = (p.columns + panel_columns<IntVec>() - 1) / panel_columns<IntVec>();
        Carver carver;
        const int64_t at = carver.reserve<uint8_t>(size * padded);
        const int64_t scales_at = carver.reserve<Scale>(size);
        const int64_t sums_at = carver.reserve<int32_t>(size * panel_columns<IntVec>());
        const int64_t normed_at = carver.reserve<float>(p.norm == Norm::none ? 0 : p.inner);
        for_items(chunks * parts, p.threads, [&](int64_t item) {
            const int64_t first = item / parts * size, part = item % parts;
            if (first >= p.rows) return;
            char* scratch = static_cast<char*>(thread_scratch(carver.bytes));
            run(first, smaller(size, p.rows - first), panels * part / parts,
                panels * (part + 1) / parts, reinterpret_cast<uint8_t*>(scratch + at),
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
