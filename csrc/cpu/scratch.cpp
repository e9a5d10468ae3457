#include "scratch.h"

#include <cstdlib>
#include <cstring>
#include <new>

namespace variator {
namespace {

void* allocate(size_t bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, bytes == 0 ? 64 : bytes) != 0) throw std::bad_alloc();
    return memory;
}

struct Buffer {
    void* memory = nullptr;
    size_t bytes = 0;
    ~Buffer() { std::free(memory); }
};

thread_local Buffer buffer;

}  // namespace

void* thread_scratch(size_t bytes) {
    if (bytes > buffer.bytes) {
        std::free(buffer.memory);
        buffer = {nullptr, 0};
        buffer.memory = allocate(bytes);
        buffer.bytes = bytes;
    }
    return buffer.memory;
}

void* allocate_zeroed(size_t bytes) {
    void* memory = allocate(bytes);
    std::memset(memory, 0, bytes);
    return memory;
}

void out_of_memory() { throw std::bad_alloc(); }

void release_zeroed(void* memory) { std::free(memory); }

}  // namespace variator
