#include "dispatch.h"

#ifdef VARIATOR_HAVE_AVX2
#include <cpuid.h>
#endif

#include <atomic>
#include <stdexcept>

namespace variator {

Kernels portable_kernels();
#ifdef VARIATOR_HAVE_AVX2
Kernels avx2_kernels();
#endif
#ifdef VARIATOR_HAVE_AVX512
Kernels avx512_kernels();
#endif
#ifdef VARIATOR_HAVE_AVX512_BF16
Kernels avx512_bf16_kernels();
#endif

namespace {

#ifdef VARIATOR_HAVE_AVX2
// By hand: older compilers do not know the name in __builtin_cpu_supports.
bool has_f16c() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & (1u << 29)) != 0;
}
#endif

const std::vector<Kernels>& available() {
    static const std::vector<Kernels> tables = [] {
        std::vector<Kernels> found{portable_kernels()};
#if defined(__x86_64__)
        __builtin_cpu_init();
#endif
#ifdef VARIATOR_HAVE_AVX2
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c())
            found.push_back(avx2_kernels());
#endif
#ifdef VARIATOR_HAVE_AVX512
        const bool avx512 =
            __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        if (avx512) found.push_back(avx512_kernels());
#ifdef VARIATOR_HAVE_AVX512_BF16
        if (avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(avx512_bf16_kernels());
#endif
#endif
        return found;
    }();
    return tables;
}

// The name of the set in use, or null for the fastest.
std::atomic<const char*> chosen{nullptr};

}  // namespace

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Kernels& kernels : available()) names.emplace_back(kernels.name);
    return names;
}

const char* active_isa() {
    const char* name = chosen.load(std::memory_order_relaxed);
    return name ? name : available().back().name;
}

const Kernels& find_kernels(const std::string& isa, DType dtype) {
    std::string known;
    for (const Kernels& kernels : available()) {
        if (isa == kernels.name)
            return dtype == DType::float64 && !kernels.has_double ? available().front() : kernels;
        known += (known.empty() ? "" : ", ") + std::string(kernels.name);
    }
    throw std::invalid_argument("instruction set must be one of " + known + ", got " + isa);
}

void set_isa(const std::string& isa) { chosen.store(find_kernels(isa, DType::float32).name); }

}  // namespace variator
