// grouped_attention for few queries over many keys (decoding): all query vectors that share a head
// of keys meet them where they lie, in one pass. Keys are cut into chunks for the threads, and what
// the chunks give is merged exactly (flash-decoding). Cuts depend on sizes alone, not on threads.
#pragma once

#include "attention_rows.h"
#include "attention_visible.h"

namespace variator {
namespace VARIATOR_ISA {

struct DirectSizes {
    int64_t shared, vectors, width, tile, chunks, chunk, pairs;

    DirectSizes(const AttentionParams& p, int64_t lanes) {
        shared = p.heads / p.kv_heads;
        vectors = shared * p.queries;  // one a query and head
        width = round_up(p.d, lanes);
        tile = vectors <= 8 ? 128 : 64;  // its scores stay in the first-level cache
        const int64_t most = 256 * larger(1, vectors / 8);  // few sums beside the keys of a chunk
        chunks = larger(1, (p.keys + most - 1) / most);
        chunk = round_up((p.keys + chunks - 1) / chunks, 16);
        pairs = p.rows * p.kv_heads;
    }
};

// Of query vectors: sums of values by weights e^(score - top), and of the weights. A top is a score
// that no other exceeds by more than `slack`, so it seldom changes.
template <class S>
struct WeightedSums {
    S *top, *total, *sums;  // [vectors], [vectors], [vectors][width]
    WeightedSums from(int64_t vector, int64_t width) const {
        return {top + vector, total + vector, sums + vector * width};
    }
};

template <class V, DType dtype>
struct DirectPart {
    using S = typename V::Scalar;
    using T = Storage<V, dtype>;
    using E = typename T::Element;
    static constexpr bool half = dtype == DType::bfloat16 || dtype == DType::float16;
    static constexpr int slack = 6;

    const AttentionParams& p;
    const DirectSizes& sizes;
    int64_t row = 0, kv = 0;
    WeightedSums<S> found = {};
    S *queries = nullptr, *scores = nullptr;  // [vectors][width], [vectors][tile]
    VisibleKeys<V> keys{p};

    void arrange(Arrays& arrays) {
        arrays.take(queries, sizes.vectors * sizes.width);
        arrays.take(scores, sizes.vectors * sizes.tile);
        keys.arrange(arrays, sizes.tile);
    }

    // Keys begin .. end - 1 of a head; `to`: where the sums are made.
    void run(int64_t its_row, int64_t its_kv, int64_t begin, int64_t end,
             const WeightedSums<S>& to) {
        row = keys.row = its_row, kv = its_kv, found = to;
        for (int64_t i = 0; i < sizes.vectors; ++i) {
            found.top[i] = -infinity<S>(), found.total[i] = 0;
            widen_row(query(i), queries + i * sizes.width);
        }
        for (int64_t i = 0; i < sizes.vectors * sizes.width; ++i) found.sums[i] = 0;
        for (int64_t t = begin; t < end; t += sizes.tile) meet(t, smaller(t + sizes.tile, end));
    }

    int64_t head_of(int64_t vector) const { return kv * sizes.shared + vector / p.queries; }
    const E* query(int64_t vector) const {
        return vector_of<V, dtype>(p.q, row, vector % p.queries, head_of(vector));
    }
    E* out(int64_t vector) const {
        return static_cast<E*>(p.out) +
               ((row * p.queries + vector % p.queries) * p.heads + head_of(vector)) * p.d;
    }
    void widen_row(const E* from, S* to) const {
        for (int64_t i = p.d; i < sizes.width; ++i) to[i] = 0;
        for_parts<V>(p.d, [&](Part<V> part) {
            part.template store<Acc<V>>(to, part.template load<T>(from));
        });
    }

    void meet(int64_t begin, int64_t end) {
        const int64_t count = keys.fill(begin, end), padded = round_up(count, V::width);
        if (count == 0) return;
        const int64_t width = sizes.width, tile = sizes.tile;
        all_dots<V, dtype>(queries, sizes.vectors, width,
                           {vector_of<V, dtype>(p.k, row, 0, kv), keys.list, p.k.token}, padded,
                           p.d, scores, tile);
        for (int64_t s = 0; s < p.queries; ++s) {
            if (p.terms) keys.find_columns(s, count);
            for (int64_t i = s; i < sizes.vectors; i += p.queries) {
                if (p.terms) keys.look_up(head_of(i), count);
                weigh(scores + i * tile, s, padded, found.from(i, width));
            }
        }
        all_sums<V, dtype>(scores, sizes.vectors, tile,
                           {vector_of<V, dtype>(p.v, row, 0, kv), keys.list, p.v.token}, count, p.d,
                           found.sums, width);
    }

