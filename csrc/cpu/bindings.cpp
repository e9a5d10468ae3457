// The Python module: addresses, sizes and strides in, nothing else. The Python side checks shapes,
// dtypes and contiguity and owns all memory.
#include "bindings.h"

#include <pybind11/stl.h>

#include <array>
#include <map>

#include "fork.h"
#include "group_lists.h"
#include "memory.h"

namespace py = pybind11;
using namespace variator;

namespace {

using HeadRowsGiven = std::array<int64_t, 4>;  // address, and strides of row, token and head
HeadRows head_rows(const HeadRowsGiven& t) {
    return {pointer(static_cast<Address>(t[0])), t[1], t[2], t[3]};
}

using Sizes = std::array<int64_t, 6>;  // rows, queries, keys, heads, kv_heads, d
using Terms = std::array<int64_t, 7>;  // values, heads, width, origin, positions, pattern
AttentionParams attention_inputs(int dtype, int threads, const Sizes& sizes, const HeadRowsGiven& q,
                                 const HeadRowsGiven& k, const HeadRowsGiven& v, double scale,
                                 Address bias, Address first, Address last, const Terms& terms) {
    AttentionParams p{};
    p.dtype = static_cast<DType>(dtype), p.threads = threads;
    p.rows = sizes[0], p.queries = sizes[1], p.keys = sizes[2];
    p.heads = sizes[3], p.kv_heads = sizes[4], p.d = sizes[5];
    p.q = head_rows(q), p.k = head_rows(k), p.v = head_rows(v);
    p.scale = scale, p.bias = pointer(bias);
    p.first = pointer<const int32_t>(first), p.last = pointer<const int32_t>(last);
    p.terms = pointer(static_cast<Address>(terms[0]));
    p.term_heads = terms[1], p.width = terms[2], p.origin = terms[3];
    p.query_positions = pointer<const double>(static_cast<Address>(terms[4]));
    p.key_positions = pointer<const double>(static_cast<Address>(terms[5]));
    p.pattern = pointer<const int64_t>(static_cast<Address>(terms[6]));
    return p;
}

// A params struct, and the kernels that its panels were made for.
template <class P>
struct Call {
    P params;
    const Kernels* kernels;

    Call(const P& p, const std::string& isa) : params(p), kernels(&find_kernels(isa, p.dtype)) {}

    // Runs one of the struct's kernels on the threads that may be used here.
    void run(void (*Kernels::*kernel)(const P&)) const {
        P p = params;
        p.threads = usable_threads(p.threads);
        (kernels->*kernel)(p);
    }
};

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    watch_forks();
    m.def("available_isas", &available_isas);
    m.def("active_isa", &active_isa);
    m.def("set_isa", &set_isa, py::arg("name"));
#ifdef _OPENMP
    m.attr("openmp") = true;
#else
    m.attr("openmp") = false;
#endif
    using Values = std::map<std::string, int>;
    m.attr("dtypes") = Values{VARIATOR_DTYPES(VARIATOR_ENUM_ENTRY)};
    m.attr("norms") = Values{VARIATOR_NORMS(VARIATOR_ENUM_ENTRY)};
    m.attr("attention_paths") = Values{VARIATOR_ATTENTION_PATHS(VARIATOR_ENUM_ENTRY)};
    m.attr("ffn_activations") = Values{VARIATOR_FFN_ACTIVATIONS(VARIATOR_ENUM_ENTRY)};
    m.attr("adapter_activations") = Values{VARIATOR_ADAPTER_ACTIVATIONS(VARIATOR_ENUM_ENTRY)};

    m.def(
        "list_groups",
        [](Address mask, int64_t rows, int64_t n, int64_t k, Address start, Address span) {
            list_groups(pointer<const uint8_t>(mask), rows, n, k, pointer<int64_t>(start),
                        pointer<int64_t>(span));
        },
        py::kw_only(), py::arg("mask"), py::arg("rows"), py::arg("n"), py::arg("k"),
        py::arg("start"), py::arg("span"), Quiet());

