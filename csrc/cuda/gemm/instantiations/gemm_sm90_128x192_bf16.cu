#include "gemm/gemm_sm90.cuh"

namespace variator::cuda {

using Gemm = GemmSm90Tile128x192<cutlass::bfloat16_t>;
const GemmKernel gemm_sm90_128x192_bf16{Gemm::run, Gemm::Kernel::SharedStorageSize};

}  // namespace variator::cuda
