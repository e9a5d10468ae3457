// Which pages of this process were written, as the kernel tells (Linux 6.7 and newer): asynchronous
// write protection of userfaultfd, read by PAGEMAP_SCAN. No privilege, no signal handler, no
// thread.
#pragma once

#include <cstdint>
#include <vector>

namespace variator::write_tracking {

// Memory from begin to end.
struct Range {
    uintptr_t begin, end;
    bool empty() const { return begin >= end; }
    bool overlaps(const Range& other) const { return begin < other.end && other.begin < end; }
};

// The whole pages inside a range; empty if it holds none.
Range whole_pages(Range range);

// Why nothing can be tracked here; null if it can. The caller serialises this and all that follows.
const char* why_unavailable();

// From now on writes to these pages are seen. False: the kernel cannot see all of them, as where
// other processes share the memory. Pages that a file would still show through are made this
// process's own first. Marks of earlier writes are gone. `anonymous`: no file is behind them.
bool track(Range pages, bool& anonymous);
void untrack(Range pages);

struct Found {
    Range pages;
    bool lost;  // not in memory, or a file's once more: track() them again
};
// Appends what was written since the last look, whoever wrote it, and what is lost; marks are taken
// away. False: the pages are not tracked any more, and some marks are gone with nothing to show.
bool written(Range pages, bool anonymous, std::vector<Found>& found);

// In a forked child: its parent's descriptors say nothing of it, and its pages are not tracked.
void restart_after_fork();

}  // namespace variator::write_tracking
