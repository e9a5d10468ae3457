#include "gemm/gemm_sm80.cuh"

namespace variator::cuda {

using Gemm = GemmSm80<cutlass::bfloat16_t>;
const GemmKernel gemm_sm80_128x128_bf16{Gemm::run, sizeof(typename Gemm::Kernel::SharedStorage)};

}  // namespace variator::cuda
