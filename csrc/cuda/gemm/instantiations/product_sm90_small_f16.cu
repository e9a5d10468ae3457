#include "gemm/product_sm90.cuh"

namespace variator::cuda {

using Product = SmallProductSm90<cutlass::half_t>;
const ProductKernel small_product_sm90_f16{Product::run, Product::Kernel::SharedStorageSize};

}  // namespace variator::cuda
