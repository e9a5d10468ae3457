#include "kernels.h"
#include "kernels/decompress_backward.cuh"
#include "kernels/merge_backward.cuh"
#include "kernels/outer_sum.cuh"
#include "launch.h"
#include "plan.h"

namespace variator::cuda {
namespace {

template <class T>
cudaError_t merge_backward_of(const MergeBackwardParams& p, cudaStream_t stream) {
    const auto kernel =
        p.r == bottleneck_chunk ? merge_backward_kernel<T, true> : merge_backward_kernel<T, false>;
    return launch(kernel, {plan::tiles(p.groups.launched)}, threads,
                  merge_backward_shared_bytes(p.r), stream, false, p);
}

template <class T>
cudaError_t decompress_backward_of(const DecompressBackwardParams& p, cudaStream_t stream) {
    const auto kernel = p.r == bottleneck_chunk ? decompress_backward_kernel<T, true>
                                                : decompress_backward_kernel<T, false>;
    return launch(kernel, {plan::tiles(p.groups.launched)}, threads,
                  decompress_backward_shared_bytes(p.r), stream, false, p);
}

}  // namespace

cudaError_t merge_backward(const MergeBackwardParams& p, cudaStream_t stream) {
    return p.dtype == DType::bf16 ? merge_backward_of<BF16>(p, stream)
                                  : merge_backward_of<F16>(p, stream);
}

cudaError_t decompress_backward(const DecompressBackwardParams& p, cudaStream_t stream) {
    return p.dtype == DType::bf16 ? decompress_backward_of<BF16>(p, stream)
                                  : decompress_backward_of<F16>(p, stream);
}

cudaError_t outer_sum(const OuterSumParams& p, cudaStream_t stream) {
    const Grid grid{plan::ceil_div(p.d, outer_right), plan::ceil_div(p.left_columns, outer_left),
                    p.parts};
    const auto kernel = p.dtype == DType::bf16 ? outer_sum_kernel<BF16> : outer_sum_kernel<F16>;
    return launch(kernel, grid, threads, sizeof(OuterSumShared), stream, false, p);
}

}  // namespace variator::cuda
