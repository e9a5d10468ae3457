// Which instruction set runs: chosen once from what the processor has, or forced.
#pragma once

#include <string>
#include <vector>

#include "params.h"

namespace variator {

// Those built in that this processor can run, slowest first.
std::vector<std::string> available_isas();

// The one in use; the fastest available unless set_isa chose another.
const Kernels& active_kernels();

// The portable kernels, which alone know double.
const Kernels& double_kernels();

// Throws std::invalid_argument for a name that is not available.
void set_isa(const std::string& name);

}  // namespace variator
