// The Python module: addresses, sizes and strides in, nothing else. The Python side checks shapes,
// dtypes and contiguity and owns all memory.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "dispatch.h"
#include "fork.h"
#include "layout.h"

namespace py = pybind11;
using namespace variator;

namespace {

using Address = uintptr_t;
template <class T = void>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

const Kernels& kernels_for(DType dtype) {
    const Kernels& active = active_kernels();
    return dtype == DType::f64 && !active.has_double ? double_kernels() : active;
}

Groups groups(Address start, Address length, Address mask, int64_t count, int64_t k) {
    return {pointer<const int64_t>(start), pointer<const int64_t>(length),
            pointer<const uint8_t>(mask), count, k};
}

Batch batch(int64_t rows, int64_t n, Address mask, Address offsets) {
    return {rows, n, pointer<const uint8_t>(mask), pointer<const int64_t>(offsets)};
}

using Quiet = py::call_guard<py::gil_scoped_release>;

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    watch_forks();
    m.def("available_isas", &available_isas);
    m.def("active_isa", [] { return std::string(active_kernels().name); });
    m.def("set_isa", &set_isa, py::arg("name"));
#ifdef _OPENMP
    m.attr("openmp") = true;
#else
    m.attr("openmp") = false;
#endif

    m.def(
        "list_groups",
        [](int64_t rows, int64_t n, Address mask, Address offsets, int64_t k, int64_t per_row,
           Address start, Address length) {
            return list_groups(batch(rows, n, mask, offsets), k, per_row, pointer<int64_t>(start),
                               pointer<int64_t>(length));
        },
        Quiet());
    m.def(
        "copy_padding",
        [](int64_t rows, int64_t n, Address mask, Address x, int64_t x_stride, Address y, int64_t d,
           int64_t element_size) {
            copy_padding(batch(rows, n, mask, 0), pointer(x), x_stride, pointer(y), d,
                         element_size);
        },
        Quiet());

    py::class_<PackParams>(m, "Pack")
        .def(py::init([](bool is_double, bool bf16, int64_t matrices, int64_t matrix_stride,
                         int64_t inner, int64_t inner_stride, int64_t columns,
                         int64_t column_stride) {
            return PackParams{is_double,    bf16,    matrices,      matrix_stride, inner,
                              inner_stride, columns, column_stride, nullptr,       nullptr};
        }))
        .def("bytes",
             [](const PackParams& p) {
                 return kernels_for(p.is_double ? DType::f64 : DType::f32).packed_bytes(p);
             })
        .def(
            "run",
            [](PackParams p, Address source, Address packed) {
                p.source = pointer(source);
                p.packed = pointer(packed);
                kernels_for(p.is_double ? DType::f64 : DType::f32).pack(p);
            },
            Quiet());

