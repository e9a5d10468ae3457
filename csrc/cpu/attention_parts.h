// Products of bf16 pairs with fp32 sums. fp16 takes part as the sum of two bf16 numbers, which is
// exact. (fp32 as three was no faster than AVX-512's own products.)
#pragma once

#include "attention_products.h"

namespace variator {
namespace VARIATOR_ISA {

#ifdef VARIATOR_BF16_PRODUCTS

// Each array holds its parts one after the other. Panels as WideProducts has them, in pairs.
template <class V, DType dtype, int parts, int64_t block_queries, int64_t tile_keys>
struct PartProducts {
    using S = typename V::Scalar;
    using Element = uint16_t;
    using T = Storage<V, dtype>;
    using Row = const typename T::Element*;
    static constexpr int64_t key_unit = 32, block = block_queries, tile = tile_keys,
                             few = 12 * parts, step = larger(key_unit, panel_columns<V>());
    const AttentionParams& p;
    int64_t padded = round_up(p.keys, key_unit), inner = round_up(p.d, 32);
    int64_t width = round_up(p.d, V::width);
    uint16_t *keys = nullptr, *values = nullptr, *queries = nullptr, *staged = nullptr;

    static constexpr int64_t weights() { return parts * block * tile; }
    static void put(uint16_t* to, V value) { split(value, to, block * tile); }
    void arrange(Arrays& arrays, int64_t blocks) {
        arrays.take(keys, parts * padded * inner);
        arrays.take(values, parts * padded * width);
        arrays.take(queries, blocks * parts * block * inner);
        arrays.take(staged, parts * V::width * inner);
    }

    // `distance`: from one part to the next.
    static void split(V x, uint16_t* to, int64_t distance) {
        for (int part = 0; part < parts; ++part) store_bits(to + part * distance, take_bf16(x));
    }
    // Infinity minus its first part is NaN.
    struct Finite {
        V largest = V::zero();
        V note(V x) {
            if (parts > 1) largest = V::maximum(V::absolute(x), largest);
            return x;
        }
        bool all() const { return parts == 1 || largest.largest() < infinity<S>(); }
    };
    V load(Row row, int64_t at) const {
        if (!row || at >= p.d) return V::zero();
        const int64_t left = p.d - at;
        return left >= V::width ? T::load(row + at) : T::load(row + at, static_cast<int>(left));
    }
    void split_row(Row row, uint16_t* to, int64_t distance, Finite& finite) const {
        for (int64_t at = 0; at < inner; at += V::width)
            split(finite.note(load(row, at)), to + at, distance);
    }
    Row visible(const HeadRows& of, int64_t row, int64_t j, int64_t head) const {
        return seen<V>(p, row, j) ? vector_of<V, dtype>(of, row, j, head) : nullptr;
    }

    Row key(int64_t row, int64_t j, int64_t head) const {  // pads as WideHead has them
        return visible(p.k, row, smaller(j, p.keys - 1), head);
    }

    bool pack(int64_t row, int64_t head) {
        Finite finite;
        for (int64_t j = 0; j < padded; j += V::width) {
            for (int64_t i = 0; i < V::width; ++i)
                split_row(key(row, j + i, head), staged + i * inner, V::width * inner, finite);
            for (int part = 0; part < parts; ++part)
                pack_keys<V>(j, padded, inner / 2, words(staged + part * V::width * inner),
                             words(keys + part * padded * inner));
        }
        for (int64_t j = 0; j < padded; j += 2) {
            const Row one = visible(p.v, row, j, head), other = visible(p.v, row, j + 1, head);
            for (int64_t at = 0; at < width; at += V::width) {
                V low = finite.note(load(one, at)), high = finite.note(load(other, at));
                for (int part = 0; part < parts; ++part)
                    store_pairs(values + part * padded * width + j * width + 2 * at, take_bf16(low),
                                take_bf16(high));
            }
        }
        return finite.all();
    }
    bool load_queries(int64_t row, int64_t head, int64_t begin, int64_t count, int64_t at) {
        Finite finite;
        for (int64_t i = 0; i < count; ++i)
            split_row(vector_of<V, dtype>(p.q, row, begin + i, head),
                      queries + (at * parts * block + i) * inner, block * inner, finite);
        return finite.all();
    }

  private:
    // Pairs as they are moved: words of their bits.
    static float* words(uint16_t* pairs) { return reinterpret_cast<float*>(pairs); }
};

// The instruction for pairs; one part.
template <class V, DType dtype>
struct PairProducts : PartProducts<V, dtype, 1, 8 * V::tile_rows, 256> {
    using Base = PartProducts<V, dtype, 1, 8 * V::tile_rows, 256>;
    using Session = Nothing;
    static constexpr int64_t few = 16;
    void scores(int64_t at, int64_t count, int64_t first, int64_t columns, float* scores) const {
        const int64_t inner = this->inner;
        product<Pairs, V>(Strided{this->queries + at * Base::block * inner, inner, 1}, count,
                          Operand<uint16_t>{this->keys + first * inner, 0}, columns, scores,
                          Base::tile, inner, false);
    }
    void weighted(const uint16_t* weights, int64_t count, int64_t first, int64_t columns,
                  float* sums) const {
        const int64_t width = this->width;
        product<Pairs, V>(Strided{weights, Base::tile, 1}, count,
                          Operand<uint16_t>{this->values + first * width, width}, width, sums,
                          width, columns, true);
    }
};

#ifndef VARIATOR_TILES
template <class V>
struct Multiply<V, DType::bfloat16> : PairProducts<V, DType::bfloat16> {};
#endif

#endif

}  // namespace VARIATOR_ISA
}  // namespace variator
