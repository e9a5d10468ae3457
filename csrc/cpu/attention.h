// grouped_attention: one head's keys and values are packed once; a block of queries then meets them
// tile by tile with a running softmax (flash attention), in units of log2.
#pragma once

#include <limits>

#include "attention_keys.h"
#include "attention_products.h"

namespace variator {
namespace VARIATOR_ISA {

// The keys of one row as the softmax sees them; pads are invisible.
template <class V>
struct KeyLists {
    using S = typename V::Scalar;
    S *bias, *first, *last;  // [padded]; first and last null where every query sees every key
    uint8_t* even;           // a byte a vector

    void fill(const AttentionParams& p, const DistanceTerms<V>& terms, int64_t padded) {
        for (int64_t j = 0; j < padded; ++j) {
            const int64_t at = terms.row * p.keys + j;
            const S given = j < p.keys && p.bias ? static_cast<const S*>(p.bias)[at] : S(0);
            // A finite bias stays finite: masks of the least number are not -inf.
            constexpr S least = std::numeric_limits<S>::lowest() / 4;
            S scaled = given * S(log2_e);
            if (scaled < least && given != -infinity<S>()) scaled = least;
            bias[j] = j < p.keys ? scaled : -infinity<S>();
            if (!first) continue;
            first[j] = j < p.keys && p.first ? static_cast<S>(p.first[at]) : S(0);
            last[j] = j < p.keys && p.last ? static_cast<S>(p.last[at]) : infinity<S>();
        }
        if (p.terms)
            for (int64_t j = 0; j < padded; j += V::width) even[j / V::width] = terms.even(j);
    }
};

// Which queries see keys of a tile, and whether all of them see all of it.
struct Sight {
    double first_seen, all_seen, first_lost, all_lost;
    bool any(int64_t begin, int64_t end) const {
        return static_cast<double>(end) > first_seen && static_cast<double>(begin) < all_lost;
    }
    bool all(int64_t begin, int64_t end) const {
        return static_cast<double>(begin) >= all_seen && static_cast<double>(end) <= first_lost;
    }
};

template <class S>
Sight sight(const S* first, const S* last, int64_t count) {
    Sight found{1e300, -1e300, 1e300, -1e300};
    for (int64_t j = 0; j < count; ++j) {
        const double from = static_cast<double>(first[j]), to = static_cast<double>(last[j]);
        found.first_seen = from < found.first_seen ? from : found.first_seen;
        found.all_seen = from > found.all_seen ? from : found.all_seen;
        found.first_lost = to < found.first_lost ? to : found.first_lost;
        found.all_lost = to > found.all_lost ? to : found.all_lost;
    }
    return found;
}

// Scores of one query, in units of log2, from products: in place; returns the largest.
template <class V>
inline __attribute__((always_inline)) typename V::Scalar score_row(
    typename V::Scalar* scores, int64_t begin, int64_t count, V scale, const KeyLists<V>& lists,
    bool hides, const DistanceTerms<V>* terms, const typename V::Scalar* line, int64_t query,
    int64_t head) {
    using S = typename V::Scalar;
    const V hidden = V::set(-infinity<S>()), at = V::set(static_cast<S>(query));
    V top = hidden;
    for (int64_t i = 0; i < count; i += V::width) {
        const int64_t j = begin + i;
        V s = V::fma(V::load(scores + i), scale, V::load(lists.bias + j));
        if (terms)
            s = s + (lists.even[j / V::width] ? V::load(line + j) : terms->look_up(query, j, head));
        if (hides) {
            s = V::less_select(at, V::load(lists.first + j), hidden, s);
            s = V::less_select(at, V::load(lists.last + j), s, hidden);
        }
        s.store(scores + i);
        top = V::maximum(top, s);
    }
    return top.largest();
}

template <class V, DType dtype>
struct AttentionForward {
    using S = typename V::Scalar;
    using E = typename Storage<V, dtype>::Element;
    using M = Multiply<V, dtype>;
    using Operated = typename M::Element;
    static constexpr int64_t block = M::block, tile = M::tile;
    const AttentionParams& p;
    const int64_t padded = round_up(p.keys, M::key_unit);
    const int64_t inner = round_up(p.d, M::inner_unit), width = round_up(p.d, V::width);
    const int64_t shared = p.kv_heads ? p.heads / p.kv_heads : 0;
    const bool hides = p.first || p.last;

    // Queries of one row and head of keys that one item takes: all of them where there are items
    // enough, because each item packs the keys.
    int64_t chunk() const {
        const int64_t pairs = larger(1, p.rows * p.kv_heads);
        const int64_t wanted = (4 * p.threads + pairs - 1) / pairs;
        return round_up(larger((p.queries + wanted - 1) / wanted, 2 * block), block);
    }
    void run() const {
        const int64_t size = chunk(), chunks = (p.queries + size - 1) / size;
        for_items(p.rows * p.kv_heads * chunks, p.threads, [&](int64_t item) {
            const int64_t first = item % chunks * size, pair = item / chunks;
            one(pair / p.kv_heads, pair % p.kv_heads, first, smaller(first + size, p.queries));
        });
    }

