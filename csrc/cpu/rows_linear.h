// Products of rows with packed weights in floating point, with what stands around them: a norm in
// front; bias, activation, factor and residual behind.
#pragma once

#include "ffn_activation.h"
#include "row_norm.h"
#include "rows_split.h"

namespace variator {
namespace VARIATOR_ISA {

// Pairs of bf16 where the instruction set multiplies them, else fp32.
template <DType dtype>
struct RowsOperand {
    using P = Plain<Vec>;
    using Stored = Acc<Vec>;
    static constexpr bool direct = dtype == DType::float32;
};
#ifdef VARIATOR_BF16_PRODUCTS
template <>
struct RowsOperand<DType::bfloat16> {
    using P = BestPairs;
    using Stored = Storage<Vec, DType::bfloat16>;
    static constexpr bool direct = true;
};
#endif

template <DType dtype>
struct RowsProduct {
    using T = Storage<Vec, dtype>;
    using Element = typename T::Element;
    using Operands = RowsOperand<dtype>;
    using P = typename Operands::P;
    using Left = typename P::Element;
    const RowsLinearParams& p;
    const int64_t inner = round_up(p.inner, P::step), padded = apart<P>(inner);
    const bool as_they_are = Operands::direct && p.norm == Norm::none && inner == p.inner;
    // Rows of x are the products' own rows, or are written to scratch.
    const bool in_place = as_they_are && !P::tiles;

    void prepare(int64_t m, Left* out) const {
        const Element* x = static_cast<const Element*>(p.x) + m * p.x_stride;
        if (as_they_are) {
            __builtin_memcpy(out, x, static_cast<size_t>(inner) * sizeof *out);
            return;
        }
        const auto s = statistics<Vec, dtype>(x, p.inner, p.norm, p.eps);
        normed_row<Vec, dtype, typename Operands::Stored>(x, p.inner, inner, s, p.norm_weight,
                                                          p.norm_bias, out);
    }

    template <Activation activation>
    inline __attribute__((always_inline)) void finish(int64_t m, int64_t n, int64_t columns,
                                                      const float* sums) const {
        const int64_t start = m * p.columns + n;
        Element* y = static_cast<Element*>(p.y) + start;
        const auto at = [=](const void* given) {
            return given ? static_cast<const Element*>(given) + start : nullptr;
        };
        const Element *other = at(p.other), *residual = at(p.residual);
        for_parts<Vec>(columns, [&](Part<Vec> part) {
            Vec v = Vec::load(sums + part.at);
            if (p.bias) v = v + Vec::load(p.bias + n + part.at);
            v = activate<activation>(v);
            if (other) v = v * part.template load<T>(other);
            if (residual) v = v + part.template load<T>(residual);
            part.template store<T>(y, v);
        });
    }

    void run(int64_t first, int64_t rows, PanelRange panels, Left* scratch, float* sums) const {
        Strided<Left> left{scratch, padded, 1};
        if (in_place)
            left = {static_cast<const Left*>(p.x) + first * p.x_stride, p.x_stride, 1};
        else
            for (int64_t m = 0; m < rows; ++m) prepare(first + m, scratch + m * padded);
        const auto multiply = [&](auto activation) {
            panel_blocks<P, Vec>(
                left, rows, inner, static_cast<const typename P::Packed*>(p.packed), p.columns,
                panels, sums, [&](int64_t m, int64_t n, int64_t columns, const float* of) {
                    finish<decltype(activation)::value>(first + m, n, columns, of);
                });
        };
        with_activation(p.activation, multiply);
    }

    // As Int8Product: rows worked on together stay in the second-level cache.
    void all() const {
        const auto split = RowsSplit::of<P, Vec>(p.rows, p.columns, padded * int64_t{sizeof(Left)},
                                                 393216, p.threads);
        Carver carver;
        const int64_t left_at = carver.reserve<Left>(in_place ? 0 : split.size * padded);
        const int64_t sums_at = carver.reserve<float>(sums_of_blocks<P, Vec>);
        split.each(p.threads, [&](int64_t first, int64_t rows, PanelRange panels) {
            char* scratch = static_cast<char*>(thread_scratch(carver.bytes));
            run(first, rows, panels, reinterpret_cast<Left*>(scratch + left_at),
                reinterpret_cast<float*>(scratch + sums_at));
        });
    }
};

inline void rows_linear_any(const RowsLinearParams& p) {
    if (p.rows == 0) return;
    switch (p.dtype) {
        case DType::float32:
            return RowsProduct<DType::float32>{p}.all();
        case DType::bfloat16:
            return RowsProduct<DType::bfloat16>{p}.all();
        case DType::float16:
            return RowsProduct<DType::float16>{p}.all();
        case DType::float64:
            return;
    }
}

}  // namespace VARIATOR_ISA
}  // namespace variator
