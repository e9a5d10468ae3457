#include "scratch.h"

#include <cstdlib>
#include <new>

namespace variator {
namespace {

struct Buffer {
    void* memory = nullptr;
    size_t bytes = 0;
    ~Buffer() { std::free(memory); }
};

thread_local Buffer buffer;

}  // namespace

void* allocate(size_t bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, bytes == 0 ? 64 : bytes) != 0) throw std::bad_alloc();
    return memory;
}

void release(void* memory) { std::free(memory); }

void* thread_scratch(size_t bytes) {
    if (bytes > buffer.bytes) {
        std::free(buffer.memory);
        buffer = {nullptr, 0};
        buffer.memory = allocate(bytes);
        buffer.bytes = bytes;
    }
    return buffer.memory;
}

void out_of_memory() { throw std::bad_alloc(); }

}  // namespace variator
