// Written by gemm/generate.py.
#include "gemm/gemm_sm80.cuh"

template variator::cuda::GemmKernel
variator::cuda::gemm_sm80<128, 128, variator::cuda::DType::float16>();
