// What is done with a list of groups beside the kernels. Groups come in the order of their tokens;
// one with a span of 0 holds none and may stand anywhere.
#pragma once

#include "params.h"

namespace variator {

// Start and span of ceil(n / k) groups for each of `rows` rows of n tokens, from a row's first real
// token to its last; `mask` has a byte a token. Groups behind the last token have a span of 0.
void list_groups(const uint8_t* mask, int64_t rows, int64_t n, int64_t k, int64_t* start,
                 int64_t* span);

// How many tokens lie in spans, real or not; -1 if a slot lies outside of the list of as many
// tokens, or a token in two spans.
int64_t held(const Groups& groups, int64_t tokens);

// Writes the groups that hold a slot to start and span, in order; returns how many.
int64_t compact(const Groups& groups, int64_t* start, int64_t* span);

// Copies the rows of x [tokens, d] that no group holds to y; element_size bytes an element.
void copy_outside(const Groups& groups, int64_t tokens, const void* x, int64_t x_stride, void* y,
                  int64_t d, int64_t element_size);

}  // namespace variator
