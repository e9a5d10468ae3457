// What attention knows of a row's keys before it meets queries: biases, visibility, and where terms
// of the distance can be read as they lie.
#pragma once

#include <limits>

#include "attention_math.h"
#include "gemm.h"
#include "group_chunks.h"

namespace variator {
namespace VARIATOR_ISA {

template <class S>
S infinity() {
    return static_cast<S>(__builtin_inff());
}

// Arrays of one allocation: measured without memory first, then placed in it.
struct Arrays {
    char* memory = nullptr;
    Carver carver{};
    template <class T>
    void take(T*& array, int64_t count) {
        const int64_t at = carver.reserve<T>(count);
        if (memory) array = reinterpret_cast<T*>(memory + at);
    }
};

// Terms of the distance. Keys at equal steps that share a pattern (whole groups)
// read them as vectors: `lines` holds the terms of one head by residue of the step, so that what a
// query adds to neighbouring keys lies side by side. Other keys are looked up one by one.
template <class V>
struct DistanceTerms {
    using S = typename V::Scalar;
    const AttentionParams& p;
    int64_t row, first, last;                              // queries first .. last - 1
    int64_t step = 0, pattern = 0, least = 0, length = 0;  // step 0: no vector is read as it lies
    double begin = 0;                                      // position of key 0 by the steps
    S* lines = nullptr;
    int64_t* places = nullptr;  // in `lines`, one a query

    const double* keys() const { return p.key_positions + row * p.keys; }
    const double* queries() const { return p.query_positions + row * p.queries; }
    int64_t pattern_of(int64_t key) const { return p.pattern ? p.pattern[row * p.keys + key] : 0; }
    static int64_t distance(double key, double query) {
        return static_cast<int64_t>(__builtin_floor(key - query + 0.5));
    }

    void plan(int64_t padded) {
        const int64_t middle = p.keys / 2;
        if (!p.terms || middle + 1 >= p.keys || first >= last) return;
        const double between = keys()[middle + 1] - keys()[middle];
        if (!(between >= 1 && between <= 1024 && between == __builtin_floor(between))) return;
        double low = queries()[first], high = low;
        for (int64_t s = first; s < last; ++s) {
            if (queries()[s] != queries()[s]) return;  // NaN: a group without a token
            low = queries()[s] < low ? queries()[s] : low;
            high = queries()[s] > high ? queries()[s] : high;
        }
        begin = keys()[middle] - between * static_cast<double>(middle);
        if (!(high - low < 1e7) || !(begin - low < 1e15 && low - begin < 1e15)) return;
        least = distance(begin, high) - p.origin;
        pattern = pattern_of(middle);
        step = static_cast<int64_t>(between);
        length = (distance(begin, low) - p.origin - least) / step + 1 + padded;
    }
    void arrange(Arrays& arrays) {
        arrays.take(lines, step * length);
        arrays.take(places, step ? last - first : 0);
    }
    void place() {
        if (!step) return;
        int64_t before = -1, residue = 0, at = 0;
        for (int64_t s = first; s < last; ++s) {
            const int64_t now = distance(begin, queries()[s]) - p.origin - least;
            if (now + 1 == before) {  // the next token: no division
                if (--residue < 0) residue = step - 1, --at;
            } else {
                residue = now % step, at = now / step;
            }
            before = now;
            places[s - first] = residue * length + at;
        }
    }
    S* table(int64_t which, int64_t head) const {
        const int64_t at = which * p.term_heads + (p.term_heads > 1 ? head : 0);
        return const_cast<S*>(static_cast<const S*>(p.terms)) + at * p.width;
    }
    // Columns beyond the table's ends read its ends.
    void fill(int64_t head) {
        if (!step) return;
        const S* terms = table(pattern, head);
        const S low = terms[0], high = terms[p.width - 1];
        for (int64_t r = 0; r < step; ++r) {
            const int64_t from = least + r;
            auto reached = [&](int64_t column) {  // the first i of at least this column
                return column <= from ? 0 : smaller(length, (column - from + step - 1) / step);
            };
            const int64_t inside = reached(0), behind = reached(p.width);
            S* line = lines + r * length;
            for (int64_t i = 0; i < inside; ++i) line[i] = low;
            for (int64_t i = inside; i < behind; ++i) line[i] = terms[from + step * i];
            for (int64_t i = behind; i < length; ++i) line[i] = high;
        }
    }
    // What query s adds to key j is at line(s)[j], for the keys of vectors that are even().
    const S* line(int64_t s) const { return lines + places[s - first]; }
    bool even(int64_t key) const {
        if (step == 0) return false;
        for (int64_t j = key; j < smaller(key + V::width, p.keys); ++j)
            if (keys()[j] != begin + static_cast<double>(step * j) || pattern_of(j) != pattern)
                return false;
        return true;
    }
    V look_up(int64_t s, int64_t key, int64_t head) const {
        S found[V::width];
        const double query = queries()[s];
        for (int i = 0; i < V::width; ++i) {
            found[i] = 0;
            if (key + i >= p.keys) continue;
            // Clamped as a double: distances may be beyond any integer.
            double column =
                __builtin_floor(keys()[key + i] - query + 0.5) - static_cast<double>(p.origin);
            const double end = static_cast<double>(p.width - 1);
            column = column > 0 ? (column < end ? column : end) : 0;
            found[i] = table(pattern_of(key + i), head)[static_cast<int64_t>(column)];
        }
        return V::load(found);
    }
};

// Keys of a tile: which queries see some of them, which all; and what of scores they share.
struct TileOfKeys {
    double first_seen = 1e300, all_seen = -1e300, first_lost = 1e300, all_lost = -1e300;
    bool even = true;     // their terms are read as they lie
    bool biased = false;  // some bias is not 0
    void note(double from, double to) {
        first_seen = from < first_seen ? from : first_seen;
        all_seen = from > all_seen ? from : all_seen;
        first_lost = to < first_lost ? to : first_lost;
        all_lost = to > all_lost ? to : all_lost;
    }
    bool any(int64_t begin, int64_t end) const {
        return static_cast<double>(end) > first_seen && static_cast<double>(begin) < all_lost;
    }
    bool all(int64_t begin, int64_t end) const {
        return static_cast<double>(begin) >= all_seen && static_cast<double>(end) <= first_lost;
    }
};

// Keys begin .. end - 1, of one tile, that a block of queries meets.
struct KeysMet {
    int64_t begin, end;
    bool hides;  // some query does not see some of them
};

// The keys of one row as the softmax sees them; pads are invisible.
template <class V>
struct KeyLists {
    using S = typename V::Scalar;
    const AttentionParams& p;
    int64_t padded, tile, step;                            // step: a part of a tile
    S *bias = nullptr, *first = nullptr, *last = nullptr;  // first, last: null where nothing hides
    uint8_t* even = nullptr;                               // a byte a vector
    TileOfKeys* tiles = nullptr;
    TileOfKeys* steps = nullptr;

