// The epilogue of the FFN's GEMMs: activation(acc + bias) [* factor].
#pragma once

#include <cutlass/array.h>
#include <cutlass/bfloat16.h>
#include <cutlass/half.h>

#include <type_traits>

#include "numerics.h"

namespace variator::cuda {

template <DType dtype>
using CutlassType =
    std::conditional_t<dtype == DType::bfloat16, cutlass::bfloat16_t, cutlass::half_t>;

struct FinishArguments {
    Activation activation;
    bool multiply;
};

// CUTLASS expects a template over the type it computes in, an array of floats.
template <class T>
struct Finish;

template <int count>
struct Finish<cutlass::Array<float, count>> {
    using Values = cutlass::Array<float, count>;
    using Arguments = FinishArguments;

    template <Activation kind>
    __device__ __forceinline__ static void apply(Values& values) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < count; ++i) values[i] = activate(values[i], kind);
    }

    __device__ __forceinline__ Values operator()(const Values& acc, const Values& bias,
                                                 const Values& factor,
                                                 const FinishArguments& how) const {
        Values out;
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < count; ++i) out[i] = acc[i] + bias[i];
        switch (how.activation) {
            case Activation::relu:
                apply<Activation::relu>(out);
                break;
            case Activation::gelu:
                apply<Activation::gelu>(out);
                break;
            case Activation::gelu_tanh:
                apply<Activation::gelu_tanh>(out);
                break;
            case Activation::silu:
                apply<Activation::silu>(out);
                break;
            default:
                break;
        }
        if (how.multiply) {
            CUTLASS_PRAGMA_UNROLL
            for (int i = 0; i < count; ++i) out[i] *= factor[i];
        }
        return out;
    }
};

template <>
struct Finish<float> {
    using Arguments = FinishArguments;  // CUTLASS looks for it here
};

}  // namespace variator::cuda
