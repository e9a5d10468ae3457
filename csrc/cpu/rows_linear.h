// Products of rows with packed weights in floating point, with what stands around them: a norm in
// front; bias, activation, factor and residual behind.
#pragma once

#include "ffn_activation.h"
#include "group_chunks.h"
#include "row_norm.h"

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
    using P = Pairs;
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
    const int64_t inner = round_up(p.inner, P::step);
    // Rows of x are the products' own rows, or are written to scratch.
    const bool in_place = Operands::direct && p.norm == Norm::none && inner == p.inner;

    void prepare(int64_t m, Left* out) const {
        const Element* x = static_cast<const Element*>(p.x) + m * p.x_stride;
        const auto s = statistics<Vec, dtype>(x, p.inner, p.norm, p.eps);
        normed_row<Vec, dtype, typename Operands::Stored>(x, p.inner, inner, s, p.norm_weight,
                                                          p.norm_bias, out);
    }

    template <Activation activation>
    void finish(int64_t first, int64_t rows, int64_t n, int64_t columns, const float* sums) const {
        for (int64_t m = 0; m < rows; ++m, sums += panel_columns<Vec>()) {
            const int64_t start = (first + m) * p.columns + n;
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
    }

    void run(int64_t first, int64_t rows, int64_t first_panel, int64_t last_panel, Left* scratch,
             float* sums) const {
        const Left* left = scratch;
        int64_t stride = inner;
        if (in_place) {
            left = static_cast<const Left*>(p.x) + first * p.x_stride;
            stride = p.x_stride;
        } else {
            for (int64_t m = 0; m < rows; ++m) prepare(first + m, scratch + m * inner);
        }
        constexpr int64_t most = panel_columns<Vec>();
        for (int64_t n = first_panel * most; n < last_panel * most; n += most) {
            const int64_t columns = smaller(most, p.columns - n);
            const auto* panel = static_cast<const typename P::Packed*>(p.packed) + n * inner;
            product<P, Vec>(Strided{left, stride, 1}, rows, {panel, 0},
                            round_up(columns, Vec::width), sums, most, inner, false);
#define VARIATOR_CASE(name, value)                               \
    case Activation::name:                                       \
        finish<Activation::name>(first, rows, n, columns, sums); \
        break;
            switch (p.activation) { VARIATOR_FFN_ACTIVATIONS(VARIATOR_CASE) }
#undef VARIATOR_CASE
        }
    }

    // As Int8Product: rows worked on together stay in the second-level cache.
    void all() const {
        constexpr int64_t tile = Vec::tile_rows;
        const int64_t bytes = inner * static_cast<int64_t>(sizeof(Left));
        const int64_t most = larger(tile, smaller(96, 393216 / bytes) / tile * tile);
        const int64_t threads = larger(1, p.threads);
        const bool by_columns = p.rows <= most;
        const int64_t parts = by_columns ? threads : 1;
        const int64_t chunks = by_columns ? 1 : round_up((p.rows + most - 1) / most, threads);
        const int64_t size = round_up((p.rows + chunks - 1) / chunks, tile);
        const int64_t panels = (p.columns + panel_columns<Vec>() - 1) / panel_columns<Vec>();
        Carver carver;
        const int64_t left_at = carver.reserve<Left>(in_place ? 0 : size * inner);
        const int64_t sums_at = carver.reserve<float>(size * panel_columns<Vec>());
        for_items(chunks * parts, p.threads, [&](int64_t item) {
            const int64_t first = item / parts * size, part = item % parts;
            if (first >= p.rows) return;
            char* scratch = static_cast<char*>(thread_scratch(carver.bytes));
            run(first, smaller(size, p.rows - first), panels * part / parts,
                panels * (part + 1) / parts, reinterpret_cast<Left*>(scratch + left_at),
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
