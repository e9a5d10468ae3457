#include "write_tracking.h"

#if defined(__linux__)

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>

namespace variator::write_tracking {
namespace {

// The kernel's interface, which headers of older systems lack.
struct UffdApi {
    uint64_t api, features, ioctls;
};
struct UffdRange {
    uint64_t start, length;
};
struct UffdRegister {
    UffdRange range;
    uint64_t mode, ioctls;
};
struct UffdWriteProtect {
    UffdRange range;
    uint64_t mode;
};
struct PageRegion {
    uint64_t start, end, categories;
};
struct PageScan {
    uint64_t size, flags, start, end, walk_end, regions, region_count, max_pages;
    uint64_t inverted, mask, any_of, returned;
};
struct MapQuery {
    uint64_t size, flags, address;
    uint64_t begin, end, map_flags, page_size, offset, inode;
    uint32_t device[2], name_size, build_id_size;
    uint64_t name, build_id;
};
constexpr unsigned long uffd_api = _IOWR(0xAA, 0x3F, UffdApi);
constexpr unsigned long uffd_register = _IOWR(0xAA, 0x00, UffdRegister);
constexpr unsigned long uffd_unregister = _IOR(0xAA, 0x01, UffdRange);
constexpr unsigned long uffd_write_protect = _IOWR(0xAA, 0x06, UffdWriteProtect);
constexpr unsigned long pagemap_scan = _IOWR('f', 16, PageScan);
constexpr unsigned long map_query = _IOWR('f', 17, MapQuery);
constexpr uint64_t map_or_next = 0x10, map_of_file = 0x20;
constexpr int user_mode_only = 1;
constexpr uint64_t version = 0xAA;
constexpr uint64_t feature_unpopulated = 1u << 13, feature_async = 1u << 15;
constexpr uint64_t mode_write_protect = 1u << 1;  // of a registration
constexpr uint64_t protect = 1;
constexpr uint64_t scan_protects = 1u << 0, scan_needs_tracking = 1u << 1;
constexpr uint64_t page_written = 1u << 1, page_of_file = 1u << 2, page_present = 1u << 3;
constexpr int populate_read = 22, populate_write = 23;  // MADV_...

class Descriptor {
  public:
    int number = -1;

    bool open(int opened) {
        number = opened;
        return number >= 0 && fstat(number, &file) == 0;
    }
    // Daemons close all descriptors, ours among them, and use the numbers for files of their own.
    bool is_ours() const {
        struct stat now{};
        return number >= 0 && fstat(number, &now) == 0 && now.st_dev == file.st_dev &&
               now.st_ino == file.st_ino;
    }
    void close() {
        if (is_ours()) ::close(number);
        number = -1;
    }

  private:
    struct stat file{};
};

struct Descriptors {
    Descriptor uffd, pagemap, maps;
    pid_t process = 0;
};
Descriptors open_here;
const char* unavailable = nullptr;
bool opened = false;

void close_all() {
    open_here.uffd.close();
    open_here.pagemap.close();
    open_here.maps.close();
    opened = false;
}

UffdRange kernel_range(Range pages) { return {pages.begin, pages.end - pages.begin}; }

// Calls seen(region) for each run of pages with these categories; false if the kernel refuses.
template <class Seen>
bool scan(PageScan question, Range pages, const Seen& seen) {
    PageRegion regions[64];
    question.size = sizeof question;
    question.end = pages.end;
    question.regions = reinterpret_cast<uintptr_t>(regions);
    question.region_count = sizeof regions / sizeof regions[0];
    for (uintptr_t at = pages.begin; at < pages.end;) {
        question.start = at;
        const int count = ioctl(open_here.pagemap.number, pagemap_scan, &question);
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) return false;
        for (int i = 0; i < count; ++i) seen(regions[i]);
        if (question.walk_end <= at) return false;
        at = question.walk_end;
    }
    return true;
}

bool any_of_file(Range pages, bool& answer) {
    PageScan question{};
    question.mask = question.returned = page_of_file;
    answer = false;
    return scan(question, pages, [&](const PageRegion&) { answer = true; });
}

// Whether no file is behind these addresses, written or not; false too where nobody says (before
// Linux 6.11).
bool is_anonymous(Range pages) {
    MapQuery query{};
    query.size = sizeof query;
    query.flags = map_or_next | map_of_file;
    query.address = pages.begin;
    if (!open_here.maps.is_ours()) return false;
    if (ioctl(open_here.maps.number, map_query, &query) != 0) return errno == ENOENT;
    return query.begin >= pages.end;
}

// What a whole table of pages maps, where the first page is not in memory.
void lost_tables(Range pages, std::vector<Found>& found) {
    const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t size = page / sizeof(uint64_t) * page;
    for (uintptr_t at = (pages.begin + size - 1) / size * size; at + size <= pages.end;
         at += size) {
        uint64_t entry = 0;
        const auto place = static_cast<off_t>(at / page * sizeof entry);
        const bool read = pread(open_here.pagemap.number, &entry, sizeof entry, place) ==
                          static_cast<ssize_t>(sizeof entry);
        if (!read || !(entry >> 63)) found.push_back({{at, at + size}, true});
    }
}

// Two pages of our own: a write to the second must show, and nothing else.
const char* try_out() {
    const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    void* memory =
        mmap(nullptr, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return "no memory";
    auto* bytes = static_cast<volatile unsigned char*>(memory);
    bytes[0] = bytes[page] = 1;
    const auto begin = reinterpret_cast<uintptr_t>(memory);
    const Range pages{begin, begin + 2 * page};
    std::vector<Found> none, first, second;
    bool anonymous = false;
    bool works = track(pages, anonymous) && written(pages, anonymous, none);
    bytes[page] = 2;
    works = works && written(pages, anonymous, first) && written(pages, anonymous, second);
    works = works && none.empty() && second.empty() && first.size() == 1 &&
            first[0].pages.begin == begin + page && first[0].pages.end == pages.end;
    munmap(memory, 2 * page);
    return works ? nullptr : "the kernel does not report written pages (Linux 6.7 and newer do)";
}

constexpr const char* no_descriptor = "no file descriptor is free";

const char* open_all() {
    open_here.process = getpid();
    if (!open_here.uffd.open(
            static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | user_mode_only))))
        return errno == EMFILE || errno == ENFILE ? no_descriptor
               : errno == EPERM || errno == EACCES
                   ? "the system forbids the call userfaultfd (some containers do)"
                   : "the kernel has no userfaultfd for user memory (Linux 5.11 and newer do)";
    UffdApi api{version, feature_async | feature_unpopulated, 0};
    if (ioctl(open_here.uffd.number, uffd_api, &api) != 0)
        return "the kernel has no asynchronous write protection (Linux 6.7 and newer do)";
    if (!open_here.pagemap.open(open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC)))
        return errno == EMFILE || errno == ENFILE ? no_descriptor
                                                  : "/proc/self/pagemap does not open";
    open_here.maps.open(open("/proc/self/maps", O_RDONLY | O_CLOEXEC));  // or is_anonymous is false
    return try_out();
}

}  // namespace

