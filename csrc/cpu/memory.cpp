#include "memory.h"

#include <pthread.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <set>

#include "fork.h"

namespace variator {

using write_tracking::Range;

// All that exist: pages may belong to several, and who looks first takes the kernel's marks away.
struct Registry {
    std::mutex mutex;
    std::set<Memory*> all;

    // Found at the first use and never destroyed: threads may outlive static objects.
    static Registry& get() {
        static auto* registry = [] {
            auto* made = new Registry;
            pthread_atfork([] { get().mutex.lock(); }, [] { get().mutex.unlock(); },
                           [] {
                               get().lose();
                               get().mutex.unlock();
                           });
            return made;
        }();
        return *registry;
    }

    // A child's pages are not tracked, and nobody knows what was written before it looks.
    void lose() {
        write_tracking::restart_after_fork();
        for (Memory* memory : all) memory->tracked = false, memory->stale = true;
    }

    void mark(const write_tracking::Found& found) {
        for (Memory* memory : all) {
            if (!memory->pages.overlaps(found.pages)) continue;
            memory->stale = true;
            if (found.lost) memory->tracked = false;
        }
    }
};

namespace {

constexpr int64_t chunk_bytes = 1 << 16;
// Below this, reading costs no more than asking the kernel.
constexpr uintptr_t least_tracked = 1 << 16;

// For a given hash one-to-one in the word, and for a given word in the hash: one changed word is
// never lost.
uint64_t mix(uint64_t hash, uint64_t word) {
    hash = (hash ^ word) * 0x9E3779B97F4A7C15ull;
    return hash ^ (hash >> 29);
}

uint64_t chunk_checksum(const unsigned char* p, int64_t bytes, uint64_t seed) {
    constexpr int lanes = 8;
    uint64_t hash[lanes], word[lanes];
    for (int i = 0; i < lanes; ++i) hash[i] = mix(seed, i);
    for (; bytes >= int64_t{sizeof word}; p += sizeof word, bytes -= sizeof word) {
        std::memcpy(word, p, sizeof word);
        for (int i = 0; i < lanes; ++i) hash[i] = mix(hash[i], word[i]);
    }
    std::memset(word, 0, sizeof word);
    std::memcpy(word, p, static_cast<size_t>(bytes));
    uint64_t all = mix(seed, static_cast<uint64_t>(bytes));
    for (int i = 0; i < lanes; ++i) all = mix(all, mix(hash[i], word[i]));
    return all;
}

}  // namespace

uint64_t checksum(Range bytes, int threads) {
    if (bytes.empty()) return 0;
    const auto* data = reinterpret_cast<const unsigned char*>(bytes.begin);
    const auto size = static_cast<int64_t>(bytes.end - bytes.begin);
    const int64_t chunks = (size + chunk_bytes - 1) / chunk_bytes;
    if (chunks == 1) return chunk_checksum(data, size, 1);
    std::vector<uint64_t> hashes(static_cast<size_t>(chunks));
    [[maybe_unused]] const int used = usable_threads(threads);
#pragma omp parallel for num_threads(used) if (chunks >= 16)
    for (int64_t i = 0; i < chunks; ++i) {
        const int64_t at = i * chunk_bytes;
        hashes[static_cast<size_t>(i)] =
            chunk_checksum(data + at, std::min(chunk_bytes, size - at), static_cast<uint64_t>(i));
    }
    uint64_t all = static_cast<uint64_t>(size);
    for (uint64_t hash : hashes) all = mix(all, hash);
    return all;
}

const char* why_not_tracked() {
    std::lock_guard<std::mutex> lock(Registry::get().mutex);
    return write_tracking::why_unavailable();
}

Memory::Memory(uintptr_t begin, uintptr_t end, bool can_be_tracked, int threads)
    : bytes{begin, end}, pages{begin, begin}, trackable(can_be_tracked) {
    std::lock_guard<std::mutex> lock(Registry::get().mutex);
    const Range whole = write_tracking::whole_pages(bytes);
    if (trackable && whole.end - whole.begin >= least_tracked) pages = whole;
    Registry::get().all.insert(this);
    start_tracking();
    read(threads);
}

Memory::~Memory() {
    Registry& registry = Registry::get();
    std::lock_guard<std::mutex> lock(registry.mutex);
    registry.all.erase(this);
    if (!tracked || write_tracking::why_unavailable()) return;
    // Pages of others stay tracked: only what is nobody's is given up.
    const bool shared = std::any_of(registry.all.begin(), registry.all.end(), [&](Memory* other) {
        return other->tracked && other->pages.overlaps(pages);
    });
    if (!shared) write_tracking::untrack(pages);
}

std::string Memory::rule() const {
    std::lock_guard<std::mutex> lock(Registry::get().mutex);
    return frozen ? "frozen" : tracked ? "tracked" : "read";
}

void Memory::freeze(bool wanted, int threads) {
    std::lock_guard<std::mutex> lock(Registry::get().mutex);
    write_tracking::why_unavailable();  // notices a process that was cloned
    stale = stale || frozen;
    frozen = false;
    if (wanted) look(threads);  // what was written until now counts
    frozen = wanted;
}

bool Memory::holds(uintptr_t copy, int threads) const {
    std::lock_guard<std::mutex> lock(Registry::get().mutex);
    return checksum({copy, copy + (bytes.end - bytes.begin)}, threads) == content;
}

// Before the bytes are read: what is written afterwards shows.
void Memory::start_tracking() {
    tracked = !pages.empty() && !write_tracking::why_unavailable() &&
              write_tracking::track(pages, anonymous);
    Registry::get().mark({pages, false});  // others' marks are gone
    if (!tracked) pages = {bytes.begin, bytes.begin};
}

uint64_t Memory::read_outside() const {
    if (!tracked) return 0;
    return mix(checksum({bytes.begin, pages.begin}, 1), checksum({pages.end, bytes.end}, 1));
}

void Memory::read(int threads) {
    outside = read_outside();
    content = checksum(bytes, threads);
    stale = false;
}

int64_t Memory::look(int threads) {
    if (frozen) return count;
    if (tracked) {
        std::vector<write_tracking::Found> found;
        if (!write_tracking::written(pages, anonymous, found)) found = {{pages, true}};
        for (const auto& part : found) Registry::get().mark(part);
    }
    // After a fork, or where other memory took the place of this.
    if (!tracked && !pages.empty()) start_tracking();
    if (!tracked) stale = true;
    if (!stale) stale = read_outside() != outside;
    if (stale) {
        const uint64_t known = content;
        read(threads);
        count += content != known;
    }
    return count;
}

int64_t Memory::changes(const std::vector<Memory*>& memories, int threads) {
    std::lock_guard<std::mutex> lock(Registry::get().mutex);
    write_tracking::why_unavailable();  // notices a process that was cloned
    int64_t sum = 0;
    for (Memory* memory : memories) sum += memory->look(threads);
    return sum;
}

}  // namespace variator
