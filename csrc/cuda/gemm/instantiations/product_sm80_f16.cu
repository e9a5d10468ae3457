#include "gemm/product_sm80.cuh"

namespace variator::cuda {

using Product = ProductSm80<cutlass::half_t>;
const ProductKernel product_sm80_f16{Product::run, sizeof(typename Product::Kernel::SharedStorage)};

}  // namespace variator::cuda
