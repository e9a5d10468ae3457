// Rows of a storage type as acc vectors, and what is done with a row: norm, statistics, φ.
#pragma once

#include "params.h"

namespace variator {
namespace VARIATOR_ISA {

template <class V, DType dtype>
struct Storage;

template <class V>
struct Storage<V, DType::float32> {
    using Element = float;
    static V load(const float* p) { return V::load(p); }
    static V load(const float* p, int n) { return V::load(p, n); }
    static void store(float* p, V v) { v.store(p); }
    static void store(float* p, V v, int n) { v.store(p, n); }
};
template <class V>
struct Storage<V, DType::float64> {
    using Element = double;
    static V load(const double* p) { return V::load(p); }
    static V load(const double* p, int n) { return V::load(p, n); }
    static void store(double* p, V v) { v.store(p); }
    static void store(double* p, V v, int n) { v.store(p, n); }
};
template <class V>
struct Storage<V, DType::bfloat16> {
    using Element = uint16_t;
    static V load(const uint16_t* p) { return V::load_bf16(p); }
    static V load(const uint16_t* p, int n) { return V::load_bf16(p, n); }
    static void store(uint16_t* p, V v) { v.store_bf16(p); }
    static void store(uint16_t* p, V v, int n) { v.store_bf16(p, n); }
};
template <class V>
struct Storage<V, DType::float16> {
    using Element = uint16_t;
    static V load(const uint16_t* p) { return V::load_f16(p); }
    static V load(const uint16_t* p, int n) { return V::load_f16(p, n); }
    static void store(uint16_t* p, V v) { v.store_f16(p); }
    static void store(uint16_t* p, V v, int n) { v.store_f16(p, n); }
};

// f(i, load, store) for each vector of a row of n elements: load(storage, p) and
// store(storage, p, v) touch only the elements that exist.
template <class V>
struct Part {
    int64_t at;
    int count;  // V::width, or less in the last part
    template <class S>
    V load(const typename S::Element* p) const {
        return count == V::width ? S::load(p + at) : S::load(p + at, count);
    }
    template <class S>
    void store(typename S::Element* p, V v) const {
        if (count == V::width)
            S::store(p + at, v);
        else
            S::store(p + at, v, count);
    }
};
template <class V, class F>
inline __attribute__((always_inline)) void for_parts(int64_t n, F f) {
    int64_t i = 0;
    for (; i + V::width <= n; i += V::width) f(Part<V>{i, V::width});
    if (i < n) f(Part<V>{i, static_cast<int>(n - i)});
}

// The storage type of acc values themselves.
template <class V>
using Acc = Storage<V, sizeof(typename V::Scalar) == 8 ? DType::float64 : DType::float32>;

template <class S>
struct Statistics {
    S mean, rstd;  // normalised = (x - mean) * rstd
};

inline float square_root(float x) { return __builtin_sqrtf(x); }
inline double square_root(double x) { return __builtin_sqrt(x); }
inline float exponential(float x) { return __builtin_expf(x); }
inline double exponential(double x) { return __builtin_exp(x); }

template <class V, DType dtype>
Statistics<typename V::Scalar> statistics(const typename Storage<V, dtype>::Element* x, int64_t d,
                                          Norm norm, double eps) {
    using T = Storage<V, dtype>;
    using S = typename V::Scalar;
    if (norm == Norm::none) return {0, 1};
    S mean = 0;
    if (norm == Norm::layer) {
        V sum = V::zero();
        for_parts<V>(d, [&](Part<V> part) { sum = sum + part.template load<T>(x); });
        mean = sum.sum() / static_cast<S>(d);
    }
    // A large mean is off by its sum's rounding; the differences to it say by how much.
    V a = V::zero(), b = V::zero(), off = V::zero();
    const V centre = V::set(mean);
    int64_t i = 0;
    for (; i + 2 * V::width <= d; i += 2 * V::width) {
        V p = T::load(x + i) - centre, q = T::load(x + i + V::width) - centre;
        a = V::fma(p, p, a);
        b = V::fma(q, q, b);
        off = off + (p + q);
    }
    S rest = 0, rest_off = 0;
    for_parts<V>(d - i, [&](Part<V> part) {
        S values[V::width];
        part.template load<T>(x + i).store(values);
        for (int n = 0; n < part.count; ++n) {
            rest += (values[n] - mean) * (values[n] - mean);
            rest_off += values[n] - mean;
        }
    });
    S variance = ((a + b).sum() + rest) / static_cast<S>(d);
    if (norm == Norm::layer) {
        const S by = (off.sum() + rest_off) / static_cast<S>(d);
        mean += by;
        variance -= by * by;
    }
    return {mean, S(1) / square_root(variance + static_cast<S>(eps))};
}

// The normed row h into scratch of type `Out`, zeros from d to padded.
template <class V, DType dtype, class Out>
void normed_row(const typename Storage<V, dtype>::Element* x, int64_t d, int64_t padded,
                Statistics<typename V::Scalar> s, const typename V::Scalar* weight,
                const typename V::Scalar* bias, typename Out::Element* out) {
    const V rstd = V::set(s.rstd), mean = V::set(s.mean);
    for_parts<V>(d, [&](Part<V> part) {
        V h = (part.template load<Storage<V, dtype>>(x) - mean) * rstd;
        if (weight) h = h * part.template load<Acc<V>>(weight);
        if (bias) h = h + part.template load<Acc<V>>(bias);
        part.template store<Out>(out, h);
    });
    for (int64_t i = d; i < padded; ++i) out[i] = 0;
}

template <class V, class F>
void zero_row(F* out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[i] = 0;
}

}  // namespace VARIATOR_ISA
}  // namespace variator
