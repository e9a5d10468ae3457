#include "gemm/gemm_sm90.cuh"

namespace variator::cuda {

using Gemm = GemmSm90Tile64x128<cutlass::bfloat16_t>;
const GemmKernel gemm_sm90_64x128_bf16{Gemm::run, Gemm::Kernel::SharedStorageSize};

}  // namespace variator::cuda
