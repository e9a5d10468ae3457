// What is done with a list of groups beside the kernels. Groups come in the order of their tokens;
// one with a span of 0 holds none and may stand anywhere.
#pragma once

#include "params.h"

namespace variator {

// `count` groups from the `first` on.
Groups part(Groups groups, int64_t first, int64_t count);

// Start and span of ceil(n / k) groups for each of `rows` rows of n tokens, from a row's first real
// token to its last; `mask` has a byte a token. Groups behind the last token have a span of 0.
void list_groups(const uint8_t* mask, int64_t rows, int64_t n, int64_t k, int64_t* start,
                 int64_t* span);

// How many tokens lie in spans, real or not; -1 if a slot lies outside of the list of as many
// tokens, or a token in two spans.
int64_t held(const Groups& groups, int64_t tokens);

// Rows in which tokens stay whole: the first and the last so many real ones of each, and those with
// a byte in `keep`. Row i is tokens offsets[i] .. offsets[i+1]-1 of a list of n; without offsets it
// is i*n .. i*n+n-1.
struct KeptRows {
    const uint8_t* mask;     // a byte a token, or null: all real
    const uint8_t* keep;     // a byte a token, or null
    const int64_t* offsets;  // [rows + 1], or null
    int64_t rows, n, k;
    int64_t first, last;
};

// How many groups those rows have: the most of a row, or with offsets all of them.
int64_t count_kept_groups(const KeptRows& rows);

// Start, span and kept flag of each: `count` of them a row, of which those behind the last token
// have a span of 0; with offsets one list of them.
void list_kept_groups(const KeptRows& rows, int64_t count, int64_t* start, int64_t* span,
                      uint8_t* kept);

// Writes the groups that hold a slot to start and span (and, if groups are kept, kept), in order;
// returns how many.
int64_t compact(const Groups& groups, int64_t* start, int64_t* span, uint8_t* kept);

// Copies the rows of x [tokens, d] that no group holds to y; element_size bytes an element.
void copy_outside(const Groups& groups, int64_t tokens, const void* x, int64_t x_stride, void* y,
                  int64_t d, int64_t element_size);

}  // namespace variator
