// Working memory of the calling thread, kept for its next call.
#pragma once

#include <cstddef>

namespace variator {

// At least `bytes`, 64-byte aligned, contents undefined; valid until the thread's next call.
void* thread_scratch(size_t bytes);

// 64-byte aligned, contents undefined; release gives it back.
void* allocate(size_t bytes);
void release(void* memory);

// Throws std::bad_alloc; here, so that no exception code is compiled for one instruction set.
[[noreturn]] void out_of_memory();

}  // namespace variator
