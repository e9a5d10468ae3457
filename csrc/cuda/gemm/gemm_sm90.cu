// The FFN's GEMMs for Hopper. All in one file: most of its time goes into reading CUTLASS's
// headers, and six files took three times as long.
#include "gemm/gemm_sm90.cuh"

namespace variator::cuda {

template GemmKernel gemm_sm90<64, 128, DType::bfloat16>();
template GemmKernel gemm_sm90<64, 128, DType::float16>();
template GemmKernel gemm_sm90<128, 192, DType::bfloat16>();
template GemmKernel gemm_sm90<128, 192, DType::float16>();
template GemmKernel gemm_sm90<128, 256, DType::bfloat16>();
template GemmKernel gemm_sm90<128, 256, DType::float16>();

}  // namespace variator::cuda