Range whole_pages(Range range) {
    const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t begin = (range.begin + page - 1) / page * page, end = range.end / page * page;
    return begin < end ? Range{begin, end} : Range{range.begin, range.begin};
}

const char* why_unavailable() {
    // A process may be cloned without its fork handlers being run.
    if (opened && open_here.process != getpid()) close_all();
    if (opened && !unavailable && !(open_here.uffd.is_ours() && open_here.pagemap.is_ours()))
        close_all();
    if (!opened) {
        unavailable = open_all();
        if (unavailable) close_all();
        opened = unavailable != no_descriptor;  // there may be one the next time
    }
    return unavailable;
}

bool track(Range pages, bool& anonymous) {
    void* memory = reinterpret_cast<void*>(pages.begin);
    const size_t size = pages.end - pages.begin;
    // What is not in memory yet does not tell whether it is a file's.
    bool of_file = false;
    if (madvise(memory, size, populate_read) != 0 || !any_of_file(pages, of_file)) return false;
    // Others may write to the file: only a copy is this process's alone. Of shared memory there is
    // none, and it stays a file's.
    if (of_file && (madvise(memory, size, populate_write) != 0 || !any_of_file(pages, of_file)))
        return false;
    if (of_file) return false;
    UffdRegister registration{kernel_range(pages), mode_write_protect, 0};
    if (ioctl(open_here.uffd.number, uffd_register, &registration) != 0) return false;
    UffdWriteProtect order{kernel_range(pages), protect};
    if (ioctl(open_here.uffd.number, uffd_write_protect, &order) == 0) {
        anonymous = is_anonymous(pages);  // and stays so: other mappings would not be tracked
        return true;
    }
    untrack(pages);
    return false;
}

void untrack(Range pages) {
    UffdRange range = kernel_range(pages);
    ioctl(open_here.uffd.number, uffd_unregister, &range);
}

bool written(Range pages, bool anonymous, std::vector<Found>& found) {
    PageScan question{};
    question.flags = scan_protects | scan_needs_tracking;
    if (anonymous) {
        // The kernel takes 0.6 ns a page for this one question, and 27 ns for the other (Zen 5). A
        // page that was taken away counts as written, and one that was swapped out is what it was.
        // Of a whole table of pages that is gone not every kernel says something.
        lost_tables(pages, found);
        question.mask = question.returned = page_written;
        return scan(question, pages, [&](const PageRegion& region) {
            found.push_back(
                {{static_cast<uintptr_t>(region.start), static_cast<uintptr_t>(region.end)},
                 false});
        });
    }
    question.inverted = page_present;
    question.any_of = question.returned = page_written | page_present | page_of_file;
    return scan(question, pages, [&](const PageRegion& region) {
        const Range seen{static_cast<uintptr_t>(region.start), static_cast<uintptr_t>(region.end)};
        found.push_back(
            {seen, (region.categories & (page_present | page_of_file)) != page_present});
    });
}

void restart_after_fork() { close_all(); }

}  // namespace variator::write_tracking

#else

namespace variator::write_tracking {

Range whole_pages(Range range) { return {range.begin, range.begin}; }
const char* why_unavailable() { return "only Linux reports written pages"; }
bool track(Range, bool&) { return false; }
void untrack(Range) {}
bool written(Range, bool, std::vector<Found>&) { return false; }
void restart_after_fork() {}

}  // namespace variator::write_tracking

#endif
