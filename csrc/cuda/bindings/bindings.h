// Shared by the bindings: addresses to pointers, errors to exceptions, the device of a call.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "launchers.h"

#if !defined(VARIATOR_EMULATION)
#include <cuda_runtime_api.h>
#endif

namespace variator::cuda {

using Address = uintptr_t;

// An address that converts to whatever pointer a params struct holds.
struct Pointer {
    Address address;
    template <class T>
    operator T*() const {
        return reinterpret_cast<T*>(address);
    }
};

inline Pointer at(Address address) { return {address}; }

inline DType dtype_of(int dtype) { return static_cast<DType>(dtype); }

inline void check(cudaError_t error, const std::string& what) {
    if (error == cudaSuccess) return;
#if !defined(VARIATOR_EMULATION)
    cudaGetLastError();  // or the next launch, by anyone, would report it
#endif
    throw std::runtime_error(what + ": " + cudaGetErrorString(error));
}

// Makes a device current for the duration of a call.
class DeviceGuard {
  public:
#if defined(VARIATOR_EMULATION)
    explicit DeviceGuard(int) {}
#else
    explicit DeviceGuard(int device) {
        check(cudaGetDevice(&before_), "the current CUDA device");
        if (device == before_) return;
        check(cudaSetDevice(device), "CUDA device " + std::to_string(device));
        changed_ = true;
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(before_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int before_ = 0;
    bool changed_ = false;
#endif
};

// The device and stream of a launch.
struct Target {
    int device;
    Address stream;
};

template <class Params>
void run(cudaError_t (*kernel)(const Params&, cudaStream_t), const char* name, const Params& p,
         const Target& target) {
    pybind11::gil_scoped_release quiet;
    DeviceGuard guard(target.device);
    check(kernel(p, at(target.stream)), std::string("CUDA kernel ") + name);
}

void bind_backward(pybind11::module_& m);
void bind_sublayer(pybind11::module_& m);

}  // namespace variator::cuda
