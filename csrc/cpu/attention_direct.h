// grouped_attention for few queries over many keys (decoding): all query vectors that share a head
// of keys meet them where they lie, in one pass. Keys are cut into chunks for the threads, and what
// the chunks give is merged exactly (flash-decoding). Cuts depend on sizes alone, not on threads.
#pragma once

#include "attention_rows.h"

namespace variator {
namespace VARIATOR_ISA {

struct DirectSizes {
    static constexpr int64_t most_keys = 256;  // of a chunk
    int64_t shared, vectors, width, tile, chunks, chunk, pairs;

    DirectSizes(const AttentionParams& p, int64_t lanes) {
        shared = p.heads / p.kv_heads;
        vectors = shared * p.queries;  // one a query and head
        width = round_up(p.d, lanes);
        tile = vectors <= 8 ? 128 : 64;  // its scores stay in the first-level cache
        chunks = larger(1, (p.keys + most_keys - 1) / most_keys);
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
    S *queries = nullptr, *scores = nullptr;      // [vectors][width], [vectors][tile]
    int64_t *list = nullptr, *columns = nullptr;  // [tile]: keys that somebody sees
    S *bias = nullptr, *first = nullptr, *last = nullptr, *added = nullptr;

    bool hides() const { return p.first || p.last; }
    void arrange(Arrays& arrays) {
        arrays.take(queries, sizes.vectors * sizes.width);
        arrays.take(scores, sizes.vectors * sizes.tile);
        arrays.take(list, sizes.tile);
        arrays.take(bias, sizes.tile), arrays.take(added, sizes.tile);
        arrays.take(first, sizes.tile), arrays.take(last, sizes.tile);
        arrays.take(columns, sizes.tile);
    }

    // Keys begin .. end - 1 of a head; `to`: where the sums are made.
    void run(int64_t its_row, int64_t its_kv, int64_t begin, int64_t end,
             const WeightedSums<S>& to) {
        row = its_row, kv = its_kv, found = to;
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

    // Lists keys that some query sees; pads repeat the last one, unseen, up to a whole vector.
    int64_t list_keys(int64_t begin, int64_t end) {
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

    void meet(int64_t begin, int64_t end) {
        const int64_t count = list_keys(begin, end), padded = round_up(count, V::width);
        if (count == 0) return;
        const int64_t width = sizes.width, tile = sizes.tile;
        all_dots<V, dtype>(queries, sizes.vectors, width,
                           {vector_of<V, dtype>(p.k, row, 0, kv), list, p.k.token}, padded, p.d,
                           scores, tile);
        for (int64_t s = 0; s < p.queries; ++s) {
            if (p.terms) find_columns(s, count);
            for (int64_t i = s; i < sizes.vectors; i += p.queries) {
                if (p.terms) look_up(head_of(i), count);
                weigh(scores + i * tile, s, padded, found.from(i, width));
            }
        }
        all_sums<V, dtype>(scores, sizes.vectors, tile,
                           {vector_of<V, dtype>(p.v, row, 0, kv), list, p.v.token}, count, p.d,
                           found.sums, width);
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

    // Products of query s become weights, in place.
    void weigh(S* scores, int64_t s, int64_t padded, const WeightedSums<S>& of) {
        const V scale = V::set(static_cast<S>(p.scale)), at = V::set(static_cast<S>(s));
        const V hidden = V::set(-infinity<S>()), unit = V::set(S(log2_e));
        V largest = hidden;
        for (int64_t i = 0; i < padded; i += V::width) {
            V score = V::fma(V::load(scores + i), scale, V::load(bias + i));
            if (p.terms) score = score + V::load(added + i);
            if (hides()) {
                score = V::less_select(at, V::load(first + i), hidden, score);
                score = V::less_select(at, V::load(last + i), score, hidden);
            }
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
            const V weight = exp2<half>((V::load(scores + i) - shift) * unit);
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
    constexpr int64_t least = 500000;
    const int64_t wanted = p.rows * p.heads * p.queries * p.keys * p.d * 2 / least;
    const int64_t threads = larger(1, smaller(smaller(wanted, p.threads), items));
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
