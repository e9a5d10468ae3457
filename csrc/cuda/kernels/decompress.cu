#include "heuristics.h"
#include "kernels/decompress.cuh"
#include "launch.h"
#include "launchers.h"

namespace variator::cuda {
namespace {

template <class T>
cudaError_t decompress_of(const DecompressParams& p, cudaStream_t stream) {
    int multiprocessors = 0;
    const cudaError_t error = count_multiprocessors(multiprocessors);
    if (error != cudaSuccess) return error;
    const int64_t each = heuristics::blocks_a_part(p.groups.launched, p.d, multiprocessors);
    const Grid grid{
        heuristics::tiles(p.groups.launched),
        heuristics::ceil_div(heuristics::ceil_div(p.d, heuristics::column_block), each)};
    const auto kernel =
        p.r == bottleneck_chunk ? decompress_kernel<T, true> : decompress_kernel<T, false>;
    return launch(kernel, grid, threads, decompress_shared_bytes(p.r), stream, false, p,
                  static_cast<int>(each));
}

}  // namespace

cudaError_t decompress(const DecompressParams& p, cudaStream_t stream) {
    return p.dtype == DType::bfloat16 ? decompress_of<BF16>(p, stream)
                                      : decompress_of<F16>(p, stream);
}

}  // namespace variator::cuda
