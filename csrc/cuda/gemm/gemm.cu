// Picks the GEMM kernel for the current device.
#include <cuda_runtime.h>

#include "device_properties.h"
#include "gemm/gemm.h"
#include "heuristics.h"
#include "launchers.h"

namespace variator::cuda {
namespace {

#if defined(VARIATOR_CUDA_SM90)
const GemmKernel& hopper_kernel(const GemmParams& p, int multiprocessors) {
    const bool bf16 = p.dtype == DType::bf16;
    if (heuristics::large_gemm_tile(p.rows, p.columns, multiprocessors))
        return bf16 ? gemm_sm90_128x192_bf16 : gemm_sm90_128x192_f16;
    return bf16 ? gemm_sm90_64x128_bf16 : gemm_sm90_64x128_f16;
}
#endif

}  // namespace

cudaError_t gemm(const GemmParams& p, cudaStream_t stream) {
    if (p.rows == 0 || p.columns == 0) return cudaSuccess;
    int device = 0, major = 0, multiprocessors = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess) error = count_multiprocessors(multiprocessors);
    if (error != cudaSuccess) return error;
#if defined(VARIATOR_CUDA_SM90)
    if (major == 9) return hopper_kernel(p, multiprocessors).run(p, multiprocessors, stream);
#endif
#if defined(VARIATOR_CUDA_SM80)
    return (p.dtype == DType::bf16 ? gemm_sm80_128x128_bf16 : gemm_sm80_128x128_f16)
        .run(p, multiprocessors, stream);
#else
    return cudaErrorNoKernelImageForDevice;
#endif
}

}  // namespace variator::cuda
