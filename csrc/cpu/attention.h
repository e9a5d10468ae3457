// grouped_attention: one head's keys and values are packed once; blocks of queries then meet them
// tile by tile.
#pragma once

#include "attention_direct.h"
#include "attention_softmax.h"
#include "attention_tiles.h"

namespace variator {
namespace VARIATOR_ISA {

// What one thread does at a time: heads of keys and queries of a row. Few large items pack keys
// rarely; there must be enough of them to keep all threads busy to the end.
struct AttentionItems {
    int64_t heads, queries, by_heads, by_queries, count;

    AttentionItems(const AttentionParams& p, int64_t unit) {
        const int64_t wanted = 8 * larger(1, p.threads), pairs = p.rows * p.kv_heads;
        heads = larger(1, smaller(p.kv_heads, pairs / wanted));
        by_heads = (p.kv_heads + heads - 1) / heads;
        const int64_t cuts = (wanted - 1) / larger(1, p.rows * by_heads) + 1;
        queries = round_up(larger(1, (p.queries + cuts - 1) / cuts), unit);
        by_queries = (p.queries + queries - 1) / queries;
        count = p.rows * by_heads * by_queries;
    }
};

// Rows that come next, fetched into the second-level cache one at a time, while the softmax leaves
// the path to memory idle.
template <class E>
struct HeadRowsAhead {
    const E* at = nullptr;
    int64_t left = 0, stride = 0, length = 0;

    template <bool write>
    void next() {
        if (left <= 0) return;
        constexpr int64_t line = 64 / sizeof(E);
        for (int64_t i = 0; i < length; i += line) __builtin_prefetch(at + i, write, 2);
        at += stride, --left;
    }
};

template <class V, DType dtype, class M>
struct AttentionPart {
    using S = typename V::Scalar;
    using E = typename Storage<V, dtype>::Element;
    static constexpr bool half = dtype == DType::bfloat16 || dtype == DType::float16;
    static constexpr int64_t block = M::block, tile = M::tile;
    static constexpr int64_t together = 4;  // blocks that share a walk over the keys
    using Softmax = RunningSoftmax<V, M, half>;

    const AttentionParams& p;
    int64_t row, first, last;  // queries first .. last - 1
    M products{p};
    DistanceTerms<V> terms{p, row, first, last};
    KeyLists<V> lists{p, products.padded, tile, M::step};
    Softmax softmax[together] = {};
    S *scores = nullptr, *sums = nullptr;
    typename M::Element* weights = nullptr;
    HeadRowsAhead<E> next_keys = {}, next_values = {}, next_queries = {}, outputs = {};

    void arrange(Arrays arrays) {
        products.arrange(arrays, together);
        terms.arrange(arrays);
        lists.arrange(arrays);
        for (Softmax& each : softmax) each.arrange(arrays);
        arrays.take(scores, block * tile);
        arrays.take(weights, M::weights());
        arrays.take(sums, together * block * products.width);
        if (!arrays.memory) arrange({static_cast<char*>(thread_scratch(arrays.carver.bytes))});
    }

    // Heads of keys from first_head on; returns the first one that it cannot do, or last_head.
    int64_t heads(int64_t first_head, int64_t last_head) {
        terms.plan(products.padded);
        arrange({});
        terms.place();
        lists.fill(terms);
        [[maybe_unused]] const typename M::Session session;
        const int64_t shared = p.heads / p.kv_heads;
        for (int64_t kv = first_head; kv < last_head; ++kv) {
            if (!products.pack(row, kv)) return kv;
            if (kv + 1 < last_head) {
                next_keys = {vector_of<V, dtype>(p.k, row, 0, kv + 1), p.keys, p.k.token, p.d};
                next_values = {vector_of<V, dtype>(p.v, row, 0, kv + 1), p.keys, p.v.token, p.d};
            }
            for (int64_t head = kv * shared; head < (kv + 1) * shared; ++head) {
                terms.fill(head);
                for (int64_t begin = first; begin < last; begin += together * block)
                    if (!blocks(head, begin)) return kv;
            }
        }
        return last_head;
    }

