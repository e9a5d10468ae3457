// The gradients of grouped_attention that come from some queries of one head of keys. With
// e = exp(score - top) and t = Σ e over the keys of a query:
//   P = e / t,  dP = dO Vᵀ,  δ = Σ P dP,  dS = P (dP - δ),
//   dV = Pᵀ dO,  dK = scale · dSᵀ Q,  dQ = scale · dS K,  dbias = Σ dS.
// e and dP of a block of queries and all its keys lie in scratch memory, so no product is made
// twice, and the forward pass has nothing to save: δ from its rounded output would not cancel, and
// one number, the logsumexp, is not exact enough for large scores.
#pragma once

#include "attention_products.h"
#include "attention_softmax.h"
#include "thread_sums.h"

namespace variator {
namespace VARIATOR_ISA {

// How the work is cut: by sizes alone, so that results do not depend on threads.
struct GradientItems {
    int64_t heads, queries;        // of a block
    int64_t chunk, chunks, count;  // queries of an item, items of a head of keys, items

    GradientItems(const AttentionParams& p, int64_t block) {
        constexpr int64_t enough = 16, most = 8, least_blocks = 4;
        const int64_t shared = p.heads / p.kv_heads, pairs = p.rows * p.kv_heads;
        // Together the heads meet fewer keys of a window. Terms of distances are there for one.
        heads = p.terms ? 1 : larger(1, smaller(shared, block));
        queries = block / heads;
        const int64_t blocks = up(p.queries, queries) * up(shared, heads);
        chunks = smaller(smaller(up(enough, pairs), most), larger(1, blocks / least_blocks));
        chunk = larger(queries, round_up(up(p.queries, chunks), queries));
        chunks = larger(1, up(p.queries, chunk));
        count = pairs * chunks;
    }
    static int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }
};

// Sums over the queries of an item, by key.
template <class S>
struct KeySums {
    S *keys, *values, *bias;  // [padded][width], [padded][width], [padded] or null
    uint8_t* met;             // a byte a step of keys; 0: no query sees them, they have no sums
};

template <class V, DType dtype>
struct AttentionGradients {
    using S = typename V::Scalar;
    using T = Storage<V, dtype>;
    using E = typename T::Element;
    static constexpr bool half = dtype == DType::bfloat16 || dtype == DType::float16;
    static constexpr int64_t block = 8 * V::tile_rows, tile = 256, step = panel_columns<V>();

    // Keys of a tile that a block meets, and their columns in its arrays.
    struct Span {
        int64_t begin, columns, at;
        bool hides;
    };

    const AttentionBackwardParams& p;
    const GradientItems& items;
    int64_t row, kv, first, last;  // queries first .. last - 1
    KeySums<S> sums;
    int64_t padded = round_up(p.keys, V::width), width = round_up(p.d, V::width);
    DistanceTerms<V> terms{p, row, first, last};
    KeyLists<V> lists{p, padded, tile, step};
    S *key_panels = nullptr, *value_panels = nullptr, *keys = nullptr, *staged = nullptr;
    S *q = nullptr, *d_out = nullptr, *d_q = nullptr;  // [block][width]
    S *e = nullptr, *d_scores = nullptr;               // [block][stride]; d_scores: dP before
    // By lane: a query's largest score, Σ e and Σ e dP.
    S *tops = nullptr, *totals = nullptr, *dots = nullptr;  // [block][V::width]
    S *inverses = nullptr, *deltas = nullptr;               // [block]: 1 / t, δ
    S* column_sums = nullptr;                               // [tile]
    Span* spans = nullptr;
    int64_t span_count = 0, stride = 0;

