// Gradients of group_merge. With h = norm(x), s = W_c·concat(h) + b_c, a = softmax(s), g = Σ a_j
// h_j:
//   da_j = dg·h_j,  ds = a (da - Σ a da),  dW_c = Σ ds concat(h)ᵀ,  db_c = Σ ds,
//   dh_j = a_j dg + W_c[:, slot j]ᵀ ds + W_1hᵀ dp_j,  dW_1h = Σ dp hᵀ,  and dx through the norm.
// h is computed again from x in both passes, so it never exists as an array.
#pragma once

#include "merge.h"
#include "thread_sums.h"

namespace variator {
namespace VARIATOR_ISA {

template <class V, DType dtype>
struct MergeBackward {
    using S = typename V::Scalar;
    using T = Storage<V, dtype>;
    using E = typename T::Element;
    using Products = Plain<V>;
    const MergeBackwardParams& p;
    const int64_t k = p.groups.k;
    const int64_t padded = round_up(p.d, V::width);
    const int64_t scores = round_up(k, V::width);
    const int64_t projected = round_up(p.r, V::width);
    ThreadSums<S> merge_weight{p.threads, k * k, p.d, padded};
    ThreadSums<S> merge_bias{p.threads, 1, k, scores};
    ThreadSums<S> projection{p.threads, p.r, p.d, padded};
    ThreadSums<S> norm_weight{p.threads, 1, p.d, padded}, norm_bias{p.threads, 1, p.d, padded};

    void chunk(int64_t first, int64_t last, int thread) const {
        const int64_t rows = last - first;
        Carver carver;
        const int64_t h_at = carver.reserve<S>(rows * padded),
                      dh_at = carver.reserve<S>(rows * padded),
                      dg_at = carver.reserve<S>(rows * padded),
                      dp_at = carver.reserve<S>(rows * projected),
                      ds_at = carver.reserve<S>(rows * scores),
                      norm_at = carver.reserve<S>(2 * padded), bias_at = carver.reserve<S>(scores),
                      stats_at = carver.reserve<Statistics<S>>(rows * k);
        char* base = static_cast<char*>(thread_scratch(carver.bytes));
        auto at = [&](int64_t offset) { return reinterpret_cast<S*>(base + offset); };
        S *h = at(h_at), *dh = at(dh_at), *dg = at(dg_at), *dp = at(dp_at), *ds = at(ds_at);
        // Sums of a chunk first: one running sum over all tokens would round too often.
        S *d_norm = at(norm_at), *d_bias = at(bias_at);
        zero_row<V>(d_bias, scores);
        auto* stats = reinterpret_cast<Statistics<S>*>(base + stats_at);

        for (int64_t m = 0; m < rows; ++m)
            normed_row<V, dtype, Acc<V>>(static_cast<const E*>(p.d_merged) + (first + m) * p.d, p.d,
                                         padded, {0, 1}, nullptr, nullptr, dg + m * padded);
        for (int64_t m = 0; m < rows; ++m) {
            for (int64_t j = 0; j < k; ++j) {
                ds[m * scores + j] = 0;
                if (!p.groups.has(first + m, j)) continue;
                stats[m * k + j] = statistics<V, dtype>(x_row(first + m, j), p.d, p.norm, p.eps);
                load_row(first + m, j, stats[m * k + j], h);
                V dot = V::zero();
                for (int64_t i = 0; i < padded; i += V::width)
                    dot = V::fma(V::load(dg + m * padded + i), V::load(h + i), dot);
                ds[m * scores + j] = dot.sum();
            }
            through_softmax(first + m, ds + m * scores, d_bias);
        }
        add_row<V>(merge_bias.of(thread), d_bias, scores);
        const auto* rows_of_merge = static_cast<const S*>(p.merge_packed_rows);
        for (int64_t j = 0; j < k; ++j) {
            slot_rows(first, rows, j, stats, h, dg, dh, dp);
            product<Products, V>(Strided{ds, scores, 1}, rows, {rows_of_merge + j * k * padded, 0},
                                 padded, dh, padded, k, true);
            if (p.d_merge_weight)
                product<Products, V>(Strided{ds, 1, scores}, k, {h, padded}, padded,
                                     merge_weight.of(thread) + j * k * padded, padded, rows, true);
            if (p.d_projected) {
                product<Products, V>(Strided{dp, projected, 1}, rows,
                                     {static_cast<const S*>(p.projection_packed_rows), 0}, padded,
                                     dh, padded, p.r, true);
                product<Products, V>(Strided{dp, 1, projected}, p.r, {h, padded}, padded,
                                     projection.of(thread), padded, rows, true);
            }
            zero_row<V>(d_norm, 2 * padded);
            for (int64_t m = 0; m < rows; ++m)
                if (p.groups.has(first + m, j))
                    through_norm(first + m, j, stats[m * k + j], dh + m * padded, d_norm);
            add_row<V>(norm_weight.of(thread), d_norm, padded);
            add_row<V>(norm_bias.of(thread), d_norm + padded, padded);
        }
    }