    py::class_<KeptRows>(m, "KeptRows")
        .def(py::init([](Address mask, Address keep, Address offsets, int64_t rows, int64_t n,
                         int64_t k, int64_t first, int64_t last) {
                 return KeptRows{pointer<const uint8_t>(mask),
                                 pointer<const uint8_t>(keep),
                                 pointer<const int64_t>(offsets),
                                 rows,
                                 n,
                                 k,
                                 first,
                                 last};
             }),
             py::kw_only(), py::arg("mask"), py::arg("keep"), py::arg("offsets"), py::arg("rows"),
             py::arg("n"), py::arg("k"), py::arg("first"), py::arg("last"))
        .def("count", &count_kept_groups, Quiet())
        .def(
            "list",
            [](const KeptRows& rows, int64_t count, Address start, Address span, Address kept) {
                list_kept_groups(rows, count, pointer<int64_t>(start), pointer<int64_t>(span),
                                 pointer<uint8_t>(kept));
            },
            py::kw_only(), py::arg("count"), py::arg("start"), py::arg("span"), py::arg("kept"),
            Quiet());

    // Every struct is built by keyword: of twenty addresses and sizes two that change places would
    // be memory written at random.
    py::class_<Groups>(m, "Groups")
        .def(py::init([](Address start, Address span, Address mask, Address kept, int64_t count,
                         int64_t k) {
                 return Groups{pointer<const int64_t>(start),
                               pointer<const int64_t>(span),
                               pointer<const uint8_t>(mask),
                               pointer<const uint8_t>(kept),
                               count,
                               k};
             }),
             py::kw_only(), py::arg("start"), py::arg("span"), py::arg("mask"), py::arg("kept"),
             py::arg("count"), py::arg("k"))
        .def_readonly("count", &Groups::count)
        .def_readonly("k", &Groups::k)
        .def("part", &part, py::arg("first"), py::arg("count"))
        .def("held", &held, py::arg("tokens"), Quiet())
        .def(
            "compact",
            [](const Groups& g, Address start, Address span, Address kept) {
                return compact(g, pointer<int64_t>(start), pointer<int64_t>(span),
                               pointer<uint8_t>(kept));
            },
            py::kw_only(), py::arg("start"), py::arg("span"), py::arg("kept"), Quiet())
        .def(
            "copy_outside",
            [](const Groups& g, int64_t tokens, Address x, int64_t x_stride, Address y, int64_t d,
               int64_t element_size) {
                copy_outside(g, tokens, pointer(x), x_stride, pointer(y), d, element_size);
            },
            py::kw_only(), py::arg("tokens"), py::arg("x"), py::arg("x_stride"), py::arg("y"),
            py::arg("d"), py::arg("element_size"), Quiet());

    py::class_<NormParams>(m, "Norm").def(
        py::init([](int kind, Address weight, Address bias, double eps, bool folded) {
            return NormParams{static_cast<Norm>(kind), pointer(weight), pointer(bias), eps, folded};
        }),
        py::kw_only(), py::arg("kind"), py::arg("weight"), py::arg("bias"), py::arg("eps"),
        py::arg("folded"));

    py::class_<Call<PackParams>>(m, "Pack")
        .def(py::init([](const std::string& isa, int dtype, bool bf16, int64_t matrices,
                         int64_t matrix_stride, int64_t inner, int64_t inner_stride,
                         int64_t columns, int64_t column_stride) {
            const PackParams p{static_cast<DType>(dtype),
                               bf16,
                               matrices,
                               matrix_stride,
                               inner,
                               inner_stride,
                               columns,
                               column_stride,
                               nullptr,
                               nullptr};
            return Call(p, isa);
        }))
        .def("bytes",
             [](const Call<PackParams>& call) { return call.kernels->packed_bytes(call.params); })
        .def(
            "run",
            [](const Call<PackParams>& call, Address source, Address packed) {
                PackParams p = call.params;
                p.source = pointer(source);
                p.packed = pointer(packed);
                call.kernels->pack(p);
            },
            Quiet());

