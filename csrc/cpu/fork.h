// OpenMP after fork().
#pragma once

namespace variator {

// From now on a forked child runs on one thread: the runtime's worker threads do not exist there,
// and waiting for them would hang. Safe to call once.
void watch_forks();

// The threads a kernel may use when the caller asks for `wanted`.
int usable_threads(int wanted);

}  // namespace variator