    void one(int64_t row, int64_t kv_head, int64_t first, int64_t last) const {
        DistanceTerms<V> terms{p, row};
        const int64_t lines = terms.plan(first, last, padded);
        Carver carve;
        const int64_t at[] = {carve.reserve<Operated>(padded * inner),
                              carve.reserve<Operated>(padded * width),
                              carve.reserve<S>(padded),
                              carve.reserve<S>(hides ? 2 * padded : 0),
                              carve.reserve<S>(lines),
                              carve.reserve<uint8_t>(padded / V::width + 1),
                              carve.reserve<Operated>(block * inner),
                              carve.reserve<S>(block * tile),
                              carve.reserve<Operated>(block * tile),
                              carve.reserve<S>(block * width),
                              carve.reserve<S>(larger(inner, width)),
                              carve.reserve<Sight>(padded / tile + 1)};
        char* memory = static_cast<char*>(thread_scratch(carve.bytes));
        auto get = [&](int i, auto* typed) {
            return reinterpret_cast<decltype(typed)>(memory + at[i]);
        };
        Operated *keys = get(0, (Operated*)nullptr), *values = get(1, (Operated*)nullptr);
        S* bounds = get(3, (S*)nullptr);
        KeyLists<V> lists{get(2, (S*)nullptr), hides ? bounds : nullptr,
                          hides ? bounds + padded : nullptr, get(5, (uint8_t*)nullptr)};
        terms.lines = get(4, (S*)nullptr);
        Sight* sights = get(11, (Sight*)nullptr);
        lists.fill(p, terms, padded);
        S* wide = get(10, (S*)nullptr);
        M::pack(p, row, kv_head, padded, inner, width, keys, values, wide);
        if (hides)
            for (int64_t t = 0; t < p.keys; t += tile)
                sights[t / tile] =
                    sight(lists.first + t, lists.last + t, smaller(tile, p.keys - t));
        Operated *queries = get(6, (Operated*)nullptr), *weights = get(8, (Operated*)nullptr);
        S *scores = get(7, (S*)nullptr), *sums = get(9, (S*)nullptr);
        for (int64_t head = kv_head * shared; head < (kv_head + 1) * shared; ++head) {
            if (lines) terms.fill(head);
            for (int64_t begin = first; begin < last; begin += block) {
                const int64_t count = smaller(block, last - begin);
                M::load_queries(p, row, head, begin, count, inner, queries, wide);
                for (int64_t i = 0; i < block * width; ++i) sums[i] = 0;
                S top[block], total[block];
                for (int64_t i = 0; i < block; ++i) top[i] = -infinity<S>(), total[i] = 0;
                for (int64_t t = 0; t < padded; t += tile) {
                    const bool some = !hides || sights[t / tile].any(begin, begin + count);
                    if (!some) continue;
                    const bool hiding = hides && !sights[t / tile].all(begin, begin + count);
                    const int64_t columns = smaller(tile, padded - t);
                    M::scores(queries, count, inner, keys + t * inner, columns, scores);
                    for (int64_t i = 0; i < count; ++i)
                        softmax_row(lists, hiding, p.terms ? &terms : nullptr, begin + i, head, t,
                                    columns, scores + i * tile, weights + i * tile,
                                    sums + i * width, top[i], total[i]);
                    M::weighted(weights, count, columns, values + t * width, width, sums);
                }
                finish(row, head, begin, count, total, sums);
            }
        }
    }

    void softmax_row(const KeyLists<V>& lists, bool hiding, const DistanceTerms<V>* terms,
                     int64_t query, int64_t head, int64_t t, int64_t columns, S* scores,
                     Operated* weights, S* sums, S& top, S& total) const {
        const S* line = terms && terms->step ? terms->line(query) : nullptr;
        const V scale = V::set(static_cast<S>(p.scale * log2_e));
        const S found =
            score_row<V>(scores, t, columns, scale, lists, hiding, terms, line, query, head);
        const S now = found > top ? found : top;
        const S safe = now == -infinity<S>() ? S(0) : now;
        const V shift = V::set(safe);
        V sum = V::zero();
        for (int64_t i = 0; i < columns; i += V::width) {
            const V e = exp2_negative(V::load(scores + i) - shift);
            M::store(weights + i, e);
            sum = sum + e;
        }
        const S change = top == now ? S(1) : exp2_of(top - safe);
        total = total * change + sum.sum();
        if (change != 1)
            for (int64_t i = 0; i < width; i += V::width)
                (V::load(sums + i) * V::set(change)).store(sums + i);
        top = now;
    }

    void finish(int64_t row, int64_t head, int64_t begin, int64_t count, const S* total,
                const S* sums) const {
        for (int64_t i = 0; i < count; ++i) {
            const bool nothing = total[i] == 0;
            const V factor = V::set(nothing ? S(0) : 1 / total[i]);
            E* out =
                static_cast<E*>(p.out) + ((row * p.queries + begin + i) * p.heads + head) * p.d;
            for_parts<V>(p.d, [&](Part<V> part) {
                const V sum = part.template load<Acc<V>>(sums + i * width);
                part.template store<Storage<V, dtype>>(out, sum * factor);
            });
        }
    }
};

template <class V, DType dtype>
void attention(const AttentionParams& p) {
    AttentionForward<V, dtype>{p}.run();
}

}  // namespace VARIATOR_ISA
}  // namespace variator