    // Products of query s become weights, in place.
    void weigh(S* scores, int64_t s, int64_t padded, const WeightedSums<S>& of) {
        V largest = V::set(-infinity<S>());
        for (int64_t i = 0; i < padded; i += V::width) {
            const V score = keys.score(V::load(scores + i), s, i);
            score.store(scores + i);
            largest = V::maximum(largest, score);
        }
        const S before = *of.top, now = largest.largest();
        if (now > before + S(slack)) {
            *of.top = now;
            if (before != -infinity<S>()) scale_by(exp2_of(before - now), of);
        }
        // Of a query that has seen no key all scores are -inf.
        const V shift = V::set(*of.top == -infinity<S>() ? S(0) : *of.top);
        V total = V::zero();
        for (int64_t i = 0; i < padded; i += V::width) {
            const V weight = exp2<half>((V::load(scores + i) - shift) * V::set(S(log2_e)));
            weight.store(scores + i);
            total = total + weight;
        }
        *of.total += total.sum();
    }

    static S exp2_of(S difference) {
        S lanes[V::width];
        exp2<half>(V::set(difference * S(log2_e))).store(lanes);
        return lanes[0];
    }
    void scale_by(S factor, const WeightedSums<S>& of) const {
        const V by = V::set(factor);
        *of.total *= factor;
        for (int64_t c = 0; c < sizes.width; c += V::width)
            (V::load(of.sums + c) * by).store(of.sums + c);
    }

    // 0 for a query that sees no key.
    void finish(int64_t vector, const WeightedSums<S>& of) const {
        const V by = V::set(*of.total == 0 ? S(0) : 1 / *of.total);
        E* to = out(vector);
        for_parts<V>(p.d, [&](Part<V> part) {
            part.template store<T>(to, part.template load<Acc<V>>(of.sums) * by);
        });
    }

    // What the chunks of a head gave, in their order, into the first.
    void merge(const WeightedSums<S>& chunks) const {
        for (int64_t i = 0; i < sizes.vectors; ++i) {
            const auto of = [&](int64_t chunk) {
                return chunks.from(chunk * sizes.vectors + i, sizes.width);
            };
            const WeightedSums<S> all = of(0);
            S top = *all.top;
            for (int64_t c = 1; c < sizes.chunks; ++c) top = *of(c).top > top ? *of(c).top : top;
            const S shift = top == -infinity<S>() ? S(0) : top;
            scale_by(exp2_of(*all.top - shift), all);
            for (int64_t c = 1; c < sizes.chunks; ++c) {
                const S factor = exp2_of(*of(c).top - shift);
                *all.total += *of(c).total * factor;
                for (int64_t at = 0; at < sizes.width; at += V::width) {
                    const V sum = V::load(of(c).sums + at), before = V::load(all.sums + at);
                    V::fma(sum, V::set(factor), before).store(all.sums + at);
                }
            }
            finish(i, all);
        }
    }
};

template <class V, DType dtype>
void direct_attention(const AttentionParams& p) {
    using S = typename V::Scalar;
    const DirectSizes sizes(p, V::width);
    const int64_t items = sizes.pairs * sizes.chunks, vectors = items * sizes.vectors;
    // Waking a thread takes as long as this many products.
    constexpr double least = 1.5e6;
    const double work = 2.0 * static_cast<double>(vectors) * static_cast<double>(sizes.chunk * p.d);
    const int64_t useful = smaller(p.threads, items);
    const int64_t threads = work < least * static_cast<double>(useful)
                                ? larger(1, static_cast<int64_t>(work / least))
                                : useful;
    WeightedSums<S> sums = {};
    int64_t *done = nullptr, next = 0;  // chunks of each head that are done; the next item
    char* own = nullptr;                // memory of each thread
    Arrays one, shared;
    DirectPart<V, dtype>{p, sizes}.arrange(one);
    const int64_t bytes = static_cast<int64_t>(one.carver.bytes);
    const auto arrange = [&] {
        shared.take(sums.top, vectors);
        shared.take(sums.total, vectors);
        shared.take(sums.sums, vectors * sizes.width);
        shared.take(done, sizes.pairs);
        shared.take(own, threads * bytes);
    };
    arrange();
    shared = {static_cast<char*>(thread_scratch(shared.carver.bytes))};
    arrange();
    for (int64_t i = 0; i < sizes.pairs; ++i) done[i] = 0;
    for_threads(threads, [&](int64_t thread) {
        DirectPart<V, dtype> part{p, sizes};
        Arrays arrays{own + thread * bytes};
        part.arrange(arrays);
        for (;;) {
            const int64_t item = __atomic_fetch_add(&next, int64_t{1}, __ATOMIC_RELAXED);
            if (item >= items) return;
            const int64_t pair = item / sizes.chunks, begin = item % sizes.chunks * sizes.chunk;
            part.run(pair / p.kv_heads, pair % p.kv_heads, begin,
                     smaller(begin + sizes.chunk, p.keys),
                     sums.from(item * sizes.vectors, sizes.width));
            // Whoever did a head's last chunk merges them.
            if (__atomic_add_fetch(&done[pair], int64_t{1}, __ATOMIC_ACQ_REL) == sizes.chunks)
                part.merge(sums.from(pair * sizes.chunks * sizes.vectors, sizes.width));
        }
    });
}

}  // namespace VARIATOR_ISA
}  // namespace variator
