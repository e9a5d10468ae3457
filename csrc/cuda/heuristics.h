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

// A GEMM's output tile on Hopper. Each is made by warps in groups of four, 64 of its rows a group.
// Blocks of a cluster lie below one another: where rows end they may have nothing to do.
struct GemmTile {
    int64_t rows, columns, cluster;
};
constexpr GemmTile gemm_tiles[] = {{64, 128, 1}, {128, 192, 2}, {128, 256, 2}};

// Clocks of a tile for 16 of the inner dimension: products on tensor cores, or steps of 128 bytes
// of shared memory, a clock each. wgmma reads 32 bytes of each row of both operands there, a
// group's own 64 rows and all columns, where TMA wrote them. Counted from machine code, never
// measured.
constexpr int64_t gemm_tile_clocks(GemmTile tile) {
    const int64_t groups = tile.rows / 64;
    const int64_t shared = (groups * (64 + tile.columns) + tile.rows + tile.columns) / 4;
    return larger(tile.rows * tile.columns / 128, shared);
}

// Which of gemm_tiles: a large one takes fewer clocks a FLOP, a small one leaves fewer
// multiprocessors idle in the last round.
constexpr int gemm_tile(int64_t rows, int64_t columns, int64_t multiprocessors) {
    int best = 0;
    int64_t least = 0;
    for (int i = 0; i < 3; ++i) {
        const GemmTile tile = gemm_tiles[i];
        const int64_t down = ceil_div(rows, tile.rows * tile.cluster) * tile.cluster;
        const int64_t tiles = down * ceil_div(columns, tile.columns);
        const int64_t clocks = ceil_div(tiles, multiprocessors) * gemm_tile_clocks(tile);
        if (i == 0 || clocks <= least) best = i, least = clocks;
    }
    return best;
}

}  // namespace variator::cuda::heuristics
