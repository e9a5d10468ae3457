#include "group_lists.h"

#include <cstring>

namespace variator {

void list_groups(const uint8_t* mask, int64_t rows, int64_t n, int64_t k, int64_t* start,
                 int64_t* span) {
    const int64_t groups = (n + k - 1) / k;
    for (int64_t row = 0; row < rows; ++row) {
        int64_t first = row * n, last = first + n;
        while (first < last && !mask[first]) ++first;
        while (last > first && !mask[last - 1]) --last;
        if (first == last) first = last = row * n;
        for (int64_t i = 0; i < groups; ++i) {
            const int64_t left = last - first - i * k;
            *span++ = left < 0 ? 0 : left < k ? left : k;
            *start++ = first + (left > 0 ? i * k : 0);
        }
    }
}

int64_t held(const Groups& groups, int64_t tokens) {
    int64_t sum = 0, last = 0;
    for (int64_t i = 0; i < groups.count; ++i) {
        const int64_t start = groups.start[i], span = groups.span[i];
        if (span == 0) continue;
        if (start < last || span < 0 || span > groups.k || start > tokens - span) return -1;
        sum += span, last = start + span;
    }
    return sum;
}

int64_t compact(const Groups& groups, int64_t* start, int64_t* span) {
    int64_t count = 0;
    for (int64_t i = 0; i < groups.count; ++i) {
        if (groups.span[i] == 0) continue;
        start[count] = groups.start[i];
        span[count++] = groups.span[i];
    }
    return count;
}

void copy_outside(const Groups& groups, int64_t tokens, const void* x, int64_t x_stride, void* y,
                  int64_t d, int64_t element_size) {
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
    int64_t done = 0;
    for (int64_t i = 0; i < groups.count; ++i) {
        if (groups.span[i] == 0) continue;
        const int64_t first = groups.start[i], last = first + groups.span[i];
        copy(done, first);
        if (groups.mask)
            for (int64_t token = first; token < last; ++token)
                if (!groups.mask[token]) copy(token, token + 1);
        done = last;
    }
    copy(done, tokens);
}

}  // namespace variator
