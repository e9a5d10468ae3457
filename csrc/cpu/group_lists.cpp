#include "group_lists.h"

#include <algorithm>
#include <cstring>

namespace variator {
namespace {

// group(start, span, kept) over those of one row, in order.
template <class F>
void for_groups(const KeptRows& rows, int64_t row, F group) {
    int64_t begin = row * rows.n, end = begin + rows.n;
    if (rows.offsets) {
        begin = std::clamp(rows.offsets[row], int64_t{0}, rows.n);
        end = std::clamp(rows.offsets[row + 1], begin, rows.n);
    }
    auto real = [&](int64_t token) { return !rows.mask || rows.mask[token]; };
    int64_t count = 0, rank = 0;
    for (int64_t token = begin; token < end; ++token) count += real(token);
    // A run of tokens to be merged: from its first real one to its last.
    int64_t run = -1, run_end = -1;
    auto cut = [&] {
        for (; run >= 0 && run < run_end; run += rows.k)
            group(run, std::min(rows.k, run_end - run), false);
        run = -1;
    };
    for (int64_t token = begin; token < end; ++token) {
        if (!real(token)) continue;
        if (rank < rows.first || rank >= count - rows.last || (rows.keep && rows.keep[token])) {
            cut();
            group(token, 1, true);
        } else {
            if (run < 0) run = token;
            run_end = token + 1;
        }
        ++rank;
    }
    cut();
}

}  // namespace

int64_t count_kept_groups(const KeptRows& rows) {
    int64_t most = 0, sum = 0;
    for (int64_t row = 0; row < rows.rows; ++row) {
        int64_t count = 0;
        for_groups(rows, row, [&](int64_t, int64_t, bool) { ++count; });
        most = std::max(most, count), sum += count;
    }
    return rows.offsets ? sum : most;
}

void list_kept_groups(const KeptRows& rows, int64_t count, int64_t* start, int64_t* span,
                      uint8_t* kept) {
    int64_t i = 0;
    auto write = [&](int64_t at, int64_t size, bool whole) {
        start[i] = at, span[i] = size, kept[i] = whole;
        ++i;
    };
    for (int64_t row = 0; row < rows.rows; ++row) {
        for_groups(rows, row, write);
        while (!rows.offsets && i < (row + 1) * count) write(row * rows.n, 0, false);
    }
}

Groups part(Groups groups, int64_t first, int64_t count) {
    groups.start += first, groups.span += first, groups.count = count;
    if (groups.kept) groups.kept += first;
    return groups;
}

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

int64_t compact(const Groups& groups, int64_t* start, int64_t* span, uint8_t* kept) {
    int64_t count = 0;
    for (int64_t i = 0; i < groups.count; ++i) {
        if (groups.span[i] == 0) continue;
        start[count] = groups.start[i];
        if (groups.kept) kept[count] = groups.kept[i];
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
