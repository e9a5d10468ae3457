// The backward kernels as Python functions.
#include "bindings/bindings.h"

namespace py = pybind11;
using namespace py::literals;

namespace variator::cuda {

void bind_backward(py::module_& m) {
    m.def(
        "merge_backward",
        [](const Target& to, int dtype, const Groups& groups, int64_t d, int64_t r, Address x,
           int64_t x_stride, const NormParams& norm, Address weights, Address merge_weight,
           Address projection_transpose, int64_t projected_columns, Address d_merged,
           Address d_projected, Address dx, Address d_scores, Address moments,
           Address d_norm_weight, Address d_norm_bias) {
            MergeBackwardParams p{};
            p.dtype = dtype_of(dtype), p.groups = groups, p.d = d, p.r = r;
            p.x = at(x), p.x_stride = x_stride, p.norm = norm;
            p.weights = at(weights), p.merge_weight = at(merge_weight);
            p.projection_transpose = at(projection_transpose);
            p.projected_columns = projected_columns;
            p.d_merged = at(d_merged), p.d_projected = at(d_projected), p.dx = at(dx);
            p.d_scores = at(d_scores), p.moments = at(moments);
            p.d_norm_weight = at(d_norm_weight), p.d_norm_bias = at(d_norm_bias);
            run(merge_backward, "merge_backward", p, to);
        },
        py::arg("target"), py::kw_only(), "dtype"_a, "groups"_a, "d"_a, "r"_a, "x"_a, "x_stride"_a,
        "norm"_a, "weights"_a, "merge_weight"_a, "projection_transpose"_a, "projected_columns"_a,
        "d_merged"_a, "d_projected"_a, "dx"_a, "d_scores"_a, "moments"_a, "d_norm_weight"_a,
        "d_norm_bias"_a);
    m.def(
        "decompress_backward",
        [](const Target& to, int dtype, const Groups& groups, int64_t d, int64_t r, int phi,
           Address u, Address projected, int64_t projected_columns, Address w1u, int64_t w1u_stride,
           Address w1u_transpose, Address w2_transpose, const Vector& b1, Address dy,
           int64_t dy_stride, Address du, Address d_projected, Address bottleneck, Address d_q) {
            DecompressBackwardParams p{};
            p.dtype = dtype_of(dtype), p.groups = groups, p.d = d, p.r = r;
            p.phi = static_cast<Phi>(phi), p.u = at(u), p.projected = at(projected);
            p.projected_columns = projected_columns, p.w1u = at(w1u), p.w1u_stride = w1u_stride;
            p.w1u_transpose = at(w1u_transpose), p.w2_transpose = at(w2_transpose);
            p.b1 = b1, p.dy = at(dy), p.dy_stride = dy_stride, p.du = at(du);
            p.d_projected = at(d_projected), p.bottleneck = at(bottleneck), p.d_q = at(d_q);
            run(decompress_backward, "decompress_backward", p, to);
        },
        py::arg("target"), py::kw_only(), "dtype"_a, "groups"_a, "d"_a, "r"_a, "phi"_a, "u"_a,
        "projected"_a, "projected_columns"_a, "w1u"_a, "w1u_stride"_a, "w1u_transpose"_a,
        "w2_transpose"_a, "b1"_a, "dy"_a, "dy_stride"_a, "du"_a, "d_projected"_a, "bottleneck"_a,
        "d_q"_a);
    m.def(
        "weight_gradient",
        [](const Target& to, int dtype, const Groups& groups, bool by_group, Address left,
           int64_t left_columns, Address scores, int64_t score_columns, bool ones, Address right,
           int64_t right_stride, int64_t d, const NormParams& norm, Address moments, int64_t shares,
           Address out) {
            WeightGradientParams p{};
            p.dtype = dtype_of(dtype), p.groups = groups, p.by_group = by_group;
            p.left = at(left), p.left_columns = left_columns;
            p.scores = at(scores), p.score_columns = score_columns, p.ones = ones;
            p.right = at(right), p.right_stride = right_stride, p.d = d;
            p.norm = norm, p.moments = at(moments), p.shares = shares, p.out = at(out);
            run(weight_gradient, "weight_gradient", p, to);
        },
        py::arg("target"), py::kw_only(), "dtype"_a, "groups"_a, "by_group"_a, "left"_a,
        "left_columns"_a, "scores"_a, "score_columns"_a, "ones"_a, "right"_a, "right_stride"_a,
        "d"_a, "norm"_a, "moments"_a, "shares"_a, "out"_a);
}

}  // namespace variator::cuda
