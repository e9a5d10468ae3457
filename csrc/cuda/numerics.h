// Arithmetic shared by host and device, so that tests on the CPU run the kernels' own code.
#pragma once

#include <cmath>

#include "params.h"

namespace variator::cuda {

// Count, mean and sum of squared deviations of a set of numbers (Chan, Golub and LeVeque): sets are
// joined without the cancellation of E[x²] - E[x]². With the mean held at 0: the sum of squares.
struct Moments {
    float count, mean, squares;

    VARIATOR_HD void join(const Moments& other, bool centred) {
        if (other.count == 0) return;
        const float total = count + other.count, delta = other.mean - mean;
        squares += other.squares;
        if (centred) {
            const float share = other.count / total;
            mean += delta * share;
            squares += delta * delta * count * share;
        }
        count = total;
    }

    VARIATOR_HD static Moments of(const float (&x)[8], bool centred) {
        float mean = 0, squares = 0;
        if (centred) {
            for (int i = 0; i < 8; ++i) mean += x[i];
            mean *= 0.125f;
        }
        for (int i = 0; i < 8; ++i) squares += (x[i] - mean) * (x[i] - mean);
        return {8, mean, squares};
    }
};

VARIATOR_HD float inverse_root(float x) {
#if defined(__CUDA_ARCH__)
    return rsqrtf(x);
#else
    return 1.0f / std::sqrt(x);
#endif
}

// The reciprocal standard deviation of a row of d numbers; 1 without a norm.
VARIATOR_HD float norm_rstd(const NormParams& norm, float squares, int64_t d) {
    return norm.kind == Norm::none ? 1.0f
                                   : inverse_root(squares / static_cast<float>(d) + norm.eps);
}

// Within 2 ulp. Exact division calls a function for rare operands, and a kernel with a call in it
// waits for every wgmma.
VARIATOR_HD float quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fdividef(a, b);
#else
    return a / b;
#endif
}

// NaN stays NaN (fmaxf would return 0), so that it shows in the output of its group.
VARIATOR_HD float relu(float x) { return x < 0.0f ? 0.0f : x; }

VARIATOR_HD float activate(float x, Activation kind) {
    switch (kind) {
        case Activation::relu:
            return relu(x);
        case Activation::gelu:
            return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
        case Activation::gelu_tanh:
            return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
        case Activation::silu:
            return quotient(x, 1.0f + expf(-x));
        default:
            return x;
    }
}

VARIATOR_HD float phi(float z, Phi kind) { return kind == Phi::tanh ? tanhf(z) : z; }
// φ' as a function of φ's value.
VARIATOR_HD float phi_slope(float t, Phi kind) { return kind == Phi::tanh ? 1.0f - t * t : 1.0f; }

}  // namespace variator::cuda
