// The products by architecture and tile, each in a file of its own: they take long to compile.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace variator::cuda {

cudaError_t large_product_sm90_bf16(const ProductParams& p, int multiprocessors, cudaStream_t);
cudaError_t large_product_sm90_f16(const ProductParams& p, int multiprocessors, cudaStream_t);
cudaError_t small_product_sm90_bf16(const ProductParams& p, int multiprocessors, cudaStream_t);
cudaError_t small_product_sm90_f16(const ProductParams& p, int multiprocessors, cudaStream_t);
cudaError_t product_sm80_bf16(const ProductParams& p, cudaStream_t);
cudaError_t product_sm80_f16(const ProductParams& p, cudaStream_t);

// Launches a CUTLASS kernel that needs no workspace.
template <class Gemm, class Arguments>
cudaError_t run_cutlass(const Arguments& arguments, cudaStream_t stream) {
    using Status = decltype(Gemm::can_implement(arguments));
    if (Gemm::can_implement(arguments) != Status::kSuccess ||
        Gemm::get_workspace_size(arguments) != 0)
        return cudaErrorInvalidValue;
    Gemm gemm;
    if (gemm.initialize(arguments, nullptr, stream) != Status::kSuccess ||
        gemm.run(stream) != Status::kSuccess) {
        const cudaError_t error = cudaGetLastError();
        return error != cudaSuccess ? error : cudaErrorLaunchFailure;
    }
    return cudaSuccess;
}

}  // namespace variator::cuda
