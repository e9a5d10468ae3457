// The FFN's GEMM as plain loops: CUTLASS cannot be emulated, so this stands in for its kernels.
#include "device.cuh"
#include "launchers.h"

namespace variator::cuda {
namespace {

template <class T>
void gemm_of(const GemmParams& p) {
    using E = typename T::Element;
    const auto value = [](const void* base, int64_t i) {
        return T::widen(static_cast<const E*>(base)[i]);
    };
    for (int64_t row = 0; row < p.rows; ++row)
        for (int64_t column = 0; column < p.columns; ++column) {
            float sum = 0;
            for (int64_t i = 0; i < p.inner; ++i)
                sum += value(p.a, row * p.inner + i) * value(p.weight, column * p.inner + i);
            if (p.bias != nullptr) sum += value(p.bias, column);
            sum = activate(sum, p.activation);
            if (p.factor != nullptr) sum *= value(p.factor, row * p.columns + column);
            static_cast<E*>(p.out)[row * p.columns + column] = T::narrow(sum);
        }
}

}  // namespace

cudaError_t gemm(const GemmParams& p, cudaStream_t) {
    if (!launched.next()) return cudaSuccess;
    p.dtype == DType::bfloat16 ? gemm_of<BF16>(p) : gemm_of<F16>(p);
    return cudaSuccess;
}

}  // namespace variator::cuda
