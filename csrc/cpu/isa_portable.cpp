#define VARIATOR_ISA portable
#include "simd_portable.h"
//
#include "isa.h"

namespace variator {
Kernels portable_kernels() { return portable::table("portable"); }
}  // namespace variator
