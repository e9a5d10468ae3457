#include "product_sm90.cuh"

namespace variator::cuda {

cudaError_t small_product_sm90_bf16(const ProductParams& p, int multiprocessors,
                                    cudaStream_t stream) {
    return SmallProductSm90<cutlass::bfloat16_t>::run(p, multiprocessors, stream);
}

}  // namespace variator::cuda
