// The backward pass of grouped_attention: a head of keys and some of its queries are an item of
// work (attention_gradients.h). Where there are few heads, queries are cut into chunks, and their
// sums by key are added in order.
#pragma once

#include "attention_gradients.h"

namespace variator {
namespace VARIATOR_ISA {

// What the items leave, of `chunks` items for each head of keys.
template <class V, DType dtype>
struct GradientSums {
    using S = typename V::Scalar;
    static constexpr int64_t step = AttentionGradients<V, dtype>::step;
    const AttentionBackwardParams& p;
    const GradientItems& items;
    int64_t padded = round_up(p.keys, V::width), width = round_up(p.d, V::width);
    int64_t steps = (padded + step - 1) / step;
    KeySums<S> first = {};  // of item 0; the others follow
    Allocation memory;

    GradientSums(const AttentionBackwardParams& params, const GradientItems& cut)
        : p(params), items(cut) {
        Arrays arrays;
        arrange(arrays);
        memory.take(arrays.carver.bytes);
        arrays = {memory.data()};
        arrange(arrays);
    }
    void arrange(Arrays& arrays) {
        arrays.take(first.met, items.count * steps);
        if (p.d_bias) arrays.take(first.bias, items.count * padded);
        if (items.chunks == 1) return;  // a thread keeps them in its cache
        arrays.take(first.keys, items.count * padded * width);
        arrays.take(first.values, items.count * padded * width);
    }
    KeySums<S> of(int64_t item) const {
        const auto at = [&](S* sums, int64_t size) { return sums ? sums + item * size : nullptr; };
        return {at(first.keys, padded * width), at(first.values, padded * width),
                at(first.bias, padded), first.met + item * steps};
    }

    // f(key, chunk) for the chunks that have sums of a key.
    template <class F>
    void each_chunk(int64_t pair, int64_t key, F f) const {
        for (int64_t chunk = 0; chunk < items.chunks; ++chunk)
            if (first.met[(pair * items.chunks + chunk) * steps + key / step]) f(chunk);
    }
    // Gradients of a head of keys; `sums` are those of its first chunk.
    void store(int64_t pair, const KeySums<S>& sums) const {
        const int64_t row = pair / p.kv_heads, kv = pair % p.kv_heads;
        for (int64_t j = 0; j < p.keys; ++j) {
            const int64_t to = ((row * p.keys + j) * p.kv_heads + kv) * p.d;
            store_row(pair, j, sums.keys, static_cast<S>(p.scale), p.d_k, to);
            store_row(pair, j, sums.values, S(1), p.d_v, to);
        }
    }
    void store_row(int64_t pair, int64_t j, const S* sums, S factor, void* out, int64_t to) const {
        using T = Storage<V, dtype>;
        for_parts<V>(p.d, [&](Part<V> part) {
            V sum = V::zero();
            each_chunk(pair, j, [&](int64_t chunk) {
                sum = sum + part.template load<Acc<V>>(sums + (chunk * padded + j) * width);
            });
            part.template store<T>(static_cast<typename T::Element*>(out) + to,
                                   sum * V::set(factor));
        });
    }
    void store_biases() const {
        for (int64_t row = 0; row < p.rows; ++row)
            for (int64_t j = 0; j < p.keys; ++j) {
                S sum = 0;
                for (int64_t pair = row * p.kv_heads; pair < (row + 1) * p.kv_heads; ++pair)
                    each_chunk(pair, j, [&](int64_t chunk) {
                        sum += first.bias[(pair * items.chunks + chunk) * padded + j];
                    });
                static_cast<S*>(p.d_bias)[row * p.keys + j] = sum;
            }
    }
};

template <class V, DType dtype>
void attention_backward(const AttentionBackwardParams& p) {
    if (p.rows == 0) return;
    const GradientItems items(p, AttentionGradients<V, dtype>::block);
    const GradientSums<V, dtype> sums(p, items);
    for_items(items.count, p.threads, [&](int64_t item) {
        const int64_t pair = item / items.chunks, first = item % items.chunks * items.chunk;
        AttentionGradients<V, dtype> part{p,
                                          items,
                                          pair / p.kv_heads,
                                          pair % p.kv_heads,
                                          first,
                                          smaller(first + items.chunk, p.queries),
                                          sums.of(item)};
        part.run();
        if (items.chunks == 1) sums.store(pair, part.sums);
    });
    if (items.chunks > 1)
        for_items(p.rows * p.kv_heads, p.threads,
                  [&](int64_t pair) { sums.store(pair, sums.of(pair * items.chunks)); });
    if (p.d_bias) sums.store_biases();
}

}  // namespace VARIATOR_ISA
}  // namespace variator
