#define VARIATOR_ISA amx
#define VARIATOR_TILES 1
#include "simd_avx512.h"
//
#include "isa.h"

namespace variator {

Kernels avx512_kernels();

// Forward passes have products in tiles, of bf16 and of int8; nothing else differs.
Kernels amx_kernels() {
    Kernels kernels = avx512_kernels();
    kernels.name = "amx";
    kernels.merge = amx::merge_any;
    kernels.decompress = amx::decompress_any;
    kernels.attention = amx::attention_any;
    kernels.packed_bytes = amx::packed_bytes;
    kernels.pack = amx::pack;
    kernels.int8_packed_bytes = amx::int8_packed_bytes;
    kernels.int8_pack = amx::int8_pack;
    kernels.int8_linear = amx::int8_linear;
    kernels.int8_weight_levels = amx::IntVec::weight_levels;
    kernels.rows_linear = amx::rows_linear_any;
    return kernels;
}

}  // namespace variator
