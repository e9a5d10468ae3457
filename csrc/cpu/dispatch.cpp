#include "dispatch.h"

#ifdef VARIATOR_HAVE_AVX2
#include <cpuid.h>
#endif
#ifdef VARIATOR_HAVE_AMX
#include <sys/syscall.h>
#include <unistd.h>
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
#ifdef VARIATOR_HAVE_AVX512_VNNI
Kernels avx512_vnni_kernels();
#endif
#ifdef VARIATOR_HAVE_AVX512_BF16
Kernels avx512_bf16_kernels();
#endif
#ifdef VARIATOR_HAVE_AMX
Kernels amx_kernels();
#endif

namespace {

#ifdef VARIATOR_HAVE_AVX2
// By hand: older compilers do not know the name in __builtin_cpu_supports.
bool has_f16c() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & (1u << 29)) != 0;
}
#endif

#ifdef VARIATOR_HAVE_AMX
// Tiles with products of bf16 and of int8, and the system's permission to use them, which a process
// asks for once. It is refused where a thread's signal stack is too small for them.
bool may_use_tiles() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (__get_cpuid(1, &a, &b, &c, &d) == 0 || (c & (1u << 27)) == 0) return false;
    unsigned states = 0;
    asm("xgetbv" : "=a"(states), "=d"(d) : "c"(0));
    if ((states >> 17 & 3) != 3) return false;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
    constexpr unsigned wanted = 1u << 22 | 1u << 24 | 1u << 25;  // bf16, tiles, int8
    if ((d & wanted) != wanted) return false;
    constexpr int request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
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
#ifdef VARIATOR_HAVE_AVX512_VNNI
        const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
#endif
#ifdef VARIATOR_HAVE_AVX512_BF16
        // Intel's instruction for pairs has half the throughput of the two for fp32 products.
        const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
        const bool slow = __builtin_cpu_is("intel") != 0;
        if (bf16 && slow) found.push_back(avx512_bf16_kernels());
#endif
        if (avx512) found.push_back(avx512_kernels());
#ifdef VARIATOR_HAVE_AVX512_VNNI
        if (vnni) found.push_back(avx512_vnni_kernels());
#endif
#ifdef VARIATOR_HAVE_AVX512_BF16
        if (bf16 && !slow) found.push_back(avx512_bf16_kernels());
#ifdef VARIATOR_HAVE_AMX
        if (bf16 && may_use_tiles()) found.push_back(amx_kernels());
#endif
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
