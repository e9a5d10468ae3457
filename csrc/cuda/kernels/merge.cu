#include "heuristics.h"
#include "kernels/merge.cuh"
#include "launch.h"
#include "launchers.h"

namespace variator::cuda {
namespace {

template <class T>
cudaError_t merge_of(const MergeParams& p, cudaStream_t stream) {
    const Grid grid{heuristics::tiles(p.groups.launched)};
    auto run = [&](auto kernel) {
        return launch(kernel, grid, threads, sizeof(MergeShared), stream, false, p);
    };
    switch (heuristics::resident_blocks(p.d)) {
        case 1:
            return run(merge_kernel<T, 1>);
        case 2:
            return run(merge_kernel<T, 2>);
        case 3:
            return run(merge_kernel<T, 3>);
        case 4:
            return run(merge_kernel<T, 4>);
        default:
            return run(merge_kernel<T, 0>);
    }
}

}  // namespace

cudaError_t merge(const MergeParams& p, cudaStream_t stream) {
    return p.dtype == DType::bfloat16 ? merge_of<BF16>(p, stream) : merge_of<F16>(p, stream);
}

}  // namespace variator::cuda
