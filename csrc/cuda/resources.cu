// The dynamic shared memory of each kernel, for the table of resources.
#include <string>

#include "gemm/gemm.h"
#include "kernels/decompress.cuh"
#include "kernels/decompress_backward.cuh"
#include "kernels/merge.cuh"
#include "kernels/merge_backward.cuh"
#include "kernels/one_launch.cuh"
#include "kernels/weight_gradient.cuh"
#include "launchers.h"

namespace variator::cuda {

int64_t shared_bytes(const std::string& kernel, int64_t r) {
    if (kernel == "merge_kernel") return sizeof(MergeShared);
    if (kernel == "decompress_kernel") return decompress_shared_bytes(r);
    if (kernel == "merge_backward_kernel") return merge_backward_shared_bytes(r);
    if (kernel == "decompress_backward_kernel") return decompress_backward_shared_bytes(r);
    if (kernel == "weight_gradient_kernel") return sizeof(WeightGradientShared);
    if (kernel == "one_launch_kernel") return one_launch_shared_bytes(r);
#if defined(VARIATOR_CUDA_SM90)
    if (kernel == "gemm_sm90_128x192") return gemm_sm90<128, 192, DType::bfloat16>().shared_bytes;
    if (kernel == "gemm_sm90_128x256") return gemm_sm90<128, 256, DType::bfloat16>().shared_bytes;
    if (kernel == "gemm_sm90_64x128") return gemm_sm90<64, 128, DType::bfloat16>().shared_bytes;
#endif
#if defined(VARIATOR_CUDA_SM80)
    if (kernel == "gemm_sm80_128x128") return gemm_sm80<128, 128, DType::bfloat16>().shared_bytes;
#endif
    return -1;
}

}  // namespace variator::cuda
