// Picks the GEMM kernel for the current device.
#include <cuda_runtime.h>

#include "device_properties.h"
#include "gemm/gemm.h"
#include "heuristics.h"
#include "launchers.h"

namespace variator::cuda {
namespace {

#if defined(VARIATOR_CUDA_SM90)
template <DType dtype>
GemmKernel hopper_kernel(const GemmParams& p, int multiprocessors) {
    constexpr auto tiles = heuristics::gemm_tiles;
    const int tile = heuristics::gemm_tile(p.rows, p.columns, multiprocessors);
    if (tile == 0) return gemm_sm90<tiles[0].rows, tiles[0].columns, dtype>();
    if (tile == 1) return gemm_sm90<tiles[1].rows, tiles[1].columns, dtype>();
    return gemm_sm90<tiles[2].rows, tiles[2].columns, dtype>();
}
#endif

template <DType dtype>
cudaError_t gemm_of(const GemmParams& p, int major, int multiprocessors, cudaStream_t stream) {
#if defined(VARIATOR_CUDA_SM90)
    // No later architecture has wgmma: Blackwell takes mma.sync.
    if (major == 9) return hopper_kernel<dtype>(p, multiprocessors).run(p, multiprocessors, stream);
#endif
#if defined(VARIATOR_CUDA_SM80)
    return gemm_sm80<128, 128, dtype>().run(p, multiprocessors, stream);
#else
    return cudaErrorNoKernelImageForDevice;
#endif
}

}  // namespace

cudaError_t gemm(const GemmParams& p, cudaStream_t stream) {
    if (p.rows == 0 || p.columns == 0) return cudaSuccess;
    int device = 0, major = 0, multiprocessors = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess) error = count_multiprocessors(multiprocessors);
    if (error != cudaSuccess) return error;
    return p.dtype == DType::bfloat16 ? gemm_of<DType::bfloat16>(p, major, multiprocessors, stream)
                                      : gemm_of<DType::float16>(p, major, multiprocessors, stream);
}

}  // namespace variator::cuda
