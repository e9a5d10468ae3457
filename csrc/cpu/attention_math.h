// 2^x for the softmax, x <= 0: 0 below the smallest normal number, NaN stays NaN.
#pragma once

#include "row_norm.h"

namespace variator {
namespace VARIATOR_ISA {

// 2^f for |f| <= 1/2 by the polynomial of Cephes' exp2f: one unit of fp32's last place.
#ifdef VARIATOR_HAS_DOUBLE
inline double exp2_scalar(double x) { return __builtin_exp2(x); }
inline float exp2_scalar(float x) {
    const float capped = x < -126.0f ? -126.0f : x;
    const float n = (capped + 12582912.0f) - 12582912.0f;  // rounds
    const float f = capped - n;
    float p = 1.535336188319500e-4f;
    p = p * f + 1.339887440266574e-3f;
    p = p * f + 9.618437357674640e-3f;
    p = p * f + 5.550332471162809e-2f;
    p = p * f + 2.402264791363012e-1f;
    p = p * f + 6.931472028550421e-1f;
    p = p * f + 1.0f;
    const float whole = n == n ? n : 0.0f;
    const float power =
        bits_to_float(static_cast<uint32_t>(static_cast<int32_t>(whole) + 127) << 23);
    return x < -126.0f ? 0.0f : p * power;
}
template <class T>
Lanes<T> exp2_negative(Lanes<T> x) {
    return Lanes<T>::make([&](int i) { return exp2_scalar(x.v[i]); });
}
#else
inline __attribute__((always_inline)) Vec exp2_negative(Vec x) {
    const Vec least = Vec::set(-126.0f);
    const Vec capped = Vec::maximum(least, x);
    const Vec n = Vec::round(capped), f = capped - n;
    Vec p = Vec::set(1.535336188319500e-4f);
    p = Vec::fma(p, f, Vec::set(1.339887440266574e-3f));
    p = Vec::fma(p, f, Vec::set(9.618437357674640e-3f));
    p = Vec::fma(p, f, Vec::set(5.550332471162809e-2f));
    p = Vec::fma(p, f, Vec::set(2.402264791363012e-1f));
    p = Vec::fma(p, f, Vec::set(6.931472028550421e-1f));
    p = Vec::fma(p, f, Vec::set(1.0f));
    return Vec::less_select(x, least, Vec::zero(), p * Vec::exp2_whole(n));
}
#endif

inline float exp2_of(float x) { return __builtin_exp2f(x); }
inline double exp2_of(double x) { return __builtin_exp2(x); }

constexpr double log2_e = 1.4426950408889634;

}  // namespace VARIATOR_ISA
}  // namespace variator
