// The threads of a grid as fibers of one CPU thread, each of which runs until it waits for others.
// They run in the order of their numbers, or backwards with VARIATOR_EMULATION_ORDER=reverse: a
// missing barrier gives a wrong result in one of the two.
#undef _FORTIFY_SOURCE  // its longjmp refuses to switch stacks
#include <ucontext.h>

#include <csetjmp>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "device.cuh"

namespace variator::cuda {
namespace {

constexpr size_t stack_bytes = 64 * 1024;

// A barrier of threads that wait for each other: a warp, a block or a grid.
struct Meeting {
    int members = 0, arrived = 0;
    uint64_t round = 0;
};

struct Warp {
    Meeting meeting;
    std::vector<char> given, seen;
};

struct Block {
    int64_t x, y, z;
    Meeting meeting;
    std::vector<Warp> warps;
    std::vector<char> shared;
};

// What a thread copies in the background; `group` counts its commits.
struct Copy {
    void* to;
    const void* from;  // null: zeros
    size_t bytes;
    uint64_t group;
};

struct Fiber {
    Block* block;
    int thread;
    ucontext_t start;
    jmp_buf at;
    bool started = false, done = false;
    const Meeting* waits = nullptr;  // until its round is past `round`
    uint64_t round = 0;
    std::deque<Copy> copies;
    uint64_t committed = 0;
    std::unique_ptr<char[]> stack;
};

jmp_buf scheduler;
Fiber* current = nullptr;
Grid grid_size;
Meeting whole_grid;
const std::function<void()>* kernel_body = nullptr;

void meet(Meeting& meeting) {
    if (++meeting.arrived == meeting.members) {
        meeting.arrived = 0;
        ++meeting.round;
        return;
    }
    current->waits = &meeting;
    current->round = meeting.round;
    if (_setjmp(current->at) == 0) _longjmp(scheduler, 1);
}

void run_fiber() {
    (*kernel_body)();
    current->done = true;
    _longjmp(scheduler, 1);
}

void resume(Fiber& fiber) {
    current = &fiber;
    fiber.waits = nullptr;
    if (_setjmp(scheduler) != 0) return;
    if (fiber.started) _longjmp(fiber.at, 1);
    fiber.started = true;
    getcontext(&fiber.start);
    fiber.stack = std::make_unique<char[]>(stack_bytes);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = stack_bytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, run_fiber, 0);
    setcontext(&fiber.start);
}

void run_blocks(std::vector<std::unique_ptr<Block>>& blocks, int threads) {
    const char* value = std::getenv("VARIATOR_EMULATION_ORDER");
    const std::string order = value != nullptr ? value : "";
    if (order != "" && order != "forward" && order != "reverse")
        throw std::invalid_argument(
            "VARIATOR_EMULATION_ORDER must be one of forward, reverse, got " + order);
    const bool reverse = order == "reverse";
    std::vector<Fiber> fibers(blocks.size() * threads);
    for (size_t i = 0; i < fibers.size(); ++i) {
        const size_t number = reverse ? fibers.size() - 1 - i : i;
        fibers[i].block = blocks[number / threads].get();
        fibers[i].thread = static_cast<int>(number % threads);
    }
    size_t left = fibers.size();
    while (left > 0) {
        bool moved = false;
        for (Fiber& fiber : fibers) {
            if (fiber.done || (fiber.waits != nullptr && fiber.waits->round <= fiber.round))
                continue;
            moved = true;
            resume(fiber);
            if (fiber.done) {
                --left;
                fiber.stack.reset();
            }
        }
        if (!moved) throw std::runtime_error("emulation: threads wait for others that have ended");
    }
}

}  // namespace

Launches launched;

cudaError_t run_grid(Grid grid, int threads, size_t shared, bool cooperative,
                     const std::function<void()>& body) {
    if (!launched.next()) return cudaSuccess;
    kernel_body = &body;
    grid_size = grid;
    std::vector<std::unique_ptr<Block>> blocks;
    for (int64_t i = 0; i < grid.x * grid.y * grid.z; ++i) {
        auto block = std::make_unique<Block>();
        block->x = i % grid.x, block->y = i / grid.x % grid.y, block->z = i / grid.x / grid.y;
        block->meeting.members = threads;
        block->warps.resize(threads / 32);
        for (Warp& warp : block->warps) warp.meeting.members = 32;
        block->shared.assign(shared,
                             static_cast<char>(0xff));  // NaN, like torch.empty in the tests
        blocks.push_back(std::move(block));
        if (cooperative) continue;
        run_blocks(blocks, threads);
        blocks.clear();
    }
    whole_grid = {static_cast<int>(blocks.size()) * threads, 0, 0};
    if (cooperative) run_blocks(blocks, threads);
    return cudaSuccess;
}

int thread_index() { return current->thread; }
int64_t block_x() { return current->block->x; }
int64_t block_y() { return current->block->y; }
int64_t block_z() { return current->block->z; }
int64_t grid_x() { return grid_size.x; }
char* shared_memory() { return current->block->shared.data(); }
void block_sync() { meet(current->block->meeting); }
void grid_sync() { meet(whole_grid); }

void copy_later(void* to, const void* from, size_t bytes) {
    current->copies.push_back({to, from, bytes, current->committed});
}
void copies_commit() { ++current->committed; }
void wait_for_copies(size_t groups) {
    std::deque<Copy>& copies = current->copies;
    while (!copies.empty() && copies.front().group + groups < current->committed) {
        const Copy& copy = copies.front();
        if (copy.from != nullptr)
            std::memcpy(copy.to, copy.from, copy.bytes);
        else
            std::memset(copy.to, 0, copy.bytes);
        copies.pop_front();
    }
}

const char* exchange(const void* mine, size_t bytes) {
    Warp& warp = current->block->warps[current->thread / 32];
    if (warp.given.size() < 32 * bytes) warp.given.resize(32 * bytes);
    std::memcpy(warp.given.data() + current->thread % 32 * bytes, mine, bytes);
    const bool last = warp.meeting.arrived == warp.meeting.members - 1;
    if (last) warp.seen = warp.given;  // a lane may give its next value before others have read
    meet(warp.meeting);
    return warp.seen.data();
}

}  // namespace variator::cuda