    bool hides() const { return p.first || p.last; }
    void arrange(Arrays& arrays) {
        arrays.take(bias, padded);
        if (hides()) {
            arrays.take(first, padded), arrays.take(last, padded);
            arrays.take(steps, (padded + step - 1) / step);
        }
        arrays.take(even, padded / V::width);
        arrays.take(tiles, (padded + tile - 1) / tile);
    }
    // Whether one of the queries query .. behind - 1 sees some key of key j's step.
    bool meets(int64_t j, int64_t query, int64_t behind) const {
        return !hides() || steps[j / step].any(query, behind);
    }
    // Of the tile from t on, for queries query .. behind - 1: from the first to the last step of
    // which one sees some key. A window of few keys needs no whole tile.
    KeysMet met(int64_t t, int64_t query, int64_t behind) const {
        int64_t begin = t, end = smaller(t + tile, padded);
        if (!hides()) return {begin, end, false};
        if (!tiles[t / tile].any(query, behind)) return {t, t, false};
        while (begin < end && !meets(begin, query, behind)) begin += step;
        while (end > begin && !meets(end - 1, query, behind)) end = (end - 1) / step * step;
        return {begin, end, !tiles[t / tile].all(query, behind)};
    }
    void fill(const DistanceTerms<V>& terms) {
        for (int64_t t = 0; t < padded; t += tile) tiles[t / tile] = {};
        for (int64_t t = 0; hides() && t < padded; t += step) steps[t / step] = {};
        for (int64_t j = 0; j < padded; ++j) {
            TileOfKeys& at = tiles[j / tile];
            const bool real = j < p.keys;
            const int64_t key = terms.row * p.keys + j;
            const S given = real && p.bias ? static_cast<const S*>(p.bias)[key] : S(0);
            // In units of log2 it stays finite too: masks of the least number are not -inf.
            constexpr S least = std::numeric_limits<S>::lowest() / 4;
            bias[j] = real ? given : -infinity<S>();
            if (bias[j] < least && bias[j] != -infinity<S>()) bias[j] = least;
            at.biased |= !(bias[j] == 0);
            if (!hides()) continue;
            first[j] = real && p.first ? static_cast<S>(p.first[key]) : S(0);
            last[j] = real && p.last ? static_cast<S>(p.last[key]) : infinity<S>();
            if (!real) continue;
            const double from = static_cast<double>(first[j]), to = static_cast<double>(last[j]);
            at.note(from, to);
            steps[j / step].note(from, to);
        }
        if (!p.terms) return;
        for (int64_t j = 0; j < padded; j += V::width) {
            even[j / V::width] = terms.even(j);
            tiles[j / tile].even &= even[j / V::width] != 0;
        }
    }
};

}  // namespace VARIATOR_ISA
}  // namespace variator
