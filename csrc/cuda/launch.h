// Launches a kernel on a stream and returns the CUDA error. The emulation has its own launch().
#pragma once

#include <cstddef>

#include "device.cuh"
#include "device_properties.h"

#if !defined(VARIATOR_EMULATION)
#include <cuda_runtime.h>

namespace variator::cuda {

// More shared memory than 48 KiB has to be asked for, before a launch and before occupancy is
// known.
template <class Kernel>
cudaError_t allow_shared(Kernel kernel, size_t shared) {
    if (shared <= 48 * 1024) return cudaSuccess;
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    return error == cudaErrorInvalidValue ? cudaErrorLaunchOutOfResources : error;  // too much
}

// How many thread blocks of a kernel the current device runs at once.
template <class Kernel>
cudaError_t blocks_at_once(Kernel kernel, int threads, size_t shared, int& blocks) {
    int multiprocessors = 0;
    cudaError_t error = count_multiprocessors(multiprocessors);
    if (error == cudaSuccess) error = allow_shared(kernel, shared);
    if (error == cudaSuccess)
        error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared);
    blocks *= multiprocessors;
    return error;
}

struct Grid {
    int64_t x, y = 1, z = 1;
};

// Launches blocks of `threads` threads with `shared` bytes of dynamic shared memory. An empty grid
// launches nothing.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), Grid grid, int threads, size_t shared,
                   cudaStream_t stream, bool cooperative, const Arguments&... arguments) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
    if (grid.x > 0x7fffffff || grid.y > 0xffff || grid.z > 0xffff)
        return cudaErrorInvalidConfiguration;
    const cudaError_t error = allow_shared(kernel, shared);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                          static_cast<unsigned>(grid.z));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = cooperative ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace variator::cuda
#endif
