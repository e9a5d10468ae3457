// The launchers, one per kernel.
#pragma once

#include <string>

#include "params.h"

#if defined(VARIATOR_EMULATION)
#include "emulation/runtime.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace variator::cuda {

cudaError_t merge(const MergeParams& p, cudaStream_t stream);
cudaError_t decompress(const DecompressParams& p, cudaStream_t stream);
cudaError_t merge_backward(const MergeBackwardParams& p, cudaStream_t stream);
cudaError_t decompress_backward(const DecompressBackwardParams& p, cudaStream_t stream);
cudaError_t weight_gradient(const WeightGradientParams& p, cudaStream_t stream);
cudaError_t gemm(const GemmParams& p, cudaStream_t stream);
cudaError_t one_launch(const LayerParams& p, cudaStream_t stream);
cudaError_t launches(const LayerParams& p, cudaStream_t stream);

// Dynamic shared memory of a kernel by name, for a bottleneck of r; -1: no such kernel was built.
int64_t shared_bytes(const std::string& kernel, int64_t r);

}  // namespace variator::cuda
