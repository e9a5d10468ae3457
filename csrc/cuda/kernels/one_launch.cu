#include "heuristics.h"
#include "kernels/one_launch.cuh"
#include "launch.h"
#include "launchers.h"

namespace variator::cuda {
namespace {

template <class T>
cudaError_t one_launch_of(const LayerParams& p, cudaStream_t stream) {
    const bool resident = heuristics::resident_blocks(p.merge.d) == 3;
    const auto kernel = resident ? one_launch_kernel<T, 3> : one_launch_kernel<T, 0>;
    const size_t shared = one_launch_shared_bytes(p.merge.r);
    int at_once = 0;
    const cudaError_t error = blocks_at_once(kernel, threads, shared, at_once);
    if (error != cudaSuccess) return error;
    const int64_t blocks =
        heuristics::one_launch_blocks(p.merge.groups.launched, p.merge.d, p.f, p.splits, at_once);
    return launch(kernel, {blocks}, threads, shared, stream, true, p);
}

}  // namespace

cudaError_t one_launch(const LayerParams& p, cudaStream_t stream) {
    return p.merge.dtype == DType::bfloat16 ? one_launch_of<BF16>(p, stream)
                                            : one_launch_of<F16>(p, stream);
}

}  // namespace variator::cuda