    m.attr("direct_scores") = direct_scores;
    m.def(
        "merge",
        [](int dtype, int threads, Address start, Address length, Address mask, int64_t count,
           int64_t k, int64_t d, int64_t r, Address x, int64_t x_stride, int norm,
           Address norm_weight, Address norm_bias, double eps, bool folded, Address merge_weight,
           Address merge_bias, Address projection_packed, Address merged, Address projected,
           Address weights, Address poison) {
            MergeParams p{};
            p.dtype = static_cast<DType>(dtype);
            p.threads = usable_threads(threads);
            p.groups = groups(start, length, mask, count, k);
            p.d = d, p.r = r;
            p.x = pointer(x), p.x_stride = x_stride;
            p.norm = static_cast<Norm>(norm);
            p.norm_weight = pointer(norm_weight), p.norm_bias = pointer(norm_bias), p.eps = eps;
            p.folded = folded;
            p.merge_weight = pointer(merge_weight), p.merge_bias = pointer(merge_bias);
            p.projection_packed = pointer(projection_packed);
            p.merged = pointer(merged), p.projected = pointer(projected);
            p.weights = pointer(weights), p.poison = pointer(poison);
            kernels_for(p.dtype).merge(p);
        },
        Quiet());
    m.def(
        "merge_backward",
        [](int dtype, int threads, Address start, Address length, Address mask, int64_t count,
           int64_t k, int64_t d, int64_t r, Address x, int64_t x_stride, int norm,
           Address norm_weight, Address norm_bias, double eps, Address weights,
           Address merge_packed_rows, Address projection_packed_rows, Address d_merged,
           Address d_projected, Address dx, Address d_merge_weight, Address d_merge_bias,
           Address d_projection, Address d_norm_weight, Address d_norm_bias) {
            MergeBackwardParams p{};
            p.dtype = static_cast<DType>(dtype);
            p.threads = usable_threads(threads);
            p.groups = groups(start, length, mask, count, k);
            p.d = d, p.r = r;
            p.x = pointer(x), p.x_stride = x_stride;
            p.norm = static_cast<Norm>(norm);
            p.norm_weight = pointer(norm_weight), p.norm_bias = pointer(norm_bias), p.eps = eps;
            p.weights = pointer(weights);
            p.merge_packed_rows = pointer(merge_packed_rows);
            p.projection_packed_rows = pointer(projection_packed_rows);
            p.d_merged = pointer(d_merged), p.d_projected = pointer(d_projected);
            p.dx = pointer(dx);
            p.d_merge_weight = pointer(d_merge_weight), p.d_merge_bias = pointer(d_merge_bias);
            p.d_projection = pointer(d_projection);
            p.d_norm_weight = pointer(d_norm_weight), p.d_norm_bias = pointer(d_norm_bias);
            kernels_for(p.dtype).merge_backward(p);
        },
        Quiet());
    m.def(
        "decompress",
        [](int dtype, int threads, Address start, Address length, Address mask, int64_t count,
           int64_t k, int64_t d, int64_t r, int phi, Address u, Address projected,
           Address w1u_packed, Address b1, Address w2_packed, Address b2, Address poison,
           Address residual, int64_t residual_stride, Address y) {
            DecompressParams p{};
            p.dtype = static_cast<DType>(dtype);
            p.threads = usable_threads(threads);
            p.groups = groups(start, length, mask, count, k);
            p.d = d, p.r = r;
            p.phi = static_cast<Phi>(phi);
            p.u = pointer(u), p.projected = pointer(projected);
            p.w1u_packed = pointer(w1u_packed), p.b1 = pointer(b1);
            p.w2_packed = pointer(w2_packed), p.b2 = pointer(b2);
            p.poison = pointer(poison);
            p.residual = pointer(residual), p.residual_stride = residual_stride;
            p.y = pointer(y);
            kernels_for(p.dtype).decompress(p);
        },
        Quiet());
    m.def(
        "decompress_backward",
        [](int dtype, int threads, Address start, Address length, Address mask, int64_t count,
           int64_t k, int64_t d, int64_t r, int phi, Address u, Address projected,
           Address w1u_packed, Address b1, Address w2_packed_rows, Address w1u_packed_rows,
           Address dy, int64_t dy_stride, Address du, Address d_projected, Address d_w1u,
           Address d_b1, Address d_w2, Address d_b2) {
            DecompressBackwardParams p{};
            p.dtype = static_cast<DType>(dtype);
            p.threads = usable_threads(threads);
            p.groups = groups(start, length, mask, count, k);
            p.d = d, p.r = r;
            p.phi = static_cast<Phi>(phi);
            p.u = pointer(u), p.projected = pointer(projected);
            p.w1u_packed = pointer(w1u_packed), p.b1 = pointer(b1);
            p.w2_packed_rows = pointer(w2_packed_rows);
            p.w1u_packed_rows = pointer(w1u_packed_rows);
            p.dy = pointer(dy), p.dy_stride = dy_stride;
            p.du = pointer(du), p.d_projected = pointer(d_projected);
            p.d_w1u = pointer(d_w1u), p.d_b1 = pointer(d_b1);
            p.d_w2 = pointer(d_w2), p.d_b2 = pointer(d_b2);
            kernels_for(p.dtype).decompress_backward(p);
        },
        Quiet());
    // Small weights whole, of large ones a sample, so that a write that bypasses version counting
    // is noticed.
    m.def("fingerprint", [](const std::vector<std::pair<Address, int64_t>>& weights) {
        constexpr int64_t whole = 16384, samples = 64;
        uint64_t hash = 1469598103934665603ull;
        auto mix = [&](const unsigned char* p, int64_t bytes) {
            uint64_t word = 0;
            __builtin_memcpy(&word, p, static_cast<size_t>(bytes));
            hash = (hash ^ word) * 1099511628211ull;
            hash ^= hash >> 29;
        };
        for (const auto& [data, bytes] : weights) {
            const auto* p = pointer<const unsigned char>(data);
            const int64_t words = bytes / 8;
            if (bytes <= whole)
                for (int64_t i = 0; i < words; ++i) mix(p + 8 * i, 8);
            else
                for (int64_t i = 0; i < samples; ++i)
                    mix(p + (words - 1) * i / (samples - 1) * 8, 8);
            if (bytes % 8) mix(p + 8 * words, bytes % 8);
        }
        return hash;
    });
}
