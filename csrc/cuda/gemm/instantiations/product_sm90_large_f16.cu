#include "gemm/product_sm90.cuh"

namespace variator::cuda {

using Product = LargeProductSm90<cutlass::half_t>;
const ProductKernel large_product_sm90_f16{Product::run, Product::Kernel::SharedStorageSize};

}  // namespace variator::cuda
