// The FFN's inner activation.
#pragma once

#include <type_traits>

#include "attention_math.h"

namespace variator {
namespace VARIATOR_ISA {

#ifdef VARIATOR_HAS_DOUBLE
inline float activate(float x, Activation activation) {
    switch (activation) {
        case Activation::relu:
            return x < 0 ? 0 : x;  // NaN stays NaN
        case Activation::gelu:
            return 0.5f * x * (1 + __builtin_erff(x * 0.70710678f));
        case Activation::gelu_tanh:
            return 0.5f * x *
                   (1 + __builtin_tanhf(0.79788456f * __builtin_fmaf(0.044715f * x * x, x, x)));
        case Activation::silu:
            return x / (1 + __builtin_expf(-x));
        case Activation::none:
            break;
    }
    return x;
}
template <Activation activation>
Vec activate(Vec x) {
    return Vec::make([&](int i) { return activate(x.v[i], activation); });
}
#else
// x · sigmoid(z), by e^-|z|, which does not overflow.
inline __attribute__((always_inline)) Vec times_sigmoid(Vec x, Vec z) {
    const Vec one = Vec::set(1.0f);
    const Vec e = exp2<false>(Vec::absolute(z) * Vec::set(static_cast<float>(-log2_e)));
    return x * Vec::less_select(z, Vec::zero(), e, one) * Vec::reciprocal(one + e);
}

// x · Φ(x). With z = |x|/√2, erfc(z) is a polynomial in 1 / (1 + 0.3275911 z) times e^-z²
// (Abramowitz and Stegun 7.1.26; within 1.5e-7).
inline __attribute__((always_inline)) Vec gelu(Vec x) {
    const Vec one = Vec::set(1.0f);
    // e^-z² is 0 long before 15; NaN stays NaN.
    const Vec z = Vec::minimum(Vec::set(15.0f), Vec::absolute(x) * Vec::set(0.70710678f));
    const Vec t = Vec::reciprocal(Vec::fma(z, Vec::set(0.3275911f), one));
    Vec p = Vec::set(1.061405429f);
    p = Vec::fma(p, t, Vec::set(-1.453152027f));
    p = Vec::fma(p, t, Vec::set(1.421413741f));
    p = Vec::fma(p, t, Vec::set(-0.284496736f));
    p = Vec::fma(p, t, Vec::set(0.254829592f));
    const Vec half = p * t * exp2<false>(z * z * Vec::set(static_cast<float>(-log2_e))) *
                     Vec::set(0.5f);  // erfc(z) / 2
    return x * Vec::less_select(x, Vec::zero(), half, one - half);
}

template <Activation activation>
inline __attribute__((always_inline)) Vec activate(Vec x) {
    if constexpr (activation == Activation::relu) {
        return Vec::maximum(Vec::zero(), x);  // NaN stays NaN
    } else if constexpr (activation == Activation::gelu) {
        return gelu(x);
    } else if constexpr (activation == Activation::gelu_tanh) {
        const Vec cubed = Vec::fma(x * x * Vec::set(0.044715f), x, x);
        return times_sigmoid(x, cubed * Vec::set(2 * 0.79788456f));
    } else if constexpr (activation == Activation::silu) {
        return times_sigmoid(x, x);
    } else {
        return x;
    }
}
#endif

// work(std::integral_constant<Activation, activation>).
template <class F>
void with_activation(Activation activation, F work) {
#define VARIATOR_CASE(name, value) \
    case Activation::name:         \
        return work(std::integral_constant<Activation, Activation::name>{});
    switch (activation) { VARIATOR_FFN_ACTIVATIONS(VARIATOR_CASE) }
#undef VARIATOR_CASE
}

}  // namespace VARIATOR_ISA
}  // namespace variator
