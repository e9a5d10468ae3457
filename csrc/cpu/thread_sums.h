// Sums over all tokens that several threads build: one array a thread, added up at the end in
// thread order, so the result depends on the number of threads but not on their timing.
#pragma once

#include "group_chunks.h"
#include "scratch.h"

namespace variator {
namespace VARIATOR_ISA {

template <class S>
class ThreadSums {
  public:
    ThreadSums(int threads, int64_t rows, int64_t columns, int64_t padded)
        : threads_(threads), rows_(rows), columns_(columns), padded_(padded) {
        const int64_t count = threads * rows * padded;
        data_ = static_cast<S*>(allocate(static_cast<size_t>(count) * sizeof(S)));
        __builtin_memset(data_, 0, static_cast<size_t>(count) * sizeof(S));
    }
    ~ThreadSums() { release(data_); }
    ThreadSums(const ThreadSums&) = delete;
    ThreadSums& operator=(const ThreadSums&) = delete;

    S* of(int thread) const { return data_ + thread * rows_ * padded_; }

    void store(void* out) const {
        S* target = static_cast<S*>(out);
        for (int64_t row = 0; row < rows_; ++row)
            for (int64_t i = 0; i < columns_; ++i) {
                S sum = 0;
                for (int t = 0; t < threads_; ++t) sum += of(t)[row * padded_ + i];
                target[row * columns_ + i] = sum;
            }
    }

  private:
    int64_t threads_, rows_, columns_, padded_;
    S* data_;
};

// sums += row
template <class V>
void add_row(typename V::Scalar* sums, const typename V::Scalar* row, int64_t n) {
    for_parts<V>(n, [&](Part<V> part) {
        part.template store<Acc<V>>(
            sums, part.template load<Acc<V>>(sums) + part.template load<Acc<V>>(row));
    });
}

}  // namespace VARIATOR_ISA
}  // namespace variator
