// The kernels of one instruction set as a table; isa_*.cpp defines VARIATOR_ISA and includes this.
#pragma once

#include "attention.h"
#include "attention_backward.h"
#include "by_dtype.h"
#include "decompress_backward.h"
#include "int8_linear.h"
#include "merge_backward.h"
#include "norm_rows.h"
#include "rows_linear.h"

namespace variator {
namespace VARIATOR_ISA {

VARIATOR_BY_DTYPE(merge, MergeParams)
VARIATOR_BY_DTYPE(merge_backward, MergeBackwardParams)
VARIATOR_BY_DTYPE(decompress, DecompressParams)
VARIATOR_BY_DTYPE(decompress_backward, DecompressBackwardParams)
VARIATOR_BY_DTYPE(attention, AttentionParams)
VARIATOR_BY_DTYPE(attention_backward, AttentionBackwardParams)
VARIATOR_BY_DTYPE(norm_rows, NormRowsParams)

#ifdef VARIATOR_BF16_PRODUCTS
// Pairs, with zeros behind to whole steps of the products.
constexpr int pair = 2, pairs_unit = BestPairs::step;
#endif

inline int64_t packed_bytes(const PackParams& p) {
#ifdef VARIATOR_BF16_PRODUCTS
    if (p.bf16)
        return p.matrices * round_up(p.columns, Vec::width) * round_up(p.inner, pairs_unit) *
               int64_t{sizeof(uint16_t)};
#endif
#ifdef VARIATOR_HAS_DOUBLE
    if (p.dtype == DType::float64)
        return p.matrices * round_up(p.columns, VecDouble::width) * p.inner *
               int64_t{sizeof(double)};
#endif
    return p.matrices * round_up(p.columns, Vec::width) * p.inner * int64_t{sizeof(float)};
}

inline void pack(const PackParams& p) {
#ifdef VARIATOR_BF16_PRODUCTS
    if (p.bf16)
        return pack_panels<Vec, uint16_t, pair, pairs_unit>(p, [](float x) {
            uint16_t half[Vec::width];
            Vec::set(x).store_bf16(half);
            return half[0];
        });
#endif
#ifdef VARIATOR_HAS_DOUBLE
    if (p.dtype == DType::float64)
        return pack_panels<VecDouble, double, 1, 1>(p, [](double x) { return x; });
#endif
    pack_panels<Vec, float, 1, 1>(p, [](float x) { return x; });
}

inline Kernels table(const char* name) {
    Kernels kernels{};
    kernels.name = name;
    kernels.merge = merge_any;
    kernels.merge_backward = merge_backward_any;
    kernels.decompress = decompress_any;
    kernels.decompress_backward = decompress_backward_any;
    kernels.attention = attention_any;
    kernels.attention_backward = attention_backward_any;
    kernels.packed_bytes = packed_bytes;
    kernels.pack = pack;
    kernels.int8_packed_bytes = int8_packed_bytes;
    kernels.int8_pack = int8_pack;
    kernels.int8_linear = int8_linear;
    kernels.rows_linear = rows_linear_any;
    kernels.norm_rows = norm_rows_any;
    kernels.int8_weight_levels = IntVec::weight_levels;
#ifdef VARIATOR_HAS_DOUBLE
    kernels.has_double = true;
#endif
    return kernels;
}

}  // namespace VARIATOR_ISA
}  // namespace variator
