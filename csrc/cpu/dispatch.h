// Which instruction set runs: chosen once from what the processor has, or forced.
#pragma once

#include <string>
#include <vector>

#include "params.h"

namespace variator {

// Those built in that this processor can run, slowest first.
std::vector<std::string> available_isas();

// The one in use; the fastest available unless set_isa chose another. Another thread may change it
// at any time and panels have the layout of one set, so kernels do not go by it: an op asks once
// and hands the name to whatever packs and runs.
const char* active_isa();

// Throws std::invalid_argument for a name that is not available.
void set_isa(const std::string& isa);

// The kernels of an instruction set; for double the portable ones, which alone know it.
// Throws as set_isa.
const Kernels& find_kernels(const std::string& isa, DType dtype);

}  // namespace variator
