#include "heuristics.h"
#include "kernels/decompress_backward.cuh"
#include "kernels/merge_backward.cuh"
#include "kernels/weight_gradient.cuh"
#include "launch.h"
#include "launchers.h"

namespace variator::cuda {
namespace {

template <class T>
cudaError_t merge_backward_of(const MergeBackwardParams& p, cudaStream_t stream) {
    const auto kernel =
        p.r == bottleneck_chunk ? merge_backward_kernel<T, true> : merge_backward_kernel<T, false>;
    return launch(kernel, {heuristics::tiles(p.groups.launched)}, threads,
                  merge_backward_shared_bytes(p.r), stream, false, p);
}

template <class T>
cudaError_t decompress_backward_of(const DecompressBackwardParams& p, cudaStream_t stream) {
    const auto kernel = p.r == bottleneck_chunk ? decompress_backward_kernel<T, true>
                                                : decompress_backward_kernel<T, false>;
    return launch(kernel, {heuristics::tiles(p.groups.launched)}, threads,
                  decompress_backward_shared_bytes(p.r), stream, false, p);
}

template <class T>
cudaError_t weight_gradient_of(const WeightGradientParams& p, cudaStream_t stream) {
    const int64_t columns = p.left_columns + p.score_columns + p.ones;
    const int64_t slots = p.by_group ? 1 : p.groups.k;
    const Grid grid{heuristics::ceil_div(p.d, gradient_columns),
                    heuristics::gradient_pieces(columns), p.shares * slots};
    const auto kernel = p.norm.kind == Norm::none ? weight_gradient_kernel<T, false>
                                                  : weight_gradient_kernel<T, true>;
    return launch(kernel, grid, threads, sizeof(WeightGradientShared), stream, false, p,
                  heuristics::gradient_tiles_a_piece(columns));
}

}  // namespace

cudaError_t merge_backward(const MergeBackwardParams& p, cudaStream_t stream) {
    return p.dtype == DType::bfloat16 ? merge_backward_of<BF16>(p, stream)
                                      : merge_backward_of<F16>(p, stream);
}

cudaError_t decompress_backward(const DecompressBackwardParams& p, cudaStream_t stream) {
    return p.dtype == DType::bfloat16 ? decompress_backward_of<BF16>(p, stream)
                                      : decompress_backward_of<F16>(p, stream);
}

cudaError_t weight_gradient(const WeightGradientParams& p, cudaStream_t stream) {
    return p.dtype == DType::bfloat16 ? weight_gradient_of<BF16>(p, stream)
                                      : weight_gradient_of<F16>(p, stream);
}

}  // namespace variator::cuda
