// The adapter's activation φ: tanh or the identity.
#pragma once

#include "params.h"

namespace variator {
namespace VARIATOR_ISA {

#ifdef VARIATOR_HAS_DOUBLE
inline float tangent(float x) { return __builtin_tanhf(x); }
inline double tangent(double x) { return __builtin_tanh(x); }
template <class T>
Lanes<T> tanh(Lanes<T> x) {
    return Lanes<T>::make([&](int i) { return tangent(x.v[i]); });
}
#else
// e^x for x in [0, 20]: 2^n · e^f with |f| <= ln(2)/2 and e^f by its Taylor series to f^7.
inline Vec exp_positive(Vec x) {
    Vec n = Vec::round(x * Vec::set(1.44269504f));
    // ln 2 in two parts, so that n·ln 2 loses nothing.
    Vec f = Vec::fma(n, Vec::set(-0.693359375f), x);
    f = Vec::fma(n, Vec::set(2.12194440e-4f), f);
    Vec p = Vec::set(1.0f / 5040);
    p = Vec::fma(p, f, Vec::set(1.0f / 720));
    p = Vec::fma(p, f, Vec::set(1.0f / 120));
    p = Vec::fma(p, f, Vec::set(1.0f / 24));
    p = Vec::fma(p, f, Vec::set(1.0f / 6));
    p = Vec::fma(p, f, Vec::set(0.5f));
    p = Vec::fma(p, f, Vec::set(1.0f));
    p = Vec::fma(p, f, Vec::set(1.0f));
    return p * Vec::exp2_whole(n);
}

// 1 - 2 / (e^2|x| + 1), and below 0.3, where that would cancel, the Taylor series to x^11.
inline Vec tanh(Vec x) {
    Vec z = Vec::absolute(x);
    Vec capped = Vec::minimum(Vec::set(10.0f), z);  // tanh(10) is 1 in fp32; NaN stays NaN
    Vec e = exp_positive(capped + capped);
    Vec large = Vec::set(1.0f) - Vec::set(2.0f) / (e + Vec::set(1.0f));
    Vec s = z * z;
    Vec p = Vec::set(-1382.0f / 155925);
    p = Vec::fma(p, s, Vec::set(62.0f / 2835));
    p = Vec::fma(p, s, Vec::set(-17.0f / 315));
    p = Vec::fma(p, s, Vec::set(2.0f / 15));
    p = Vec::fma(p, s, Vec::set(-1.0f / 3));
    Vec small = Vec::fma(p * s, z, z);
    return Vec::copy_sign(Vec::less_select(z, Vec::set(0.3f), small, large), x);
}
#endif

}  // namespace VARIATOR_ISA
}  // namespace variator
