// What attention knows of the keys of one row and head before it meets queries: panels of keys and
// values, biases, visibility, and where terms of the distance can be read as they lie.
#pragma once

#include "attention_math.h"
#include "gemm.h"
#include "group_chunks.h"

namespace variator {
namespace VARIATOR_ISA {

// Terms of the distance, scaled by log2(e). Keys at equal steps that share a pattern (whole groups)
// read them as vectors: `lines` holds the terms of one head by residue of the step, so that what a
// query adds to neighbouring keys lies side by side. Other keys are looked up one by one.
template <class V>
struct DistanceTerms {
    using S = typename V::Scalar;
    const AttentionParams& p;
    int64_t row;
    int64_t step = 0, pattern = 0, least = 0, length = 0;  // step 0: no vector is read as it lies
    double begin = 0;                                      // position of key 0 by the steps
    S* lines = nullptr;

    const double* keys() const { return p.key_positions + row * p.keys; }
    const double* queries() const { return p.query_positions + row * p.queries; }
    int64_t pattern_of(int64_t key) const { return p.pattern ? p.pattern[row * p.keys + key] : 0; }
    static int64_t distance(double key, double query) {
        return static_cast<int64_t>(__builtin_floor(key - query + 0.5));
    }

    // The elements of `lines` for queries first .. last - 1 and keys up to `padded`; 0: none.
    int64_t plan(int64_t first, int64_t last, int64_t padded) {
        const int64_t middle = p.keys / 2;
        if (!p.terms || middle + 1 >= p.keys || first >= last) return 0;
        const double between = keys()[middle + 1] - keys()[middle];
        if (!(between >= 1 && between <= 1024 && between == __builtin_floor(between))) return 0;
        double low = queries()[first], high = low;
        for (int64_t s = first; s < last; ++s) {
            if (queries()[s] != queries()[s]) return 0;  // NaN: a group without a token
            low = queries()[s] < low ? queries()[s] : low;
            high = queries()[s] > high ? queries()[s] : high;
        }
        begin = keys()[middle] - between * static_cast<double>(middle);
        if (!(high - low < 1e7) || !(begin - low < 1e15 && low - begin < 1e15)) return 0;
        least = distance(begin, high) - p.origin;
        pattern = pattern_of(middle);
        step = static_cast<int64_t>(between);
        length = (distance(begin, low) - p.origin - least) / step + 1 + padded;
        return step * length;
    }
    S* table(int64_t which, int64_t head) const {
        const int64_t at = which * p.term_heads + (p.term_heads > 1 ? head : 0);
        return const_cast<S*>(static_cast<const S*>(p.terms)) + at * p.width;
    }
    void fill(int64_t head) {
        const S* terms = table(pattern, head);
        for (int64_t r = 0; r < step; ++r)
            for (int64_t i = 0; i < length; ++i) {
                const int64_t column = least + r + step * i;
                lines[r * length + i] = terms[larger(0, smaller(column, p.width - 1))] * S(log2_e);
            }
    }
    // What query s adds to key j is at line(s)[j], for the keys of vectors that are even().
    const S* line(int64_t s) const {
        const int64_t at = distance(begin, queries()[s]) - p.origin - least;
        return lines + at % step * length + at / step;
    }
    bool even(int64_t first) const {
        if (step == 0) return false;
        for (int64_t j = first; j < smaller(first + V::width, p.keys); ++j)
            if (keys()[j] != begin + static_cast<double>(step * j) || pattern_of(j) != pattern)
                return false;
        return true;
    }
    V look_up(int64_t s, int64_t first, int64_t head) const {
        S found[V::width];
        const double query = queries()[s];
        for (int i = 0; i < V::width; ++i) {
            found[i] = 0;
            if (first + i >= p.keys) continue;
            // Clamped as a double: distances may be beyond any integer.
            double column =
                __builtin_floor(keys()[first + i] - query + 0.5) - static_cast<double>(p.origin);
            const double end = static_cast<double>(p.width - 1);
            column = column > 0 ? (column < end ? column : end) : 0;
            found[i] = table(pattern_of(first + i), head)[static_cast<int64_t>(column)] * S(log2_e);
        }
        return V::load(found);
    }
};

template <class S>
S infinity() {
    return static_cast<S>(__builtin_inff());
}

// Whether anybody sees key j: what an invisible one holds must not be read, it may be NaN.
template <class S>
bool seen(const AttentionParams& p, int64_t row, int64_t j) {
    return !p.bias || static_cast<const S*>(p.bias)[row * p.keys + j] != -infinity<S>();
}

template <class V, DType dtype>
const typename Storage<V, dtype>::Element* vector_of(const HeadRows& t, int64_t row, int64_t token,
                                                     int64_t head) {
    return static_cast<const typename Storage<V, dtype>::Element*>(t.data) + row * t.row +
           token * t.token + head * t.head;
}

// One row in acc, zeros up to `padded`.
template <class V, DType dtype>
void widen(const typename Storage<V, dtype>::Element* from, int64_t d, int64_t padded,
           typename V::Scalar* to) {
    for_parts<V>(d, [&](Part<V> part) {
        part.template store<Acc<V>>(to, part.template load<Storage<V, dtype>>(from));
    });
    for (int64_t i = d; i < padded; ++i) to[i] = 0;
}

// Panels for q · kᵀ: inner dimension d, a column a key; a row of `rows` each: row(j) or null.
template <class V, class E, int step, class Rows>
void pack_keys(const Rows& row, int64_t padded, int64_t inner, E* packed) {
    using Word = std::conditional_t<step == 2, uint32_t, E>;
    for (int64_t first = 0; first < padded; first += panel_columns<V>()) {
        const int64_t width = smaller(panel_columns<V>(), padded - first);
        Word* out = reinterpret_cast<Word*>(packed + first * inner);
        for (int64_t c = 0; c < width; ++c) {
            const E* from = row(first + c);
            for (int64_t i = 0; i < inner / step; ++i) {
                Word word = 0;
                if (from) __builtin_memcpy(&word, from + i * step, sizeof word);
                out[i * width + c] = word;
            }
        }
    }
}

}  // namespace VARIATOR_ISA
}  // namespace variator
