// Picks the kernel of a product by the current device.
#include <cuda_runtime.h>

#include "gemm/products.h"
#include "kernels.h"
#include "plan.h"
#include "query.h"

namespace variator::cuda {
namespace {

#if defined(VARIATOR_CUDA_SM90)
const ProductKernel& hopper_kernel(const ProductParams& p, int multiprocessors) {
    const bool bf16 = p.dtype == DType::bf16;
    if (plan::large_product_tile(p.rows, p.columns, multiprocessors))
        return bf16 ? large_product_sm90_bf16 : large_product_sm90_f16;
    return bf16 ? small_product_sm90_bf16 : small_product_sm90_f16;
}
#endif

}  // namespace

cudaError_t product(const ProductParams& p, cudaStream_t stream) {
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
    return (p.dtype == DType::bf16 ? product_sm80_bf16 : product_sm80_f16)
        .run(p, multiprocessors, stream);
#else
    return cudaErrorNoKernelImageForDevice;
#endif
}

}  // namespace variator::cuda
