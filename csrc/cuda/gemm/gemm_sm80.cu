// The FFN's GEMMs for every architecture but Hopper. Both types in one file: most of its time goes
// into reading CUTLASS's headers.
#include "gemm/gemm_sm80.cuh"

namespace variator::cuda {

template GemmKernel gemm_sm80<128, 128, DType::bfloat16>();
template GemmKernel gemm_sm80<128, 128, DType::float16>();

}  // namespace variator::cuda
