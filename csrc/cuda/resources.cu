// What each kernel is launched with: for the table of resources.
#include <string>

#include "gemm/products.h"
#include "kernels.h"
#include "kernels/decompress.cuh"
#include "kernels/decompress_backward.cuh"
#include "kernels/merge.cuh"
#include "kernels/merge_backward.cuh"
#include "kernels/one_launch.cuh"
#include "kernels/outer_sum.cuh"

namespace variator::cuda {

int64_t shared_bytes(const std::string& kernel, int64_t r) {
    if (kernel == "merge_kernel") return sizeof(MergeShared);
    if (kernel == "decompress_kernel") return decompress_shared_bytes(r);
    if (kernel == "merge_backward_kernel") return merge_backward_shared_bytes(r);
    if (kernel == "decompress_backward_kernel") return decompress_backward_shared_bytes(r);
    if (kernel == "outer_sum_kernel") return sizeof(OuterSumShared);
    if (kernel == "one_launch_kernel") return one_launch_shared_bytes(r);
#if defined(VARIATOR_CUDA_SM90)
    if (kernel == "large_product_sm90") return large_product_sm90_bf16.shared_bytes;
    if (kernel == "small_product_sm90") return small_product_sm90_bf16.shared_bytes;
#endif
#if defined(VARIATOR_CUDA_SM80)
    if (kernel == "product_sm80") return product_sm80_bf16.shared_bytes;
#endif
    return -1;
}

}  // namespace variator::cuda
