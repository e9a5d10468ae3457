#define VARIATOR_ISA avx512_bf16
#include "simd_avx512.h"
//
#include "isa.h"

namespace variator {
Kernels avx512_bf16_kernels() { return avx512_bf16::table("avx512_bf16"); }
}  // namespace variator
