// Cutting the groups into cache-sized chunks, the chunks among threads, scratch into arrays.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gemm.h"
#include "scratch.h"

namespace variator {
namespace VARIATOR_ISA {

// Groups worked on together: enough rows to keep a weight panel busy, few enough that their
// vectors (48 · 768 · 4 bytes) stay in the second-level cache.
constexpr int64_t chunk_groups = 48;

// work(thread) for `used` threads, each on one of its own.
template <class F>
void for_threads(int64_t used, F work) {
#ifdef _OPENMP
    if (used > 1) {
        bool failed = false;
#pragma omp parallel for schedule(static, 1) num_threads(static_cast<int>(used))
        for (int64_t thread = 0; thread < used; ++thread) {
            // An exception must not leave a parallel region; scratch memory is all that can throw.
            try {
                work(thread);
            } catch (...) {
#pragma omp atomic write
                failed = true;
            }
        }
        if (failed) out_of_memory();
        return;
    }
#endif
    for (int64_t thread = 0; thread < used; ++thread) work(thread);
}

// work(first, last, thread) over all groups: an even range a thread, cut into chunks of whole
// tiles. The split depends on sizes and `threads` alone.
template <class V, class F>
void for_chunks(int64_t groups, int threads, F work) {
    const int64_t used = larger(1, smaller(threads, groups));
    for_threads(used, [&](int64_t thread) {
        const int64_t end = groups * (thread + 1) / used;
        int64_t first = groups * thread / used;
        const int64_t chunks = (end - first + chunk_groups - 1) / chunk_groups;
        const int64_t size =
            chunks == 0 ? 0 : round_up((end - first + chunks - 1) / chunks, V::tile_rows);
        for (; first < end; first += size)
            work(first, smaller(end, first + size), static_cast<int>(thread));
    });
}

// work(item) for all items, the next one to whichever thread is free; what an item computes depends
// on no other.
template <class F>
void for_items(int64_t items, int threads, F work) {
    int64_t next = 0;
    for_threads(larger(1, smaller(threads, items)), [&](int64_t) {
        for (;;) {
            const int64_t item = __atomic_fetch_add(&next, int64_t{1}, __ATOMIC_RELAXED);
            if (item >= items) return;
            work(item);
        }
    });
}

// Memory that several threads share, given back at the end.
class Allocation {
  public:
    Allocation() = default;
    ~Allocation() { release(data_); }
    Allocation(const Allocation&) = delete;
    Allocation& operator=(const Allocation&) = delete;
    // Once.
    void take(size_t bytes) { data_ = static_cast<char*>(allocate(bytes)); }
    char* data() const { return data_; }

  private:
    char* data_ = nullptr;
};

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
