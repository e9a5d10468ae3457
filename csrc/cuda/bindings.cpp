// The Python module: addresses, sizes and strides in, by name. The Python side checks shapes,
// dtypes and contiguity and owns all memory; every launch goes to the device and stream it names.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "kernels.h"
#include "plan.h"

namespace py = pybind11;
using namespace py::literals;
using namespace variator::cuda;

namespace {

using Address = uintptr_t;

// An address that converts to whatever pointer a params struct holds.
struct Pointer {
    Address address;
    template <class T>
    operator T*() const {
        return reinterpret_cast<T*>(address);
    }
};

Pointer at(Address address) { return {address}; }

void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string("CUDA kernel ") + what + ": " +
                                 cudaGetErrorString(error));
}

// The device of a call, for its time.
class DeviceGuard {
  public:
#if defined(VARIATOR_EMULATION)
    explicit DeviceGuard(int) {}
#else
    explicit DeviceGuard(int device) {
        check(cudaGetDevice(&before_), "device");
        if (device != before_) check(cudaSetDevice(device), "device");
        changed_ = device != before_;
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(before_);
    }

  private:
    int before_ = 0;
    bool changed_ = false;
#endif
};

struct Target {
    int device;
    Address stream;
};

template <class Params>
void run(cudaError_t (*kernel)(const Params&, cudaStream_t), const char* name, const Params& p,
         const Target& target) {
    py::gil_scoped_release quiet;
    DeviceGuard guard(target.device);
    check(kernel(p, at(target.stream)), name);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
#if defined(VARIATOR_EMULATION)
    m.attr("emulated") = true;
#else
    m.attr("emulated") = false;
    m.attr("architectures") = VARIATOR_CUDA_ARCHITECTURES;
    m.def("driver_version", [] {
        int version = 0;
        return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
    });
    m.def("runtime_version", [] {
        int version = 0;
        return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
    });
#endif
    m.attr("max_ratio") = max_ratio;
    m.attr("max_bottleneck") = max_bottleneck;

    py::class_<Target>(m, "Target").def(py::init([](int device, Address stream) {
        return Target{device, stream};
    }));
    py::class_<Groups>(m, "Groups")
        .def(py::init([](Address start, Address length, Address mask, int64_t count, int64_t k,
                         int64_t row_tokens, int64_t row_groups) {
                 return Groups{at(start), at(length), at(mask), count, k, row_tokens, row_groups};
             }),
             py::kw_only(), "start"_a, "length"_a, "mask"_a, "count"_a, "k"_a, "row_tokens"_a,
             "row_groups"_a);
    py::class_<NormParams>(m, "Norm").def(
        py::init([](int kind, Address weight, Address bias, float eps) {
            return NormParams{static_cast<Norm>(kind), at(weight), at(bias), eps};
        }));

    py::class_<MergeParams>(m, "Merge")
        .def(py::init([](int dtype, const Groups& groups, int64_t d, int64_t r, Address x,
                         int64_t x_stride, const NormParams& norm, Address merge_weight,
                         Address merge_bias, Address projection, int64_t projection_stride,
                         int64_t projected_columns, Address merged, Address projected,
                         Address weights) {
                 return MergeParams{static_cast<DType>(dtype),
                                    groups,
                                    d,
                                    r,
                                    at(x),
                                    x_stride,
                                    norm,
                                    at(merge_weight),
                                    at(merge_bias),
                                    at(projection),
                                    projection_stride,
                                    projected_columns,
                                    at(merged),
                                    at(projected),
                                    at(weights)};
             }),
             py::kw_only(), "dtype"_a, "groups"_a, "d"_a, "r"_a, "x"_a, "x_stride"_a, "norm"_a,
             "merge_weight"_a, "merge_bias"_a, "projection"_a, "projection_stride"_a,
             "projected_columns"_a, "merged"_a, "projected"_a, "weights"_a);
    m.def("merge",
          [](const MergeParams& p, const Target& target) { run(merge, "merge", p, target); });

    py::class_<DecompressParams>(m, "Decompress")
        .def(py::init([](int dtype, const Groups& groups, int64_t d, int64_t r, int phi, Address u,
                         Address projected, int64_t projected_columns, Address w1u,
                         int64_t w1u_stride, Address b1, Address w2, Address b2, Address residual,
                         int64_t residual_stride, Address y) {
                 return DecompressParams{static_cast<DType>(dtype),
                                         groups,
                                         d,
                                         r,
                                         static_cast<Phi>(phi),
                                         at(u),
                                         at(projected),
                                         projected_columns,
                                         at(w1u),
                                         w1u_stride,
                                         at(b1),
                                         at(w2),
                                         at(b2),
                                         at(residual),
                                         residual_stride,
                                         at(y)};
             }),
             py::kw_only(), "dtype"_a, "groups"_a, "d"_a, "r"_a, "phi"_a, "u"_a, "projected"_a,
             "projected_columns"_a, "w1u"_a, "w1u_stride"_a, "b1"_a, "w2"_a, "b2"_a, "residual"_a,
             "residual_stride"_a, "y"_a);
    m.def("decompress", [](const DecompressParams& p, const Target& target) {
        run(decompress, "decompress", p, target);
    });

    m.def(
        "copy_absent",
        [](const Target& target, int64_t tokens, int64_t d, Address mask, Address offsets,
           int64_t last, Address x, int64_t x_stride, Address y) {
            run(copy_absent, "copy_absent",
                CopyAbsentParams{tokens, d, at(mask), at(offsets), last, at(x), x_stride, at(y)},
                target);
        },
        py::arg("target"), py::kw_only(), "tokens"_a, "d"_a, "mask"_a, "offsets"_a, "last"_a, "x"_a,
        "x_stride"_a, "y"_a);
}
