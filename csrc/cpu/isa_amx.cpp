#define VARIATOR_ISA amx
#define VARIATOR_TILES 1
#include "simd_avx512.h"
//
#include "attention.h"
#include "by_dtype.h"

namespace variator {
namespace amx {
VARIATOR_BY_DTYPE(attention, AttentionParams)
}  // namespace amx

Kernels avx512_kernels();
// Attention's forward pass alone has products in tiles.
Kernels amx_kernels() {
    Kernels kernels = avx512_kernels();
    kernels.name = "amx";
    kernels.attention = amx::attention_any;
    return kernels;
}
}  // namespace variator
