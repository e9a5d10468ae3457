// The CUTLASS GEMMs, by architecture and output tile [rows, columns].
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace variator::cuda {

// A CUTLASS kernel: its launcher, and the dynamic shared memory it is launched with.
struct GemmKernel {
    cudaError_t (*run)(const GemmParams& p, int multiprocessors, cudaStream_t stream);
    int shared_bytes;
};

// Instantiated in a file a tile; the files compile side by side.
template <int rows, int columns, DType dtype>
GemmKernel gemm_sm80();
template <int rows, int columns, DType dtype>
GemmKernel gemm_sm90();

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
        const cudaError_t error = cudaPeekAtLastError();
        return error != cudaSuccess ? error : cudaErrorUnknown;  // CUTLASS has cleared it
    }
    return cudaSuccess;
}

}  // namespace variator::cuda
