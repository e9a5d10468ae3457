// The keys of a tile that some query sees, side by side, and what they add to scores.
#pragma once

#include "attention_keys.h"

namespace variator {
namespace VARIATOR_ISA {

template <class V>
struct VisibleKeys {
    using S = typename V::Scalar;
    const AttentionParams& p;
    int64_t row = 0;
    int64_t *list = nullptr, *columns = nullptr;  // which keys; where their terms of distances are
    S *bias = nullptr, *first = nullptr, *last = nullptr, *added = nullptr;

    bool hides() const { return p.first || p.last; }
    void arrange(Arrays& arrays, int64_t tile) {
        arrays.take(list, tile), arrays.take(columns, tile);
        arrays.take(bias, tile), arrays.take(added, tile);
        arrays.take(first, tile), arrays.take(last, tile);
    }

    // Lists keys that some query sees; pads repeat the last one, unseen, up to a whole vector.
    int64_t fill(int64_t begin, int64_t end) {
        int64_t count = end - begin;
        if (p.bias || hides())
            count = list_visible(begin, end);
        else
            for (int64_t i = 0; i < count; ++i) list[i] = begin + i, bias[i] = 0;
        for (int64_t i = count; count > 0 && i < round_up(count, V::width); ++i) {
            list[i] = list[count - 1], bias[i] = -infinity<S>(), added[i] = 0;
            first[i] = infinity<S>(), last[i] = 0;
        }
        return count;
    }
    int64_t list_visible(int64_t begin, int64_t end) {
        // In units of log2 it stays finite too: masks of the least number are not -inf.
        constexpr S least = std::numeric_limits<S>::lowest() / 4;
        int64_t count = 0;
        for (int64_t j = begin; j < end; ++j) {
            const int64_t key = row * p.keys + j;
            const S given = p.bias ? static_cast<const S*>(p.bias)[key] : S(0);
            const int64_t from = p.first ? larger(0, p.first[key]) : 0;
            const int64_t to = p.last ? smaller(p.last[key], p.queries) : p.queries;
            list[count] = j, bias[count] = given < least ? least : given;
            first[count] = static_cast<S>(from), last[count] = static_cast<S>(to);
            count += given != -infinity<S>() && from < to;
        }
        return count;
    }

    // Where the terms of the distances of query s are, in the table of head 0.
    void find_columns(int64_t s, int64_t count) {
        const double end = static_cast<double>(p.width - 1);
        const double origin = static_cast<double>(p.origin);
        const double at = p.query_positions[row * p.queries + s];
        for (int64_t i = 0; i < count; ++i) {
            const int64_t key = row * p.keys + list[i];
            // Clamped as a double: distances may be beyond any integer, or NaN.
            double column = __builtin_floor(p.key_positions[key] - at + 0.5) - origin;
            column = column > 0 ? (column < end ? column : end) : 0;
            const int64_t pattern = p.pattern ? p.pattern[key] : 0;
            columns[i] = pattern * p.term_heads * p.width + static_cast<int64_t>(column);
        }
    }
    void look_up(int64_t head, int64_t count) {
        const S* terms = static_cast<const S*>(p.terms) + (p.term_heads > 1 ? head * p.width : 0);
        for (int64_t i = 0; i < count; ++i) added[i] = terms[columns[i]];
    }

    // Lanes i .. of what query s scores: from products, and what distances added.
    V score(V product, int64_t s, int64_t i) const {
        V score = V::fma(product, V::set(static_cast<S>(p.scale)), V::load(bias + i));
        if (p.terms) score = score + V::load(added + i);
        if (!hides()) return score;
        const V hidden = V::set(-infinity<S>()), at = V::set(static_cast<S>(s));
        score = V::less_select(at, V::load(first + i), hidden, score);
        return V::less_select(at, V::load(last + i), score, hidden);
    }
};

}  // namespace VARIATOR_ISA
}  // namespace variator
