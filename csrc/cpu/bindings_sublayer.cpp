// Products and whole sublayers, for Python: objects of what is known before a call.
#include <pybind11/stl.h>

#include <array>

#include "bindings.h"
#include "fork.h"

namespace py = pybind11;

namespace variator {
namespace {

using OptionalLinear = std::optional<Linear>;

// What a merge knows before a call.
MergeParams merge_params(int dtype, int64_t k, int64_t d, int64_t r, const NormParams& norm,
                         Address weight, Address bias, Address projection) {
    MergeParams p{};
    p.dtype = static_cast<DType>(dtype);
    p.groups.k = k, p.d = d, p.r = r;
    p.norm = norm.kind, p.norm_weight = norm.weight, p.norm_bias = norm.bias;
    p.eps = norm.eps, p.folded = norm.folded;
    p.merge_weight = pointer(weight), p.merge_bias = pointer(bias);
    p.projection_packed = pointer(projection);
    return p;
}

void check_ratio(const MergeParams& merge, const Groups& groups) {
    if (merge.groups.k != groups.k)
        throw std::invalid_argument("groups of another ratio than the merge's");
}

}  // namespace

void bind_sublayers(py::module_& m) {
    py::class_<Linear>(m, "Linear")
        .def(py::init([](const std::string& isa, int64_t inner, int64_t columns, Address packed,
                         Address bias, Address sums, Address scales) {
                 return Linear{&find_kernels(isa, DType::float32),
                               inner,
                               columns,
                               pointer(packed),
                               pointer<const float>(bias),
                               pointer<const int32_t>(sums),
                               pointer<const float>(scales)};
             }),
             py::kw_only(), py::arg("isa"), py::arg("inner"), py::arg("columns"), py::arg("packed"),
             py::arg("bias"), py::arg("sums") = 0, py::arg("scales") = 0)
        .def_property_readonly("isa", [](const Linear& linear) { return linear.kernels->name; })
        .def(
            "run",
            [](const Linear& linear, int dtype, int threads, int64_t rows, Address x,
               int64_t x_stride, int activation, const NormParams& norm, Address other,
               Address residual, Address y) {
                multiply(
                    linear, {static_cast<DType>(dtype), usable_threads(threads)},
                    {rows, pointer(x), x_stride},
                    {static_cast<Activation>(activation), norm, pointer(other), pointer(residual)},
                    pointer(y));
            },
            py::kw_only(), py::arg("dtype"), py::arg("threads"), py::arg("rows"), py::arg("x"),
            py::arg("x_stride"), py::arg("activation"), py::arg("norm"), py::arg("other"),
            py::arg("residual"), py::arg("y"), Quiet());

    py::class_<FfnProducts>(m, "FfnProducts")
        .def(py::init([](const Linear& in, const Linear& out, const OptionalLinear& gate,
                         int activation) {
                 return FfnProducts{in, out, gate, static_cast<Activation>(activation)};
             }),
             py::kw_only(), py::arg("w_in"), py::arg("w_out"), py::arg("w_gate"),
             py::arg("activation"));

    py::class_<DenseFfn>(m, "DenseFfn")
        .def(py::init([](const std::string& isa, int dtype, const FfnProducts& products,
                         const NormParams& norm, const NormParams& behind, bool residual) {
                 const DType type = static_cast<DType>(dtype);
                 return DenseFfn{&find_kernels(isa, type), type, products, norm, behind, residual};
             }),
             py::kw_only(), py::arg("isa"), py::arg("dtype"), py::arg("products"), py::arg("norm"),
             py::arg("behind"), py::arg("residual"))
        .def(
            "run",
            [](const DenseFfn& ffn, int threads, int64_t rows, Address x, int64_t x_stride,
               Address y) {
                ffn.run({rows, pointer(x), x_stride}, pointer(y), usable_threads(threads));
            },
            py::kw_only(), py::arg("threads"), py::arg("rows"), py::arg("x"), py::arg("x_stride"),
            py::arg("y"), Quiet());

    py::class_<MergeParams>(m, "MergeWeights")
        .def(py::init(&merge_params), py::kw_only(), py::arg("dtype"), py::arg("k"), py::arg("d"),
             py::arg("r"), py::arg("norm"), py::arg("weight"), py::arg("bias"),
             py::arg("projection"));

    py::class_<CompressedFfn>(m, "CompressedFfn")
        .def(py::init([](const std::string& isa, const MergeParams& merge,
                         const FfnProducts& products, int phi, Address w1u, Address b1, Address w2,
                         Address b2, const NormParams& behind, bool residual) {
                 DecompressParams p{};
                 p.dtype = merge.dtype, p.d = merge.d, p.r = merge.r;
                 p.phi = static_cast<Phi>(phi);
                 p.w1u_packed = pointer(w1u), p.b1 = pointer(b1);
                 p.w2_packed = pointer(w2), p.b2 = pointer(b2);
                 return CompressedFfn{
                     &find_kernels(isa, merge.dtype), products, merge, p, behind, residual};
             }),
             py::kw_only(), py::arg("isa"), py::arg("merge"), py::arg("products"), py::arg("phi"),
             py::arg("w1u"), py::arg("b1"), py::arg("w2"), py::arg("b2"), py::arg("behind"),
             py::arg("residual"))
        .def(
            "run",
            [](const CompressedFfn& ffn, int threads, const Groups& groups, bool outside,
               int64_t tokens, Address x, int64_t x_stride, Address y) {
                check_ratio(ffn.merge, groups);
                ffn.run({tokens, pointer(x), x_stride}, groups, outside, pointer(y),
                        usable_threads(threads));
            },
            py::kw_only(), py::arg("threads"), py::arg("groups"), py::arg("outside"),
            py::arg("tokens"), py::arg("x"), py::arg("x_stride"), py::arg("y"), Quiet());

    py::class_<AttentionSublayer>(m, "AttentionSublayer")
        .def(py::init([](const std::string& isa, int dtype, int path, int64_t heads,
                         int64_t kv_heads, int64_t head_size, double scale, const Linear& w_in,
                         const OptionalLinear& w_kv, const Linear& w_o,
                         const std::optional<MergeParams>& merge, const NormParams& norm,
                         const NormParams& behind, bool residual) {
                 AttentionParams p{};
                 p.dtype = static_cast<DType>(dtype), p.path = static_cast<AttentionPath>(path);
                 p.heads = heads, p.kv_heads = kv_heads, p.d = head_size, p.scale = scale;
                 return AttentionSublayer{&find_kernels(isa, p.dtype),   p,    w_in,   w_kv,    w_o,
                                          merge.value_or(MergeParams{}), norm, behind, residual};
             }),
             py::kw_only(), py::arg("isa"), py::arg("dtype"), py::arg("path"), py::arg("heads"),
             py::arg("kv_heads"), py::arg("head_size"), py::arg("scale"), py::arg("w_in"),
             py::arg("w_kv"), py::arg("w_o"), py::arg("merge"), py::arg("norm"), py::arg("behind"),
             py::arg("residual"))
        .def(
            "run",
            [](const AttentionSublayer& sublayer, const AttentionParams& given,
               const std::optional<Groups>& groups, bool outside, Address x, int64_t x_stride,
               Address y) {
                if (sublayer.keys_values.has_value() != groups.has_value() ||
                    (groups && groups->count != given.rows * given.keys))
                    throw std::invalid_argument("groups are of merged keys, one each");
                if (groups) check_ratio(sublayer.merge, *groups);
                sublayer.run({given.rows * given.queries, pointer(x), x_stride}, given,
                             groups.value_or(Groups{}), groups && outside, pointer(y),
                             usable_threads(given.threads));
            },
            py::kw_only(), py::arg("given"), py::arg("groups"), py::arg("outside"), py::arg("x"),
            py::arg("x_stride"), py::arg("y"), Quiet());
}

}  // namespace variator
