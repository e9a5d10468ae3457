// From a mask or cumulative lengths to the list of groups.
#pragma once

#include <cstdint>

namespace variator {

// A batch of rows: `rows` of n tokens each with an optional mask [rows, n], a byte a token, or,
// where `offsets` is set, packed rows: row b holds the tokens offsets[b] .. offsets[b+1]-1.
struct Batch {
    int64_t rows, n;
    const uint8_t* mask;
    const int64_t* offsets;
};

// Groups of k slots, row after row. Padded form (`per_row` > 0): `per_row` entries for each row,
// those behind its last token empty. Compact form (`per_row` = 0): no empty tail.
// start/length may be null to count only. Returns the number of groups.
int64_t list_groups(const Batch& batch, int64_t k, int64_t per_row, int64_t* start,
                    int64_t* length);

// Copies the rows of x outside all spans of real tokens to y; element_size bytes an element.
void copy_padding(const Batch& batch, const void* x, int64_t x_stride, void* y, int64_t d,
                  int64_t element_size);

}  // namespace variator
