// Memory that somebody made something of: has it changed since?
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "write_tracking.h"

namespace variator {

// From construction to destruction; the memory must stay mapped while it is asked about. A write of
// any kind counts: what matters is what the bytes are when somebody asks. All of it may be called
// by many threads.
class Memory {
  public:
    Memory(uintptr_t begin, uintptr_t end, bool trackable, int threads);
    ~Memory();
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;

    // How changes are noticed: "tracked" (the kernel reports written pages, and the few bytes
    // outside of whole pages are read), "read" (all bytes, each time) or "frozen" (not at all).
    std::string rule() const;
    // What was written before freezing counts, and after thawing what was written meanwhile.
    void freeze(bool frozen, int threads);
    // Whether `copy` is what the last look saw here.
    bool holds(uintptr_t copy, int threads) const;

    // Counts the changes seen: of each memory one at least for any number of writes between two
    // calls that left other bytes behind. The sum over `memories`.
    static int64_t changes(const std::vector<Memory*>& memories, int threads);

  private:
    int64_t look(int threads);
    void read(int threads);
    uint64_t read_outside() const;
    void start_tracking();

    write_tracking::Range bytes, pages;
    bool trackable, tracked = false, anonymous = false, frozen = false, stale = true;
    uint64_t outside = 0, content = 0;  // checksums: of the bytes outside of `pages`; of all
    int64_t count = 0;

    friend struct Registry;
};

// Why no memory is "tracked" here; null if it can be.
const char* why_not_tracked();

// A checksum of 64 bits. A change inside one aligned word of 8 bytes always changes it.
uint64_t checksum(write_tracking::Range bytes, int threads);

}  // namespace variator
