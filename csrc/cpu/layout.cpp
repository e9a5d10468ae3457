#include "layout.h"

#include <cstring>

namespace variator {
namespace {

struct Span {
    int64_t first, length;
};

// From a row's first real token to its last, as flat token indices.
Span real_span(const Batch& batch, int64_t row) {
    if (batch.offsets) return {batch.offsets[row], batch.offsets[row + 1] - batch.offsets[row]};
    const int64_t start = row * batch.n;
    if (!batch.mask) return {start, batch.n};
    int64_t first = 0, last = batch.n;
    while (first < last && !batch.mask[start + first]) ++first;
    while (last > first && !batch.mask[start + last - 1]) --last;
    return {start + first, last - first};
}

}  // namespace

int64_t list_groups(const Batch& batch, int64_t k, int64_t per_row, int64_t* start,
                    int64_t* length) {
    int64_t count = 0;
    for (int64_t row = 0; row < batch.rows; ++row) {
        const Span span = real_span(batch, row);
        const int64_t groups = per_row > 0 ? per_row : (span.length + k - 1) / k;
        for (int64_t i = 0; i < groups; ++i, ++count) {
            if (!start) continue;
            const int64_t left = span.length - i * k;
            length[count] = left < 0 ? 0 : left < k ? left : k;
            start[count] = span.first + (left > 0 ? i * k : 0);
        }
    }
    return count;
}

void copy_padding(const Batch& batch, const void* x, int64_t x_stride, void* y, int64_t d,
                  int64_t element_size) {
    const char* source = static_cast<const char*>(x);
    char* target = static_cast<char*>(y);
    auto copy = [&](int64_t from, int64_t to) {
        if (to <= from) return;
        if (x_stride == d) {
            std::memcpy(target + from * d * element_size, source + from * d * element_size,
                        static_cast<size_t>((to - from) * d * element_size));
            return;
        }
        for (int64_t i = from; i < to; ++i)
            std::memcpy(target + i * d * element_size, source + i * x_stride * element_size,
                        static_cast<size_t>(d * element_size));
    };
    for (int64_t row = 0; row < batch.rows; ++row) {
        const Span span = real_span(batch, row);
        const int64_t start = row * batch.n;
        copy(start, span.first);
        copy(span.first + span.length, start + batch.n);
        if (!batch.mask) continue;
        for (int64_t i = span.first; i < span.first + span.length; ++i)
            if (!batch.mask[i]) copy(i, i + 1);
    }
}

}  // namespace variator