    const E* x_row(int64_t group, int64_t slot) const {
        return static_cast<const E*>(p.x) + (p.groups.start[group] + slot) * p.x_stride;
    }

    void load_row(int64_t group, int64_t slot, Statistics<S> s, S* h) const {
        normed_row<V, dtype, Acc<V>>(x_row(group, slot), p.d, padded, s,
                                     static_cast<const S*>(p.norm_weight),
                                     static_cast<const S*>(p.norm_bias), h);
    }

    // ds from da, in place; absent slots have a = 0 and so ds = 0.
    void through_softmax(int64_t group, S* ds, S* d_bias) const {
        const S* a = static_cast<const S*>(p.softmax) + group * k;
        S mean = 0;
        for (int64_t j = 0; j < k; ++j) mean += a[j] * ds[j];
        for (int64_t j = 0; j < k; ++j) {
            ds[j] = p.groups.has(group, j) ? a[j] * (ds[j] - mean) : S(0);
            d_bias[j] += ds[j];
        }
    }

    // For slot j of each group: h, the direct part a_j dg of dh, and dp; zeros where it is absent.
    void slot_rows(int64_t first, int64_t rows, int64_t j, const Statistics<S>* stats, S* h,
                   const S* dg, S* dh, S* dp) const {
        for (int64_t m = 0; m < rows; ++m) {
            S *h_row = h + m * padded, *dh_row = dh + m * padded, *dp_row = dp + m * projected;
            if (!p.groups.has(first + m, j)) {
                zero_row<V>(h_row, padded);
                zero_row<V>(dh_row, padded);
                zero_row<V>(dp_row, projected);
                continue;
            }
            load_row(first + m, j, stats[m * k + j], h_row);
            const V a = V::set(static_cast<const S*>(p.softmax)[(first + m) * k + j]);
            for (int64_t i = 0; i < padded; i += V::width)
                (a * V::load(dg + m * padded + i)).store(dh_row + i);
            if (!p.d_projected) continue;
            const S* source =
                static_cast<const S*>(p.d_projected) + (p.groups.start[first + m] + j) * p.r;
            for (int64_t i = 0; i < projected; ++i) dp_row[i] = i < p.r ? source[i] : S(0);
        }
    }

    // dx from dh: with n = (x - mean) rstd and e = weight·dh,
    // dx = rstd (e - n mean(e n)), for LayerNorm less rstd mean(e) besides.
    void through_norm(int64_t group, int64_t slot, Statistics<S> s, const S* dh, S* d_norm) const {
        const E* x = x_row(group, slot);
        E* dx = static_cast<E*>(p.dx) + (p.groups.start[group] + slot) * p.d;
        const S* weight = static_cast<const S*>(p.norm_weight);
        const V mean = V::set(s.mean), rstd = V::set(s.rstd);
        auto normalised = [&](Part<V> part) { return (part.template load<T>(x) - mean) * rstd; };
        auto scaled = [&](Part<V> part) {
            V e = part.template load<Acc<V>>(dh);
            return weight ? e * part.template load<Acc<V>>(weight) : e;
        };
        S mean_e = 0, mean_en = 0;
        if (p.norm != Norm::none) {
            V e_sum = V::zero(), en_sum = V::zero();
            // Lanes beyond a short last part load as 0 in dh, so they add nothing.
            for_parts<V>(p.d, [&](Part<V> part) {
                V e = scaled(part);
                e_sum = e_sum + e;
                en_sum = V::fma(e, normalised(part), en_sum);
            });
            mean_en = en_sum.sum() / static_cast<S>(p.d);
            if (p.norm == Norm::layer) mean_e = e_sum.sum() / static_cast<S>(p.d);
        }
        const V shift = V::set(mean_e), slope = V::set(mean_en);
        for_parts<V>(p.d, [&](Part<V> part) {
            V e = scaled(part), n = normalised(part);
            part.template store<T>(dx, p.norm == Norm::none ? e : (e - shift - n * slope) * rstd);
            V direct = part.template load<Acc<V>>(dh);
            add(d_norm, part, direct * n, p.d_norm_weight);
            add(d_norm + padded, part, direct, p.d_norm_bias);
        });
    }

    static void add(S* sums, Part<V> part, V value, const void* wanted) {
        if (wanted) part.template store<Acc<V>>(sums, part.template load<Acc<V>>(sums) + value);
    }
};

template <class V, DType dtype>
void merge_backward(const MergeBackwardParams& p) {
    MergeBackward<V, dtype> backward{p};
    for_chunks<V>(p.groups.count, p.threads, [&](int64_t first, int64_t last, int thread) {
        backward.chunk(first, last, thread);
    });
    if (p.d_merge_weight) {
        backward.merge_weight.store(p.d_merge_weight);
        backward.merge_bias.store(p.d_merge_bias);
    }
    if (p.d_projection) backward.projection.store(p.d_projection);
    if (p.d_norm_weight) backward.norm_weight.store(p.d_norm_weight);
    if (p.d_norm_bias) backward.norm_bias.store(p.d_norm_bias);
}

}  // namespace VARIATOR_ISA
}  // namespace variator
