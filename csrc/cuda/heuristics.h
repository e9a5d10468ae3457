// Tile and split heuristics: decided on the host before a launch, from sizes alone, so tests run
// them on a CPU.
#pragma once

#include "params.h"

namespace variator::cuda::heuristics {

constexpr int64_t group_tile = 8, column_block = 32, warps_a_block = 8;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

constexpr int64_t tiles(int64_t groups) { return ceil_div(groups, group_tile); }

// How many column blocks of four rows each warp of the merge keeps in registers; 0 if they do not
// fit.
constexpr int resident_blocks(int64_t d) {
    const int64_t each = ceil_div(ceil_div(d, column_block), warps_a_block);
    return each <= 4 ? static_cast<int>(each) : 0;
}

// How many column blocks one thread block of the decompress writes. Few groups would leave
// multiprocessors idle, so then the columns of a tile are split, and each part recomputes W_1u u.
constexpr int64_t blocks_a_part(int64_t groups, int64_t d, int64_t multiprocessors) {
    const int64_t blocks = ceil_div(d, column_block);
    const int64_t parts = larger(multiprocessors / larger(tiles(groups), 1), 1);
    return larger(ceil_div(blocks, parts), smaller(blocks, 4));
}

constexpr int64_t skinny_gemm_tile = 64;

// Split-K of the one-launch kernel's down projection: enough units for every multiprocessor, each a
// sum over at least 256 columns of f.
constexpr int64_t splits(int64_t groups, int64_t d, int64_t f, int64_t multiprocessors) {
    const int64_t tiles =
        larger(ceil_div(groups, skinny_gemm_tile) * ceil_div(d, skinny_gemm_tile), 1);
    return larger(smaller(multiprocessors / tiles, f / 256), 1);
}

// Thread blocks of the one-launch kernel: as many as run at once, but no more than its largest
// phase has units of work.
constexpr int64_t one_launch_blocks(int64_t groups, int64_t d, int64_t f, int64_t parts_of_f,
                                    int64_t at_once) {
    const int64_t down = ceil_div(groups, skinny_gemm_tile);
    const int64_t units = larger(down * ceil_div(f, skinny_gemm_tile),
                                 down * ceil_div(d, skinny_gemm_tile) * parts_of_f);
    return larger(smaller(larger(units, tiles(groups)), at_once), 1);
}

// A weight gradient's thread block has up to 9 tiles of 8 left columns: 64 of a bottleneck and the
// scores of 8 slots. More are cut into pieces of equal size.
constexpr int gradient_tiles = 9, gradient_columns = 128;
constexpr int64_t gradient_pieces(int64_t left) { return ceil_div(left, 8 * gradient_tiles); }
constexpr int64_t gradient_tiles_a_piece(int64_t left) {
    return ceil_div(ceil_div(left, 8), larger(gradient_pieces(left), 1));
}

// How many shares of the groups a weight gradient is split into: one thread block for every
// multiprocessor, each a sum over at least 128 rows.
constexpr int64_t gradient_shares(int64_t groups, int64_t left, int64_t d, int64_t slots,
                                  int64_t multiprocessors) {
    const int64_t a_share = gradient_pieces(left) * ceil_div(d, gradient_columns) * slots;
    return larger(smaller(multiprocessors / larger(a_share, 1), groups / 128), 1);
}

// Whether a GEMM on Hopper takes the large tile [128, 192], which reads fewer bytes per FLOP, or
// the small one [64, 128], which leaves fewer multiprocessors idle.
constexpr bool large_gemm_tile(int64_t rows, int64_t columns, int64_t multiprocessors) {
    const int64_t large = ceil_div(rows, 128) * ceil_div(columns, 192);
    const int64_t small = ceil_div(rows, 64) * ceil_div(columns, 128);
    // In units of a small tile's time; a large one has 3 times its FLOPs.
    return 3 * ceil_div(large, multiprocessors) <= ceil_div(small, multiprocessors) + 1;
}

}  // namespace variator::cuda::heuristics
