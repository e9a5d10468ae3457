// A norm over rows, read once and written once.
#pragma once

#include "group_chunks.h"
#include "row_norm.h"

namespace variator {
namespace VARIATOR_ISA {

template <class V, DType dtype>
void norm_rows(const NormRowsParams& p) {
    using T = Storage<V, dtype>;
    using Element = typename T::Element;
    using S = typename V::Scalar;
    constexpr int64_t size = 32;  // rows of an item
    const auto* weight = static_cast<const S*>(p.norm_weight);
    const auto* bias = static_cast<const S*>(p.norm_bias);
    for_items((p.rows + size - 1) / size, p.threads, [&](int64_t item) {
        const int64_t last = smaller(p.rows, (item + 1) * size);
        for (int64_t m = item * size; m < last; ++m) {
            const Element* x = static_cast<const Element*>(p.x) + m * p.x_stride;
            Element* y = static_cast<Element*>(p.y) + m * p.d;
            const auto s = statistics<V, dtype>(x, p.d, p.norm, p.eps);
            normed_row<V, dtype, T>(x, p.d, p.d, s, weight, bias, y);
        }
    });
}

}  // namespace VARIATOR_ISA
}  // namespace variator
