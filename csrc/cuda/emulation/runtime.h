// The part of the CUDA runtime that the launchers use, for a CPU. The emulation shows what the
// kernels compute, not how they would run on a GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess ? "no error" : "invalid configuration argument";
}

namespace variator::cuda {

struct Grid {
    int64_t x, y = 1, z = 1;
};

inline cudaError_t count_multiprocessors(int& count) {
    count = 6;  // small inputs, so few
    return cudaSuccess;
}

// How many launches there were, and whether they run: without, what is in front of them can be
// timed.
struct Launches {
    int64_t count = 0;
    bool run = true;
    bool next() {
        ++count;
        return run;
    }
};
extern Launches launched;

// Runs body() as every thread of the grid. The blocks of a cooperative launch run side by side.
cudaError_t run_grid(Grid grid, int threads, size_t shared, bool cooperative,
                     const std::function<void()>& body);

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), Grid grid, int threads, size_t shared,
                   cudaStream_t, bool cooperative, const Arguments&... arguments) {
    return run_grid(grid, threads, shared, cooperative,
                    [&] { kernel(static_cast<Parameters>(arguments)...); });
}

template <class Kernel>
cudaError_t blocks_at_once(Kernel, int, size_t, int& blocks) {
    return count_multiprocessors(blocks);
}

}  // namespace variator::cuda
