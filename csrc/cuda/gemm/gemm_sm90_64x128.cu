// Both types in one file: reading CUTLASS's headers takes most of its time.
#include "gemm/gemm_sm90.cuh"

namespace variator::cuda {

template GemmKernel gemm_sm90<64, 128, DType::bfloat16>();
template GemmKernel gemm_sm90<64, 128, DType::float16>();

}  // namespace variator::cuda
