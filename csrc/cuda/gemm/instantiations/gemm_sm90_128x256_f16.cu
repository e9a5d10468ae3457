// Written by gemm/generate.py.
#include "gemm/gemm_sm90.cuh"

template variator::cuda::GemmKernel
variator::cuda::gemm_sm90<128, 256, variator::cuda::DType::float16>();
