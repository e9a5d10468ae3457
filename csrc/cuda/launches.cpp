// The sublayer as several launches, one after the other on a stream.
#include "launchers.h"

namespace variator::cuda {

cudaError_t launches(const LayerParams& p, cudaStream_t stream) {
    const DType dtype = p.merge.dtype;
    const int64_t rows = p.merge.groups.count, d = p.merge.d, f = p.f;
    const bool gate = p.w_gate != nullptr;
    cudaError_t error = merge(p.merge, stream);
    if (error == cudaSuccess)
        error = gemm(
            {dtype, rows, f, d, p.merge.merged, p.w_in, p.b_in, p.activation, nullptr, p.inner},
            stream);
    if (error == cudaSuccess && gate)
        error = gemm({dtype, rows, f, d, p.merge.merged, p.w_gate, p.b_gate, Activation::none,
                      p.inner, p.gated},
                     stream);
    if (error == cudaSuccess)
        error = gemm({dtype, rows, d, f, gate ? p.gated : p.inner, p.w_out, p.b_out,
                      Activation::none, nullptr, p.u},
                     stream);
    return error == cudaSuccess ? decompress(p.decompress, stream) : error;
}

}  // namespace variator::cuda
