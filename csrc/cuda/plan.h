// Decisions made on the host before a launch, from sizes alone: tests run them on a CPU.
#pragma once

#include "params.h"

namespace variator::cuda::plan {

constexpr int64_t group_tile = 8, column_block = 32, warps_a_block = 8;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

constexpr int64_t tiles(int64_t groups) { return ceil_div(groups, group_tile); }

// Column blocks of a row that each warp of the merge keeps in registers; 0: more than fit.
constexpr int resident_blocks(int64_t k, int64_t d) {
    const int64_t each = ceil_div(ceil_div(d, column_block), warps_a_block);
    return k <= 4 && each <= 4 ? static_cast<int>(each) : 0;
}

// Column blocks that one thread block of the decompress writes. Few groups leave multiprocessors
// idle: then the columns of a tile are split, at the price of its group half being made in each.
constexpr int64_t blocks_a_part(int64_t groups, int64_t d, int64_t multiprocessors) {
    const int64_t blocks = ceil_div(d, column_block);
    const int64_t parts = larger(multiprocessors / larger(tiles(groups), 1), 1);
    return larger(ceil_div(blocks, parts), smaller(blocks, 4));
}

}  // namespace variator::cuda::plan