    m.def(
        "int8_pack",
        [](const std::string& isa, int64_t inner, int64_t columns, Address source, Address packed) {
            Int8PackParams p{inner, columns, pointer<const int8_t>(source),
                             pointer<int8_t>(packed)};
            const Kernels& kernels = find_kernels(isa, DType::float32);
            if (packed != 0) kernels.int8_pack(p);
            return kernels.int8_packed_bytes(p);
        },
        py::kw_only(), py::arg("isa"), py::arg("inner"), py::arg("columns"), py::arg("source") = 0,
        py::arg("packed") = 0, Quiet());
    m.def("int8_weight_levels", [](const std::string& isa) {
        return find_kernels(isa, DType::float32).int8_weight_levels;
    });
    bind_sublayers(m);
    py::class_<Call<NormRowsParams>>(m, "NormRows")
        .def(py::init([](const std::string& isa, int dtype, int threads, int64_t rows, int64_t d,
                         Address x, int64_t x_stride, const NormParams& norm, Address y) {
                 NormRowsParams p{};
                 p.dtype = static_cast<DType>(dtype), p.threads = threads, p.rows = rows, p.d = d;
                 p.x = pointer(x), p.x_stride = x_stride, p.norm = norm.kind, p.eps = norm.eps;
                 p.norm_weight = norm.weight, p.norm_bias = norm.bias, p.y = pointer(y);
                 return Call(p, isa);
             }),
             py::kw_only(), py::arg("isa"), py::arg("dtype"), py::arg("threads"), py::arg("rows"),
             py::arg("d"), py::arg("x"), py::arg("x_stride"), py::arg("norm"), py::arg("y"))
        .def(
            "run", [](const Call<NormRowsParams>& call) { call.run(&Kernels::norm_rows); },
            Quiet());