    bool blocks(int64_t head, int64_t begin) {
        const int64_t width = products.width, many = smaller(together * block, last - begin);
        const bool more = begin + many < last;
        if (more || head + 1 < p.heads)
            next_queries = {
                vector_of<V, dtype>(p.q, row, more ? begin + many : first, head + !more),
                more ? last - begin - many : smaller(together * block, last - first), p.q.token,
                p.d};
        outputs = {out(head, begin), many, p.heads * p.d, p.d};
        for (int64_t at = 0; at * block < many; ++at) {
            const int64_t count = smaller(block, many - at * block);
            if (!products.load_queries(row, head, begin + at * block, count, at)) return false;
            softmax[at].start();
        }
        for (int64_t i = 0; i < round_up(many, block) * width; ++i) sums[i] = 0;
        for (int64_t t = 0; t < products.padded; t += tile)
            for (int64_t at = 0; at * block < many; ++at)
                meet(head, t, at, begin + at * block, smaller(block, many - at * block));
        for (int64_t i = 0; i < many; ++i)
            finish(head, begin + i, softmax[i / block].factor(i % block), sums + i * width);
        return true;
    }

    // Queries query .. query + count - 1, the at-th block, and the keys of the tile from t on.
    void meet(int64_t head, int64_t t, int64_t at, int64_t query, int64_t count) {
        const KeysMet met = lists.met(t, query, query + count);
        const int64_t columns = met.end - met.begin;
        if (columns == 0) return;
        const V scale = V::set(static_cast<S>(p.scale));
        S* of_block = sums + at * block * products.width;
        products.scores(at, count, met.begin, columns, scores);
        const ScoreTerms<V> added{lists, terms, met.begin, columns, head, met.hides, scale};
        softmax[at].add(added, query, count, scores, weights, of_block, products.width, [&] {
            next_queries.template next<false>();
            outputs.template next<true>();
            next_keys.template next<false>();
            next_values.template next<false>();
        });
        products.weighted(weights, count, met.begin, columns, of_block);
    }

    void finish(int64_t head, int64_t query, S factor, const S* sums) const {
        const V by = V::set(factor);
        E* to = out(head, query);
        for_parts<V>(p.d, [&](Part<V> part) {
            part.template store<Storage<V, dtype>>(to, part.template load<Acc<V>>(sums) * by);
        });
    }
    E* out(int64_t head, int64_t query) const {
        return static_cast<E*>(p.out) + ((row * p.queries + query) * p.heads + head) * p.d;
    }
};

template <class V, DType dtype>
void packed_attention(const AttentionParams& p) {
    using M = Multiply<V, dtype>;
    using Wide = WideProducts<V, dtype>;
    const AttentionItems items(p, 2 * M::block);
    for_items(items.count, p.threads, [&](int64_t item) {
        const int64_t part = item % items.by_queries, pair = item / items.by_queries;
        const int64_t row = pair / items.by_heads, first = part * items.queries;
        const int64_t last = smaller(first + items.queries, p.queries);
        int64_t head = pair % items.by_heads * items.heads;
        const int64_t end = smaller(head + items.heads, p.kv_heads);
        for (; head < end; ++head) {
            head = AttentionPart<V, dtype, M>{p, row, first, last}.heads(head, end);
            if (head == end) return;
            AttentionPart<V, dtype, Wide>{p, row, first, last}.heads(head, head + 1);
        }
    });
}

// `few`: query vectors that share a head of keys; more of them are worth packed keys.
template <class V, DType dtype>
void attention(const AttentionParams& p) {
    if (p.rows == 0 || p.queries == 0 || p.heads == 0) return;
    const bool few = p.heads / p.kv_heads * p.queries <= Multiply<V, dtype>::few;
    if (p.path == AttentionPath::direct || (p.path == AttentionPath::automatic && few))
        return direct_attention<V, dtype>(p);
    packed_attention<V, dtype>(p);
}

}  // namespace VARIATOR_ISA
}  // namespace variator
