// The sublayer: an object for all calls whose tensors have the same sizes, strides and types, which
// is given addresses by each of them.
#include "bindings/bindings.h"

namespace py = pybind11;
using namespace py::literals;
using namespace variator::cuda;

namespace {

struct Sublayer {
    LayerParams params;
    bool one_launch;
};

void set(Groups& g, Address start, Address span, Address owned, Address mask, Address kept) {
    g.start = at(start), g.span = at(span), g.owned = at(owned);
    g.mask = at(mask), g.kept = at(kept);
}

}  // namespace

void variator::cuda::bind_sublayer(py::module_& m) {
    py::class_<Sublayer>(m, "Sublayer", py::module_local())
        .def(py::init([](const MergeParams& merge, const DecompressParams& decompress, int64_t f,
                         int activation, bool one_launch, int64_t splits, int64_t blocks_a_part) {
                 LayerParams p{};
                 p.merge = merge, p.decompress = decompress, p.f = f;
                 p.merge.r = decompress.r;  // what is merged is projected on the way
                 p.activation = static_cast<Activation>(activation);
                 p.splits = splits, p.blocks_a_part = blocks_a_part;
                 return Sublayer{p, one_launch};
             }),
             py::kw_only(), "merge"_a, "decompress"_a, "f"_a, "activation"_a, "one_launch"_a,
             "splits"_a, "blocks_a_part"_a)
        .def(
            "run",
            [](const Sublayer& s, const Target& to, Address x, Address merge_weight,
               Address merge_bias, Address w1u, Address w1h, Address b1, Address w2, Address b2,
               Address norm_weight, Address norm_bias, Address w_in, Address w_out, Address w_gate,
               Address b_in, Address b_out, Address b_gate, Address start, Address span,
               Address owned, Address mask, Address kept, Address merged, Address projected,
               Address inner, Address gated, Address partial, Address u, Address y) {
                LayerParams p = s.params;
                set(p.merge.groups, start, span, owned, mask, kept);
                p.decompress.groups = p.merge.groups;
                p.merge.x = at(x), p.merge.merge_weight = at(merge_weight);
                p.merge.merge_bias.data = at(merge_bias), p.merge.projection = at(w1h);
                p.merge.norm.weight.data = at(norm_weight);
                p.merge.norm.bias.data = at(norm_bias);
                p.merge.merged = at(merged), p.merge.projected = at(projected);
                p.w_in = at(w_in), p.w_out = at(w_out), p.w_gate = at(w_gate);
                p.b_in = at(b_in), p.b_out = at(b_out), p.b_gate = at(b_gate);
                p.inner = at(inner), p.gated = at(gated), p.partial = at(partial), p.u = at(u);
                p.decompress.u = at(u), p.decompress.projected = at(projected);
                p.decompress.w1u = at(w1u), p.decompress.w2 = at(w2);
                p.decompress.b1.data = at(b1), p.decompress.b2.data = at(b2);
                // A sublayer without a residual has none whatever comes.
                if (p.decompress.residual != nullptr) p.decompress.residual = at(x);
                p.decompress.y = at(y);
                run(s.one_launch ? one_launch : launches, s.one_launch ? "one_launch" : "launches",
                    p, to);
            },
            py::arg("target"), py::kw_only(), "x"_a, "merge_weight"_a, "merge_bias"_a, "w1u"_a,
            "w1h"_a, "b1"_a, "w2"_a, "b2"_a, "norm_weight"_a, "norm_bias"_a, "w_in"_a, "w_out"_a,
            "w_gate"_a, "b_in"_a, "b_out"_a, "b_gate"_a, "start"_a, "span"_a, "owned"_a, "mask"_a,
            "kept"_a, "merged"_a, "projected"_a, "inner"_a, "gated"_a, "partial"_a, "u"_a, "y"_a);
}