    // An odd number of cache lines: a column's rows then lie in different sets of the cache.
    static int64_t odd_lines(int64_t columns) {
        constexpr int64_t line = 64 / sizeof(S);
        return (round_up(columns, line) / line | 1) * line;
    }
    void arrange(Arrays arrays) {
        terms.arrange(arrays);
        lists.arrange(arrays);
        const auto take = [&](int64_t count, auto&... each) { (arrays.take(each, count), ...); };
        take(padded * p.d, key_panels, value_panels);
        take(padded * width, keys);
        take(V::width * width, staged);
        take(block * width, q, d_out, d_q);
        take(block * odd_lines(padded), e, d_scores);
        take(block * V::width, tops, totals, dots);
        take(block, inverses, deltas);
        take(tile, column_sums);
        take((padded + step - 1) / step, spans);
        if (items.chunks == 1) take(padded * width, sums.keys, sums.values);
        if (!arrays.memory) arrange({static_cast<char*>(thread_scratch(arrays.carver.bytes))});
    }

    // Writes dQ, and `sums`.
    void run() {
        terms.plan(padded);
        arrange({});
        terms.place();
        lists.fill(terms);
        pack();
        const int64_t shared = p.heads / p.kv_heads, end = (kv + 1) * shared;
        for (int64_t head = kv * shared; head < end; head += items.heads) {
            terms.fill(head);
            for (int64_t query = first; query < last; query += items.queries)
                differentiate(head, smaller(items.heads, end - head), query,
                              smaller(items.queries, last - query));
        }
    }

    void pack() {
        const WideHead<V, dtype> k{p, p.k, row, kv, width}, v{p, p.v, row, kv, width};
        for (int64_t j = 0; j < padded; j += V::width) {
            uint8_t& met = sums.met[j / step];
            met = lists.meets(j, first, last);
            if (!met) continue;
            k.columns(j, padded, staged, key_panels);
            v.columns(j, padded, staged, value_panels);
            for (int64_t i = j; i < j + V::width; ++i) k.row_of(i, keys);
            zero_row<V>(sums.keys + j * width, V::width * width);
            zero_row<V>(sums.values + j * width, V::width * width);
            if (sums.bias) zero_row<V>(sums.bias + j, V::width);
        }
    }

    // A block: `count` queries of each of `heads` heads, head by head.
    void differentiate(int64_t head, int64_t heads, int64_t query, int64_t count) {
        const int64_t rows = heads * count;
        for (int64_t i = 0; i < rows; ++i) {
            const int64_t at = query + i % count, of = head + i / count;
            widen<V, dtype>(vector_of<V, dtype>(p.q, row, at, of), p.d, width, q + i * width);
            widen<V, dtype>(vector_of<V, dtype>(p.d_out, row, at, of), p.d, width,
                            d_out + i * width);
        }
        zero_row<V>(d_q, rows * width);
        for (int64_t i = 0; i < rows * V::width; ++i)
            tops[i] = -infinity<S>(), totals[i] = dots[i] = 0;
        find_spans(query, query + count);
        for (int64_t i = 0; i < span_count; ++i) score(spans[i], rows, head, query, count);
        for (int64_t i = 0; i < span_count; ++i) weigh(spans[i], rows);
        for (int64_t i = 0; i < rows; ++i) {
            const S total = V::load(totals + i * V::width).sum();
            inverses[i] = total == 0 ? S(0) : 1 / total;  // of a query that sees no key
            deltas[i] = V::load(dots + i * V::width).sum() * inverses[i];
            scale_row(q + i * width, inverses[i]);
            scale_row(d_out + i * width, inverses[i]);
        }
        for (int64_t i = 0; i < span_count; ++i) gather(spans[i], rows);
        for (int64_t i = 0; i < rows; ++i)
            store_row(d_q + i * width, inverses[i] * static_cast<S>(p.scale), query + i % count,
                      head + i / count);
    }

    // Steps of keys that nobody of the item sees hold nothing: no span has one.
    void find_spans(int64_t query, int64_t behind) {
        span_count = 0;
        int64_t at = 0;
        for (int64_t t = 0; t < padded; t += tile) {
            const KeysMet met = lists.met(t, query, behind);
            for (int64_t begin = met.begin, end; begin < met.end; begin = end + step) {
                for (end = begin; end < met.end && lists.meets(end, query, behind);) end += step;
                const int64_t columns = smaller(end, met.end) - begin;
                if (columns == 0) continue;
                spans[span_count++] = {begin, columns, at, met.hides};
                at += columns;
            }
        }
        stride = odd_lines(at);
    }

