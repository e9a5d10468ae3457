// The tokens of a tile's slots in shared memory. To find one takes a division and some fifty
// instructions: too many for a loop over columns.
#pragma once

#include "kernels/mma_tile.cuh"

namespace variator::cuda {

struct TileTokens {
    // The token to be merged, or -1: none, or -2 - token: padding.
    int code[max_ratio][tile_groups];

    // Of the groups from `first` on, in slots up to a multiple of 8. Kept groups have none if they
    // are `left_out`. Called by all threads, which have to meet before they read.
    VARIATOR_DEVICE void find(const Groups& groups, int64_t first, bool left_out) {
        static_assert(threads == max_ratio * tile_groups, "a slot a thread");
        const int slot = thread_index() / tile_groups, in_tile = thread_index() % tile_groups;
        if (slot >= (groups.k + 7) / 8 * 8) return;
        const Groups::Slot found = groups.slot(first + in_tile, slot);
        const int token = static_cast<int>(found.token);
        const bool without = token < 0 || (left_out && groups.whole(first + in_tile));
        code[slot][in_tile] = without ? -1 : found.real ? token : -2 - token;
    }

    // The token that a slot owns, to be merged or not, or -1.
    static VARIATOR_DEVICE int owned(int code) { return code < 0 ? -2 - code : code; }
};

}  // namespace variator::cuda
