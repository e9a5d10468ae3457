// The running softmax of a block of queries, tile of keys by tile of keys (flash attention), in
// units of log2.
#pragma once

#include "attention_keys.h"

namespace variator {
namespace VARIATOR_ISA {

// What one tile adds to the scores of a block's queries.
template <class V>
struct ScoreTerms {
    using S = typename V::Scalar;
    const KeyLists<V>& lists;
    const DistanceTerms<V>& terms;
    int64_t begin, columns, head;  // keys begin .. begin + columns - 1
    bool hides;
    V scale;

    const TileOfKeys& tile() const { return lists.tiles[begin / lists.tile]; }
    bool distances() const { return terms.p.terms != nullptr; }

    // Scores from products, in place; returns the largest.
    S row(S* scores, int64_t query) const {
        const bool lines = distances() && tile().even;
        if (hides || (distances() && !lines)) return any_row(scores, query);
        const S* bias = lists.bias + begin;
        if (!lines) return even_row<false>(scores, bias, nullptr);
        const S* line = terms.line(query) + begin;
        return tile().biased ? even_row<true>(scores, line, bias)
                             : even_row<false>(scores, line, nullptr);
    }

    template <bool two>
    S even_row(S* scores, const S* one, const S* other) const {
        V top = V::set(-infinity<S>());
        for (int64_t i = 0; i < columns; i += V::width) {
            V s = V::fma(V::load(scores + i), scale, V::load(one + i));
            if (two) s = s + V::load(other + i);
            s.store(scores + i);
            top = V::maximum(top, s);
        }
        return top.largest();
    }

    // Adds in the order of even_row.
    S any_row(S* scores, int64_t query) const {
        const V hidden = V::set(-infinity<S>()), at = V::set(static_cast<S>(query));
        const S* line = terms.step ? terms.line(query) : nullptr;
        V top = hidden;
        for (int64_t i = 0; i < columns; i += V::width) {
            const int64_t j = begin + i;
            const V bias = V::load(lists.bias + j);
            V s = V::load(scores + i);
            if (distances()) {
                const bool even = lists.even[j / V::width] != 0;
                s = V::fma(s, scale, even ? V::load(line + j) : terms.look_up(query, j, head));
                if (tile().biased) s = s + bias;
            } else {
                s = V::fma(s, scale, bias);
            }
            if (hides) {
                s = V::less_select(at, V::load(lists.first + j), hidden, s);
                s = V::less_select(at, V::load(lists.last + j), s, hidden);
            }
            s.store(scores + i);
            top = V::maximum(top, s);
        }
        return top.largest();
    }
};

// Of a block of queries: the largest scores so far, and sums of weights relative to them, a vector a
// query.
template <class V, class M, bool half>
struct RunningSoftmax {
    using S = typename V::Scalar;
    using Weight = typename M::Element;
    S *top = nullptr, *totals = nullptr;

    void arrange(Arrays& arrays) {
        arrays.take(top, M::block);
        arrays.take(totals, M::block * V::width);
    }
    void start(int64_t count) {
        for (int64_t i = 0; i < count; ++i) top[i] = -infinity<S>();
        for (int64_t i = 0; i < count * V::width; ++i) totals[i] = 0;
    }

    // Weights of the keys of a tile; sums [count][width] become relative to the new largest scores.
    void add(const ScoreTerms<V>& terms, int64_t query, int64_t count, S* scores, Weight* weights,
             S* sums, int64_t width) {
        for (int64_t i = 0; i < count; ++i) {
            S* row = scores + i * M::tile;
            const S found = terms.row(row, query + i), before = top[i];
            V total = V::load(totals + i * V::width);
            if (found > before) {
                top[i] = found;
                if (before != -infinity<S>()) {
                    const V change = exp2_negative<half>(V::set(before - found));
                    total = total * change;
                    for (int64_t c = 0; c < width; c += V::width)
                        (V::load(sums + i * width + c) * change).store(sums + i * width + c);
                }
            }
            const V shift = V::set(top[i] == -infinity<S>() ? S(0) : top[i]);
            for (int64_t c = 0; c < terms.columns; c += V::width) {
                const V e = exp2_negative<half>(V::load(row + c) - shift);
                M::put(weights + i * M::tile + c, e);
                total = total + e;
            }
            total.store(totals + i * V::width);
        }
    }

    // 1 / the sum of query i's weights; 0 where it sees no key.
    S factor(int64_t i) const {
        const S total = V::load(totals + i * V::width).sum();
        return total == 0 ? S(0) : 1 / total;
    }
};

}  // namespace VARIATOR_ISA
}  // namespace variator
