// The Python module: functions of addresses, sizes and strides, passed by name. The Python side
// owns all memory and checks shapes, dtypes and contiguity; it names the device and stream of a
// launch.
#include "bindings/bindings.h"

#include <pybind11/stl.h>

#include <map>

#include "device_properties.h"
#include "heuristics.h"

namespace py = pybind11;
using namespace py::literals;
using namespace variator::cuda;

namespace {

void bind_merge(py::module_& m) {
    py::class_<MergeParams>(m, "Merge", py::module_local())
        .def(py::init([](int dtype, const Groups& groups, int64_t d, int64_t r, Address x,
                         int64_t x_stride, const NormParams& norm, Address merge_weight,
                         const Vector& merge_bias, Address projection, int64_t projection_stride,
                         int64_t projected_columns, Address merged, Address projected,
                         Address weights) {
                 MergeParams p{};
                 p.dtype = dtype_of(dtype), p.groups = groups, p.d = d;
                 p.r = projected != 0 ? r : 0;
                 p.x = at(x), p.x_stride = x_stride, p.norm = norm;
                 p.merge_weight = at(merge_weight), p.merge_bias = merge_bias;
                 p.projection = at(projection), p.projection_stride = projection_stride;
                 p.projected_columns = projected_columns;
                 p.merged = at(merged), p.projected = at(projected), p.weights = at(weights);
                 return p;
             }),
             py::kw_only(), "dtype"_a, "groups"_a, "d"_a, "r"_a, "x"_a, "x_stride"_a, "norm"_a,
             "merge_weight"_a, "merge_bias"_a, "projection"_a, "projection_stride"_a,
             "projected_columns"_a, "merged"_a, "projected"_a, "weights"_a)
        .def("run", [](const MergeParams& p, const Target& to) { run(merge, "merge", p, to); });
}

void bind_decompress(py::module_& m) {
    py::class_<DecompressParams>(m, "Decompress", py::module_local())
        .def(py::init([](int dtype, const Groups& groups, int64_t d, int64_t r, int phi, Address u,
                         Address projected, int64_t projected_columns, Address w1u,
                         int64_t w1u_stride, const Vector& b1, Address w2, const Vector& b2,
                         Address residual, int64_t residual_stride, Address y) {
                 DecompressParams p{};
                 p.dtype = dtype_of(dtype), p.groups = groups, p.d = d, p.r = r;
                 p.phi = static_cast<Phi>(phi), p.u = at(u), p.projected = at(projected);
                 p.projected_columns = projected_columns;
                 p.w1u = at(w1u), p.w1u_stride = w1u_stride, p.b1 = b1;
                 p.w2 = at(w2), p.b2 = b2;
                 p.residual = at(residual), p.residual_stride = residual_stride, p.y = at(y);
                 return p;
             }),
             py::kw_only(), "dtype"_a, "groups"_a, "d"_a, "r"_a, "phi"_a, "u"_a, "projected"_a,
             "projected_columns"_a, "w1u"_a, "w1u_stride"_a, "b1"_a, "w2"_a, "b2"_a, "residual"_a,
             "residual_stride"_a, "y"_a)
        .def("run", [](const DecompressParams& p, const Target& to) {
            run(decompress, "decompress", p, to);
        });
}

void bind_gemm(py::module_& m) {
    m.def(
        "gemm",
        [](const Target& to, int dtype, int64_t rows, int64_t columns, int64_t inner, Address a,
           Address weight, Address bias, int activation, Address factor, Address out) {
            const GemmParams p{
                dtype_of(dtype), rows,       columns,  inner,
                at(a),           at(weight), at(bias), static_cast<Activation>(activation),
                at(factor),      at(out)};
            run(gemm, "gemm", p, to);
        },
        py::arg("target"), py::kw_only(), "dtype"_a, "rows"_a, "columns"_a, "inner"_a, "a"_a,
        "weight"_a, "bias"_a, "activation"_a, "factor"_a, "out"_a);
}

// Sizes that callers allocate by, and choices that tests check.
void bind_heuristics(py::module_& m) {
#if !defined(VARIATOR_EMULATION)
    m.def("shared_bytes", &shared_bytes);
#endif
    m.def("multiprocessors", [](int device) {
        DeviceGuard guard(device);
        int count = 0;
        check(count_multiprocessors(count), "multiprocessors");
        return count;
    });
    m.def("tiles", &heuristics::tiles);
    m.def("resident_blocks", &heuristics::resident_blocks);
    m.def("blocks_a_part", &heuristics::blocks_a_part);
    m.def("splits", &heuristics::splits);
    m.def("one_launch_blocks", &heuristics::one_launch_blocks);
    m.attr("gradient_columns") = heuristics::gradient_columns;
    m.def("gradient_pieces", &heuristics::gradient_pieces);
    m.def("gradient_tiles_a_piece", &heuristics::gradient_tiles_a_piece);
    m.def("gradient_shares", &heuristics::gradient_shares);
    m.def("gemm_tile", [](int64_t rows, int64_t columns, int64_t multiprocessors) {
        const auto tile =
            heuristics::gemm_tiles[heuristics::gemm_tile(rows, columns, multiprocessors)];
        return std::make_pair(tile.rows, tile.columns);
    });
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
#if defined(VARIATOR_EMULATION)
    m.attr("emulated") = true;
    m.def("stub_launches", [](bool stubbed) { launched.run = !stubbed; });
    m.def("launched", [] { return launched.count; });
#else
    m.attr("emulated") = false;
    m.attr("architectures") = VARIATOR_CUDA_ARCHITECTURES;
    // Nothing here calls the runtime: cudaDriverGetVersion, for one, initialises CUDA.
    m.attr("runtime_version") = CUDART_VERSION;
#endif
    using Values = std::map<std::string, int>;
    m.attr("dtypes") = Values{VARIATOR_DTYPES(VARIATOR_ENUM_ENTRY)};
    m.attr("norms") = Values{VARIATOR_NORMS(VARIATOR_ENUM_ENTRY)};
    m.attr("adapter_activations") = Values{VARIATOR_ADAPTER_ACTIVATIONS(VARIATOR_ENUM_ENTRY)};
    m.attr("ffn_activations") = Values{VARIATOR_FFN_ACTIVATIONS(VARIATOR_ENUM_ENTRY)};
    m.attr("max_ratio") = max_ratio;
    m.attr("max_bottleneck") = max_bottleneck;

    py::class_<Target>(m, "Target", py::module_local())
        .def(py::init([](int device, Address stream) { return Target{device, stream}; }));
    py::class_<Groups>(m, "Groups", py::module_local())
        .def(py::init([](Address start, Address span, Address owned, Address mask, Address kept,
                         int64_t n, int64_t per_row, int64_t count, int64_t launched, int64_t k) {
                 return Groups{at(start), at(span), at(owned), at(mask), at(kept),
                               n,         per_row,  count,     launched, k};
             }),
             py::kw_only(), "start"_a, "span"_a, "owned"_a, "mask"_a, "kept"_a, "n"_a, "per_row"_a,
             "count"_a, "launched"_a, "k"_a);
    py::class_<Vector>(m, "Vector", py::module_local()).def(py::init([](Address data, bool wide) {
        return Vector{at(data), wide};
    }));
    py::class_<NormParams>(m, "Norm", py::module_local())
        .def(py::init([](int kind, const Vector& weight, const Vector& bias, float eps) {
            return NormParams{static_cast<Norm>(kind), weight, bias, eps};
        }));
    bind_merge(m);
    bind_decompress(m);
    bind_backward(m);
    bind_gemm(m);
    bind_sublayer(m);
    bind_heuristics(m);
}
