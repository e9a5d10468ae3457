// Properties of the current device.
#pragma once

#if defined(VARIATOR_EMULATION)
#include "emulation/runtime.h"
#else
#include <cuda_runtime_api.h>

namespace variator::cuda {

inline cudaError_t count_multiprocessors(int& count) {
    int device = 0;
    const cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
}

}  // namespace variator::cuda
#endif
