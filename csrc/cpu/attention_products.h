// The two products of attention, and the panels they read: acc elements, or pairs of bf16 where the
// instruction set has products of them.
#pragma once

#include "attention_keys.h"

namespace variator {
namespace VARIATOR_ISA {

template <class V, DType dtype>
struct WideProducts {
    using S = typename V::Scalar;
    using Element = S;
    static constexpr int64_t key_unit = V::width, inner_unit = 1;
    static constexpr int64_t block = 8 * V::tile_rows, tile = 256;

    static void store(S* to, V value) { value.store(to); }
    static void pack(const AttentionParams& p, int64_t row, int64_t head, int64_t padded,
                     int64_t inner, int64_t width, S* keys, S* values, S* wide) {
        auto key = [&](int64_t j) -> const S* {
            if (j >= p.keys || !seen<S>(p, row, j)) return nullptr;
            widen<V, dtype>(vector_of<V, dtype>(p.k, row, j, head), p.d, inner, wide);
            return wide;
        };
        pack_keys<V, S, 1>(key, padded, inner, keys);
        for (int64_t j = 0; j < padded; ++j) {
            const bool real = j < p.keys && seen<S>(p, row, j);
            widen<V, dtype>(real ? vector_of<V, dtype>(p.v, row, j, head) : nullptr, real ? p.d : 0,
                            width, values + j * width);
        }
    }
    static void load_queries(const AttentionParams& p, int64_t row, int64_t head, int64_t begin,
                             int64_t count, int64_t inner, S* queries, S*) {
        for (int64_t i = 0; i < count; ++i)
            widen<V, dtype>(vector_of<V, dtype>(p.q, row, begin + i, head), p.d, inner,
                            queries + i * inner);
    }
    static void scores(const S* queries, int64_t count, int64_t inner, const S* keys,
                       int64_t columns, S* scores) {
        product<Plain<V>, V>(Strided{queries, inner, 1}, count, Operand<S>{keys, 0}, columns,
                             scores, tile, inner, false);
    }
    static void weighted(const S* weights, int64_t count, int64_t columns, const S* values,
                         int64_t width, S* sums) {
        product<Plain<V>, V>(Strided{weights, tile, 1}, count, Operand<S>{values, width}, width,
                             sums, width, columns, true);
    }
};

template <class V, DType dtype>
struct Multiply : WideProducts<V, dtype> {};

}  // namespace VARIATOR_ISA
}  // namespace variator
