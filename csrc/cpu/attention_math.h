// 2^x for the softmax, x far from overflow: 0 below the smallest normal number, NaN stays NaN.
#pragma once

#include "row_norm.h"

namespace variator {
namespace VARIATOR_ISA {

constexpr double log2_e = 1.4426950408889634;

// 2^f, 0 <= f < 1: a minimax polynomial, of one unit of fp32's last place; a shorter one, of 3e-6,
// for weights of 16-bit storage.
template <bool half, class T, class Set, class Fma>
inline __attribute__((always_inline)) T exp2_fraction(T f, Set set, Fma fma) {
    T p;
    if constexpr (half) {
        p = fma(set(1.342668492e-2f), f, set(5.224247271e-2f));
        p = fma(p, f, set(2.412802059e-1f));
        p = fma(p, f, set(6.930448446e-1f));
    } else {
        p = fma(set(2.161378464e-4f), f, set(1.246765918e-3f));
        p = fma(p, f, set(9.675461975e-3f));
        p = fma(p, f, set(5.548528226e-2f));
        p = fma(p, f, set(2.402293033e-1f));
        p = fma(p, f, set(6.931470447e-1f));
    }
    return fma(p, f, set(1.0f));
}

#ifdef VARIATOR_HAS_DOUBLE
template <bool half>
double exp2_scalar(double x) {
    return __builtin_exp2(x);
}
template <bool half>
float exp2_scalar(float x) {
    const float capped = x < -126.0f ? -126.0f : x;
    const float n = __builtin_floorf(capped);
    const float p = exp2_fraction<half>(
        capped - n, [](float c) { return c; }, [](float a, float b, float c) { return a * b + c; });
    const float whole = n == n ? n : 0.0f;
    const float power =
        bits_to_float(static_cast<uint32_t>(static_cast<int32_t>(whole) + 127) << 23);
    return x < -126.0f ? 0.0f : p * power;
}
template <bool half, class T>
Lanes<T> exp2(Lanes<T> x) {
    return Lanes<T>::make([&](int i) { return exp2_scalar<half>(x.v[i]); });
}
#else
template <bool half>
inline __attribute__((always_inline)) Vec exp2(Vec x) {
    return Vec::scale_exp2(exp2_fraction<half>(Vec::fraction(x), Vec::set, Vec::fma), x);
}
#endif

}  // namespace VARIATOR_ISA
}  // namespace variator
