#define VARIATOR_ISA avx512
#include "simd_avx512.h"
//
#include "isa.h"

namespace variator {
Kernels avx512_kernels() { return avx512::table("avx512"); }
}  // namespace variator