    // Scores into e, and the largest of each query.
    void score(const Span& span, int64_t rows, int64_t head, int64_t query, int64_t count) {
        product<Plain<V>, V>(Strided{q, width, 1}, rows,
                             Operand<S>{key_panels + span.begin * p.d, 0}, span.columns,
                             e + span.at, stride, p.d, false);
        const V scale = V::set(static_cast<S>(p.scale));
        const ScoreTerms<V> added{lists, terms, span.begin, span.columns, head, span.hides, scale};
        for (int64_t i = 0; i < rows; ++i) {
            const V found = added.row(e + i * stride + span.at, query + i % count);
            S* top = tops + i * V::width;
            V::maximum(V::load(top), found).store(top);
        }
    }

    // Scores become e; dP; their sums.
    void weigh(const Span& span, int64_t rows) {
        product<Plain<V>, V>(Strided{d_out, width, 1}, rows,
                             Operand<S>{value_panels + span.begin * p.d, 0}, span.columns,
                             d_scores + span.at, stride, p.d, false);
        const V unit = V::set(S(log2_e));
        for (int64_t i = 0; i < rows; ++i) {
            const S top = V::load(tops + i * V::width).largest();
            const V shift = V::set(top == -infinity<S>() ? S(0) : top);
            S *weights = e + i * stride + span.at, *of_sums = totals + i * V::width;
            const S* d_weights = d_scores + i * stride + span.at;
            V total = V::zero(), dot = V::zero();
            for (int64_t c = 0; c < span.columns; c += V::width) {
                const V weight = exp2<half>((V::load(weights + c) - shift) * unit);
                weight.store(weights + c);
                total = total + weight;
                dot = V::fma(weight, V::load(d_weights + c), dot);
            }
            (V::load(of_sums) + total).store(of_sums);
            of_sums = dots + i * V::width;
            (V::load(of_sums) + dot).store(of_sums);
        }
    }

    // dP becomes dS · t, and the three gradients grow; q and d_out are divided by t.
    void gather(const Span& span, int64_t rows) {
        if (sums.bias) zero_row<V>(column_sums, span.columns);
        for (int64_t i = 0; i < rows; ++i) {
            const V delta = V::set(deltas[i]), inverse = V::set(inverses[i]);
            const S* weights = e + i * stride + span.at;
            S* d_score = d_scores + i * stride + span.at;
            for (int64_t c = 0; c < span.columns; c += V::width) {
                const V x = V::load(weights + c) * (V::load(d_score + c) - delta);
                x.store(d_score + c);
                if (sums.bias) V::fma(x, inverse, V::load(column_sums + c)).store(column_sums + c);
            }
        }
        if (sums.bias) add_row<V>(sums.bias + span.begin, column_sums, span.columns);
        const int64_t at = span.begin * width;
        product<Plain<V>, V>(Strided{e + span.at, 1, stride}, span.columns,
                             Operand<S>{d_out, width}, width, sums.values + at, width, rows, true);
        product<Plain<V>, V>(Strided{d_scores + span.at, 1, stride}, span.columns,
                             Operand<S>{q, width}, width, sums.keys + at, width, rows, true);
        product<Plain<V>, V>(Strided{d_scores + span.at, stride, 1}, rows,
                             Operand<S>{keys + at, width}, width, d_q, width, span.columns, true);
    }

    void scale_row(S* vector, S factor) const {
        const V by = V::set(factor);
        for (int64_t c = 0; c < width; c += V::width) (V::load(vector + c) * by).store(vector + c);
    }
    void store_row(const S* from, S factor, int64_t query, int64_t head) const {
        const V by = V::set(factor);
        E* to = static_cast<E*>(p.d_q) + ((row * p.queries + query) * p.heads + head) * p.d;
        for_parts<V>(p.d, [&](Part<V> part) {
            part.template store<T>(to, part.template load<Acc<V>>(from) * by);
        });
    }
};

}  // namespace VARIATOR_ISA
}  // namespace variator
