// Cutting the groups into cache-sized chunks, the chunks among threads, scratch into arrays.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "gemm.h"

namespace variator {
namespace VARIATOR_ISA {

// Groups worked on together: enough rows to keep a weight panel busy, few enough that their
// vectors (48 · 768 · 4 bytes) stay in the second-level cache.
constexpr int64_t chunk_groups = 48;

// work(first, last, thread) over all groups; the split depends on sizes and `threads` alone.
template <class F>
void for_chunks(int64_t groups, int threads, F work) {
    if (groups == 0) return;
    const int64_t rounds = (groups + threads * chunk_groups - 1) / (threads * chunk_groups);
    const int64_t chunks = smaller(groups, threads * rounds);
    const int64_t size = (groups + chunks - 1) / chunks;
#ifdef _OPENMP
    const int used = static_cast<int>(smaller(threads, chunks));
    if (used > 1) {
#pragma omp parallel for schedule(static) num_threads(used)
        for (int64_t c = 0; c < chunks; ++c)
            if (c * size < groups)
                work(c * size, smaller(groups, (c + 1) * size), omp_get_thread_num());
        return;
    }
#endif
    for (int64_t c = 0; c < chunks; ++c)
        if (c * size < groups) work(c * size, smaller(groups, (c + 1) * size), 0);
}

// Offsets of arrays within one allocation, each on its own cache line.
struct Carver {
    size_t bytes = 0;
    template <class T>
    int64_t reserve(int64_t count) {
        size_t at = bytes;
        bytes += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
        return static_cast<int64_t>(at);
    }
};

}  // namespace VARIATOR_ISA
}  // namespace variator
