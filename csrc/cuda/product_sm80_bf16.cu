#include "product_sm80.cuh"

namespace variator::cuda {

cudaError_t product_sm80_bf16(const ProductParams& p, cudaStream_t stream) {
    return ProductSm80<cutlass::bfloat16_t>::run(p, stream);
}

}  // namespace variator::cuda
