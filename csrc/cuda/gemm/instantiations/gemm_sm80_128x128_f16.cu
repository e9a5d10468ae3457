#include "gemm/gemm_sm80.cuh"

namespace variator::cuda {

using Gemm = GemmSm80<cutlass::half_t>;
const GemmKernel gemm_sm80_128x128_f16{Gemm::run, sizeof(typename Gemm::Kernel::SharedStorage)};

}  // namespace variator::cuda
