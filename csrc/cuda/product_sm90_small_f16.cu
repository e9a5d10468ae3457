#include "product_sm90.cuh"

namespace variator::cuda {

cudaError_t small_product_sm90_f16(const ProductParams& p, int multiprocessors,
                                   cudaStream_t stream) {
    return SmallProductSm90<cutlass::half_t>::run(p, multiprocessors, stream);
}

}  // namespace variator::cuda
