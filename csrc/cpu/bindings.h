// What the files of the Python module share.
#pragma once

#include <pybind11/pybind11.h>

#include "sublayer.h"

namespace variator {

using Address = uintptr_t;
template <class T = void>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

using Quiet = pybind11::call_guard<pybind11::gil_scoped_release>;

// Products and whole sublayers.
void bind_sublayers(pybind11::module_& m);

}  // namespace variator
