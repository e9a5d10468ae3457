// The running softmax of a block of queries, tile of keys by tile of keys (flash attention).
#pragma once

#include "attention_rows.h"

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

    // Scores from products, in place; returns the largest of each lane.
    V row(S* scores, int64_t query) const {
        const bool lines = distances() && tile().even;
        if (hides || (distances() && !lines)) return any_row(scores, query);
        const S* bias = lists.bias + begin;
        const S* one = lines ? terms.line(query) + begin : bias;
        if (lines && tile().biased) return even_row(scores, one, bias);
        return even_row(scores, one, nullptr);
    }

    // What is added lies as the scores do.
    V even_row(S* scores, const S* one, const S* other) const {
        V top = V::set(-infinity<S>()), next = top;
        auto score = [&](int64_t i) {
            V s = V::fma(V::load(scores + i), scale, V::load(one + i));
            if (other) s = s + V::load(other + i);
            s.store(scores + i);
            return s;
        };
        int64_t i = 0;
        for (; i + 2 * V::width <= columns; i += 2 * V::width) {
            top = V::maximum(top, score(i));
            next = V::maximum(next, score(i + V::width));
        }
        if (i < columns) top = V::maximum(top, score(i));
        return V::maximum(top, next);
    }

    // Adds in the order of even_row.
    V any_row(S* scores, int64_t query) const {
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
        return top;
    }
};

// Of a block of queries: sums of weights e^(score - top), a vector a query. A top is a score that
// no other exceeds by more than `slack`, so it seldom changes, and weights stay far from fp32's
// limit. log2(e) meets the difference: in the scores themselves it would round more.
template <class V, class M, bool half>
struct RunningSoftmax {
    using S = typename V::Scalar;
    using Weight = typename M::Element;
    static constexpr int slack = 6;
    static_assert(M::block % V::width == 0);
    S *top = nullptr, *totals = nullptr;  // [block], [block][V::width]

    void arrange(Arrays& arrays) {
        arrays.take(top, M::block);
        arrays.take(totals, M::block * V::width);
    }
    void start() {
        for (int64_t i = 0; i < M::block; ++i) top[i] = -infinity<S>();
        for (int64_t i = 0; i < M::block * V::width; ++i) totals[i] = 0;
    }

    // Weights of the keys of a tile; sums [count][width] become relative to the new tops. ahead()
    // runs before each query.
    template <class Ahead>
    void add(const ScoreTerms<V>& terms, int64_t query, int64_t count, S* scores, Weight* weights,
             S* sums, int64_t width, Ahead ahead) {
        for (int64_t first = 0; first < count; first += V::width) {
            const int64_t many = smaller(V::width, count - first);
            V found[V::width];
            for (int64_t i = 0; i < V::width; ++i) {
                found[i] = V::set(-infinity<S>());
                if (i >= many) continue;
                ahead();
                found[i] = terms.row(scores + (first + i) * M::tile, query + first + i);
            }
            move_tops(fold<V::width>(found, V::maximum), first, many, sums + first * width, width);
            for (int64_t i = first; i < first + many; ++i) {
                // Of a query that has seen no key all scores are -inf.
                const V shift = V::set(top[i] == -infinity<S>() ? S(0) : top[i]);
                const V unit = V::set(S(log2_e));
                V total = V::load(totals + i * V::width);
                for (int64_t c = 0; c < terms.columns; c += V::width) {
                    const V score = V::load(scores + i * M::tile + c);
                    const V e = exp2<half>((score - shift) * unit);
                    M::put(weights + i * M::tile + c, e);
                    total = total + e;
                }
                total.store(totals + i * V::width);
            }
        }
    }

    // `found`: the largest scores of V::width queries, many of them real, in a tile.
    void move_tops(V found, int64_t first, int64_t many, S* sums, int64_t width) {
        const V before = V::load(top + first);
        const V moves = V::less_select(before + V::set(S(slack)), found, V::set(1), V::zero());
        if (!(moves.largest() > 0)) return;
        S old[V::width];
        before.store(old);
        V::less_select(before + V::set(S(slack)), found, found, before).store(top + first);
        for (int64_t i = 0; i < many; ++i) {
            if (old[i] == top[first + i] || old[i] == -infinity<S>()) continue;
            const V change = exp2<half>(V::set((old[i] - top[first + i]) * S(log2_e)));
            S* total = totals + (first + i) * V::width;
            (V::load(total) * change).store(total);
            for (int64_t c = i * width; c < (i + 1) * width; c += V::width)
                (V::load(sums + c) * change).store(sums + c);
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
