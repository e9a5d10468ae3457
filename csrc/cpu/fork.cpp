#include "fork.h"

#include <pthread.h>

#include <atomic>

namespace variator {
namespace {
std::atomic<bool> in_child{false};
}

void watch_forks() {
    pthread_atfork(nullptr, nullptr, [] { in_child.store(true); });
}

int usable_threads(int wanted) { return in_child.load() || wanted < 1 ? 1 : wanted; }

}  // namespace variator
