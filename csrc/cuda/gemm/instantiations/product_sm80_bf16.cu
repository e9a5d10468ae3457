#include "gemm/product_sm80.cuh"

namespace variator::cuda {

using Product = ProductSm80<cutlass::bfloat16_t>;
const ProductKernel product_sm80_bf16{Product::run,
                                      sizeof(typename Product::Kernel::SharedStorage)};

}  // namespace variator::cuda
