#define VARIATOR_ISA avx512_vnni
#include "simd_avx512.h"
//
#include "dispatch.h"
#include "int8_linear.h"

namespace variator {

Kernels avx512_kernels();

// Beside products in int8 there is nothing that these instructions change.
Kernels avx512_vnni_kernels() {
    Kernels kernels = avx512_kernels();
    kernels.name = "avx512_vnni";
    kernels.int8_packed_bytes = avx512_vnni::int8_packed_bytes;
    kernels.int8_pack = avx512_vnni::int8_pack;
    kernels.int8_linear = avx512_vnni::int8_linear;
    kernels.int8_weight_levels = avx512_vnni::IntVec::weight_levels;
    return kernels;
}

}  // namespace variator