    m.attr("direct_scores") = direct_scores;
    py::class_<Call<MergeParams>>(m, "Merge")
        .def(py::init([](const std::string& isa, int dtype, int threads, const Groups& groups,
                         int64_t d, int64_t r, Address x, int64_t x_stride, const NormParams& norm,
                         Address weight, Address bias, Address projection, Address merged,
                         Address projected, Address softmax, Address poison) {
                 MergeParams p{};
                 p.dtype = static_cast<DType>(dtype), p.threads = threads, p.groups = groups;
                 p.d = d, p.r = r;
                 p.x = pointer(x), p.x_stride = x_stride;
                 p.norm = norm.kind, p.eps = norm.eps, p.folded = norm.folded;
                 p.norm_weight = norm.weight, p.norm_bias = norm.bias;
                 p.merge_weight = pointer(weight), p.merge_bias = pointer(bias);
                 p.projection_packed = pointer(projection);
                 p.merged = pointer(merged), p.projected = pointer(projected);
                 p.softmax = pointer(softmax), p.poison = pointer(poison);
                 return Call(p, isa);
             }),
             py::kw_only(), py::arg("isa"), py::arg("dtype"), py::arg("threads"), py::arg("groups"),
             py::arg("d"), py::arg("r"), py::arg("x"), py::arg("x_stride"), py::arg("norm"),
             py::arg("weight"), py::arg("bias"), py::arg("projection"), py::arg("merged"),
             py::arg("projected"), py::arg("softmax"), py::arg("poison"))
        .def("run", [](const Call<MergeParams>& call) { call.run(&Kernels::merge); }, Quiet());
    py::class_<Call<MergeBackwardParams>>(m, "MergeBackward")
        .def(py::init([](const std::string& isa, int dtype, int threads, const Groups& groups,
                         int64_t d, int64_t r, Address x, int64_t x_stride, const NormParams& norm,
                         Address softmax, Address weight_rows, Address projection_rows,
                         Address d_merged, Address d_projected, Address dx, Address d_weight,
                         Address d_bias, Address d_projection, Address d_norm_weight,
                         Address d_norm_bias) {
                 MergeBackwardParams p{};
                 p.dtype = static_cast<DType>(dtype), p.threads = threads, p.groups = groups;
                 p.d = d, p.r = r;
                 p.x = pointer(x), p.x_stride = x_stride;
                 p.norm = norm.kind, p.eps = norm.eps;
                 p.norm_weight = norm.weight, p.norm_bias = norm.bias;
                 p.softmax = pointer(softmax);
                 p.merge_packed_rows = pointer(weight_rows);
                 p.projection_packed_rows = pointer(projection_rows);
                 p.d_merged = pointer(d_merged), p.d_projected = pointer(d_projected);
                 p.dx = pointer(dx);
                 p.d_merge_weight = pointer(d_weight), p.d_merge_bias = pointer(d_bias);
                 p.d_projection = pointer(d_projection);
                 p.d_norm_weight = pointer(d_norm_weight), p.d_norm_bias = pointer(d_norm_bias);
                 return Call(p, isa);
             }),
             py::kw_only(), py::arg("isa"), py::arg("dtype"), py::arg("threads"), py::arg("groups"),
             py::arg("d"), py::arg("r"), py::arg("x"), py::arg("x_stride"), py::arg("norm"),
             py::arg("softmax"), py::arg("weight_rows"), py::arg("projection_rows"),
             py::arg("d_merged"), py::arg("d_projected"), py::arg("dx"), py::arg("d_weight"),
             py::arg("d_bias"), py::arg("d_projection"), py::arg("d_norm_weight"),
             py::arg("d_norm_bias"))
        .def(
            "run",
            [](const Call<MergeBackwardParams>& call) { call.run(&Kernels::merge_backward); },
            Quiet());
    py::class_<Call<DecompressParams>>(m, "Decompress")
        .def(py::init([](const std::string& isa, int dtype, int threads, const Groups& groups,
                         int64_t d, int64_t r, int phi, Address u, Address projected, Address w1u,
                         Address b1, Address w2, Address b2, Address poison, Address residual,
                         int64_t residual_stride, Address y) {
                 DecompressParams p{};
                 p.dtype = static_cast<DType>(dtype), p.threads = threads, p.groups = groups;
                 p.d = d, p.r = r;
                 p.phi = static_cast<Phi>(phi);
                 p.u = pointer(u), p.projected = pointer(projected);
                 p.w1u_packed = pointer(w1u), p.b1 = pointer(b1);
                 p.w2_packed = pointer(w2), p.b2 = pointer(b2);
                 p.poison = pointer(poison);
                 p.residual = pointer(residual), p.residual_stride = residual_stride;
                 p.y = pointer(y);
                 return Call(p, isa);
             }),
             py::kw_only(), py::arg("isa"), py::arg("dtype"), py::arg("threads"), py::arg("groups"),
             py::arg("d"), py::arg("r"), py::arg("phi"), py::arg("u"), py::arg("projected"),
             py::arg("w1u"), py::arg("b1"), py::arg("w2"), py::arg("b2"), py::arg("poison"),
             py::arg("residual"), py::arg("residual_stride"), py::arg("y"))
        .def(
            "run", [](const Call<DecompressParams>& call) { call.run(&Kernels::decompress); },
            Quiet());
    py::class_<Call<DecompressBackwardParams>>(m, "DecompressBackward")
        .def(py::init([](const std::string& isa, int dtype, int threads, const Groups& groups,
                         int64_t d, int64_t r, int phi, Address u, Address projected, Address w1u,
                         Address b1, Address w2_rows, Address w1u_rows, Address dy,
                         int64_t dy_stride, Address du, Address d_projected, Address d_w1u,
                         Address d_b1, Address d_w2, Address d_b2) {
                 DecompressBackwardParams p{};
                 p.dtype = static_cast<DType>(dtype), p.threads = threads, p.groups = groups;
                 p.d = d, p.r = r;
                 p.phi = static_cast<Phi>(phi);
                 p.u = pointer(u), p.projected = pointer(projected);
                 p.w1u_packed = pointer(w1u), p.b1 = pointer(b1);
                 p.w2_packed_rows = pointer(w2_rows), p.w1u_packed_rows = pointer(w1u_rows);
                 p.dy = pointer(dy), p.dy_stride = dy_stride;
                 p.du = pointer(du), p.d_projected = pointer(d_projected);
                 p.d_w1u = pointer(d_w1u), p.d_b1 = pointer(d_b1);
                 p.d_w2 = pointer(d_w2), p.d_b2 = pointer(d_b2);
                 return Call(p, isa);
             }),
             py::kw_only(), py::arg("isa"), py::arg("dtype"), py::arg("threads"), py::arg("groups"),
             py::arg("d"), py::arg("r"), py::arg("phi"), py::arg("u"), py::arg("projected"),
             py::arg("w1u"), py::arg("b1"), py::arg("w2_rows"), py::arg("w1u_rows"), py::arg("dy"),
             py::arg("dy_stride"), py::arg("du"), py::arg("d_projected"), py::arg("d_w1u"),
             py::arg("d_b1"), py::arg("d_w2"), py::arg("d_b2"))
        .def(
            "run",
            [](const Call<DecompressBackwardParams>& call) {
                call.run(&Kernels::decompress_backward);
            },
            Quiet());
    py::class_<AttentionParams>(m, "AttentionInputs")
        .def(py::init(&attention_inputs), py::kw_only(), py::arg("dtype"), py::arg("threads"),
             py::arg("sizes"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("scale"),
             py::arg("bias"), py::arg("first"), py::arg("last"), py::arg("terms"));
    py::class_<Call<AttentionParams>>(m, "Attention")
        .def(py::init([](const std::string& isa, AttentionParams p, int path, Address out) {
                 p.path = static_cast<AttentionPath>(path);
                 p.out = pointer(out);
                 return Call(p, isa);
             }),
             py::kw_only(), py::arg("isa"), py::arg("inputs"), py::arg("path"), py::arg("out"))
        .def(
            "run", [](const Call<AttentionParams>& call) { call.run(&Kernels::attention); },
            Quiet());
    py::class_<Call<AttentionBackwardParams>>(m, "AttentionBackward")
        .def(py::init([](const std::string& isa, const AttentionParams& inputs,
                         const HeadRowsGiven& d_out, Address d_q, Address d_k, Address d_v,
                         Address d_bias) {
                 const AttentionBackwardParams p{inputs,       head_rows(d_out), pointer(d_q),
                                                 pointer(d_k), pointer(d_v),     pointer(d_bias)};
                 return Call(p, isa);
             }),
             py::kw_only(), py::arg("isa"), py::arg("inputs"), py::arg("d_out"), py::arg("d_q"),
             py::arg("d_k"), py::arg("d_v"), py::arg("d_bias"))
        .def(
            "run",
            [](const Call<AttentionBackwardParams>& call) {
                call.run(&Kernels::attention_backward);
            },
            Quiet());
    py::class_<Memory>(m, "Memory")
        .def(py::init<Address, Address, bool, int>(), py::kw_only(), py::arg("begin"),
             py::arg("end"), py::arg("trackable"), py::arg("threads"), Quiet())
        .def("freeze", &Memory::freeze, py::arg("frozen"), py::arg("threads"), Quiet())
        .def("holds", &Memory::holds, py::arg("copy"), py::arg("threads"), Quiet())
        .def_property_readonly("rule", &Memory::rule);
    m.def("changes", &Memory::changes, py::arg("memories"), py::arg("threads"), Quiet());
    m.def("why_not_tracked", [] {
        const char* why = why_not_tracked();
        return std::string(why ? why : "");
    });
}
