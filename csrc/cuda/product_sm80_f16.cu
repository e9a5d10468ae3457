#include "product_sm80.cuh"

namespace variator::cuda {

cudaError_t product_sm80_f16(const ProductParams& p, cudaStream_t stream) {
    return ProductSm80<cutlass::half_t>::run(p, stream);
}

}  // namespace variator::cuda
