#define VARIATOR_ISA avx2
#include "simd_avx2.h"
//
#include "isa.h"

namespace variator {
Kernels avx2_kernels() { return avx2::table("avx2"); }
}  // namespace variator
