"""group_merge on the Triton kernels (triton_kernels/merge.py, merge_backward.py)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...triton_kernels import launch
from ...triton_kernels.merge import group_merge_kernel, weighted_sum_kernel
from ...triton_kernels.merge_backward import merge_backward_kernel, score_gradient_kernel
from ..arguments import MergeWeights, Norm, check_merge, check_merge_backward, flat
from ..gpu_arguments import (
    GpuGroups,
    MergeOutputs,
    contiguous_norm,
    gpu_groups,
    merge_outputs,
    unit_rows,
)
from ..groups import Groups
from ..triton_weight_gradient import NO_STATISTICS, Statistics, weight_sums

# Columns of the score product: a tile holds as many slots as fit.
SCORE_COLUMNS = 64


def _slots(k: int) -> tuple[int, int]:
    """k padded to a power of two, and how many slots a tile holds."""
    k2 = launch.power_of_2(k)
    return k2, max(1, min(k2, SCORE_COLUMNS // k2))


class Launches(NamedTuple):
    """A merge of inputs of one form: all but their addresses."""

    merge: launch.Launch
    weighted_sum: launch.Launch | None
    scores: tuple[int, int, int]
    """Of a merge in parts, which leave them in memory for the sum."""

    def run(self, x: Tensor, groups: GpuGroups, merge: MergeWeights, norm: Norm, out: MergeOutputs,
    ) -> None:  # fmt: skip
        """Merges flat ``x [tokens, d]``; rows of matrices and all vectors have unit stride."""
        merged, projected, softmax = out
        scores = mean = rstd = None
        if self.weighted_sum is not None:
            scores = x.new_empty(self.scores, dtype=torch.float32)
            if norm.name != "none":
                rstd = x.new_empty(self.scores[1:], dtype=torch.float32)
                mean = torch.empty_like(rstd) if norm.name == "layer" else None
        self.merge(
            x, merge.weight, merge.bias, merge.projection, norm.weight, norm.bias,
            *groups.pointers, merged, projected, softmax, scores, mean, rstd,
        )  # fmt: skip
        if self.weighted_sum is not None:
            self.weighted_sum(
                x, merge.bias, norm.weight, norm.bias, *groups.pointers,
                merged, softmax, scores, mean, rstd,
            )  # fmt: skip


def unit_strides(merge: MergeWeights) -> MergeWeights:
    """The same as the kernels read it."""
    weight, bias, projection = merge
    if projection is not None:
        projection = unit_rows(projection)
    return MergeWeights(unit_rows(weight), bias.contiguous(), projection)


def launches(x: Tensor, groups: GpuGroups, merge: MergeWeights, norm: Norm) -> Launches | None:
    """Of the form of :func:`unit_strides`' weights; None where there is no group."""
    if groups.launched == 0:
        return None
    weight, _, projection = merge
    k, d = groups.ratio, x.shape[1]
    k2, slots = _slots(k)
    parts = k2 // slots
    r = merge.bottleneck
    case = launch.case(x, d, k, launch.tiles(x.shape[0]), r=launch.bottleneck(r))
    row = launch.settings("group_merge", **case)
    groups_a_tile = max(1, row["bt"] // slots)
    projection_stride = 0 if projection is None else projection.stride(0)
    first = launch.Launch(
        group_merge_kernel,
        (launch.cdiv(groups.launched, groups_a_tile), parts),
        (*groups.sizes, d, x.stride(0), weight.stride(0), projection_stride, norm.eps),
        dict(
            K=k, K2=k2, SC=slots, C=max(16, slots * k2), BG=groups_a_tile,
            BD=row["bd"], BS=row["bs"], R=r, BR=min(row["br"], launch.bottleneck(r)),
            NORM=norm.name, FORM=groups.form,
            # In fp16 the norm's weight times x, not yet normalised, could overflow.
            STATISTICS_FIRST=norm.name == "layer"
            or (norm.name == "rms" and x.dtype == torch.float16),
            PRECISION=launch.precision(x), **launch.options(row),
        ),
    )  # fmt: skip
    if parts == 1:
        return Launches(first, None, (1, groups.total, k2))
    row = launch.settings("weighted_sum", **case)
    second = launch.Launch(
        weighted_sum_kernel,
        (launch.cdiv(groups.launched, row["bg"]), launch.cdiv(d, row["bs"])),
        (*groups.sizes, d, x.stride(0)),
        dict(
            K=k, K2=k2, PARTS=parts, BG=row["bg"], BS=row["bs"], NORM=norm.name, FORM=groups.form,
            **launch.options(row),
        ),
    )  # fmt: skip
    return Launches(first, second, (parts, groups.total, k2))


def run(x: Tensor, groups: GpuGroups, merge: MergeWeights, norm: Norm, out: MergeOutputs) -> None:
    """Merges flat ``x [tokens, d]``; the softmax is always written."""
    merge = unit_strides(merge)
    found = launches(x, groups, merge, norm)
    if found is not None:
        found.run(x, groups, merge, norm, out)


def group_merge(
    x: Tensor, merge: MergeWeights, groups: Groups, norm: Norm
) -> tuple[Tensor, Tensor, Tensor]:
    launched, merged, projected, softmax = merge_outputs(x, merge, groups, norm)
    out = MergeOutputs(merged, projected if merge.bottleneck else None, softmax)
    with launch.device_of(x):
        run(flat(x), launched, merge, contiguous_norm(norm), out)
    return merged, projected, softmax


def group_merge_backward(
    d_merged: Tensor,
    d_projected: Tensor,
    softmax: Tensor,
    x: Tensor,
    merge: MergeWeights,
    groups: Groups,
    norm: Norm,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_merge(x, merge, groups, norm)
    check_merge_backward(d_merged, d_projected, softmax, x, merge, groups)
    k, d, r = groups.ratio, x.shape[-1], merge.bottleneck
    launched, vectors = gpu_groups(groups, x), contiguous_norm(norm)
    dx = x.new_empty(x.shape)
    if launched.launched == 0:
        wide = x.new_zeros(k * k * d + k + r * d, dtype=torch.float32)
        d_weight, d_bias, d_projection = wide.split([k * k * d, k, r * d])
        d_norm_weight, d_norm_bias = (
            x.new_zeros(0 if v is None else d, dtype=torch.float32) for v in vectors[1:3]
        )
        d_weight, d_projection = d_weight.view(k, k * d), d_projection.view(r, d)
        return dx, d_weight, d_bias, d_projection, d_norm_weight, d_norm_bias
    with launch.device_of(x):
        rows, softmax = flat(x), softmax.contiguous()
        d_merged = d_merged.to(x.dtype).contiguous()
        d_rows = d_projected.to(torch.float32).contiguous().view(-1, r) if r else None
        d_scores, statistics = _score_gradient(rows, launched, vectors, softmax, d_merged)
        gradients = _Gradients(softmax, d_merged, d_rows, d_scores, statistics)
        parts = _hidden_gradient(rows, launched, merge, vectors, gradients, dx)
        sums = weight_sums(
            rows, launched, d_rows, norm=vectors, statistics=statistics, scores=d_scores
        )
    d_weight = sums.scores.transpose(0, 1).reshape(k, k * d)
    d_norm_weight, d_norm_bias = (part.sum(0) for part in parts)
    return dx, d_weight, d_scores.sum(0)[:k], sums.b, d_norm_weight, d_norm_bias


class _Gradients(NamedTuple):
    """What the gradient of h is made of."""

    softmax: Tensor
    d_merged: Tensor
    d_projected: Tensor | None
    d_scores: Tensor
    statistics: Statistics


def _score_gradient(
    x: Tensor, groups: GpuGroups, norm: Norm, softmax: Tensor, d_merged: Tensor
) -> tuple[Tensor, Statistics]:
    """The scores' gradient ``[groups, K2]`` and the rows' statistics by slot."""
    k, d = groups.ratio, x.shape[1]
    k2 = launch.power_of_2(k)
    row = launch.settings("score_gradient", **launch.case(x, d, k, launch.tiles(x.shape[0])))
    d_scores = x.new_empty(groups.total, k2, dtype=torch.float32)
    statistics = NO_STATISTICS
    if norm.name != "none":
        statistics = Statistics(torch.empty_like(d_scores), torch.empty_like(d_scores))
    groups_a_tile = max(1, row["bt"] // k2)
    score_gradient_kernel[(launch.cdiv(groups.total, groups_a_tile),)](
        x, norm.weight, norm.bias, *groups.pointers,
        softmax, d_merged, d_scores, *statistics,
        *groups.sizes, d, x.stride(0), norm.eps,
        K=k, K2=k2, BG=groups_a_tile, BD=row["bd"], NORM=norm.name, FORM=groups.form,
        **launch.options(row),
    )  # fmt: skip
    return d_scores, statistics


def _hidden_gradient(
    x: Tensor,
    groups: GpuGroups,
    merge: MergeWeights,
    norm: Norm,
    gradients: _Gradients,
    dx: Tensor,
) -> tuple[Tensor, Tensor]:
    """Writes dx; returns the programs' parts of the norm's gradients, ``[programs, 0 or d]``."""
    k, d = groups.ratio, x.shape[1]
    k2, slots = _slots(k)
    r = merge.bottleneck
    case = launch.case(x, d, k, launch.tiles(x.shape[0]), r=launch.bottleneck(r))
    row = launch.settings("merge_backward", **case)
    groups_a_tile = max(1, row["bt"] // slots)
    grid = (launch.cdiv(groups.launched, groups_a_tile), k2 // slots)
    d_norm_weight, d_norm_bias = (
        x.new_empty(grid[0] * grid[1], 0 if vector is None else d, dtype=torch.float32)
        for vector in norm[1:3]
    )
    softmax, d_merged, d_projected, d_scores, statistics = gradients
    weight, projection = unit_rows(merge.weight), merge.projection
    if projection is not None:
        projection = unit_rows(projection)
    merge_backward_kernel[grid](
        x, weight, projection, norm.weight, norm.bias,
        *groups.pointers,
        softmax, d_merged, d_projected, d_scores, *statistics,
        dx, d_norm_weight, d_norm_bias,
        *groups.sizes, d,
        x.stride(0), weight.stride(0), 0 if projection is None else projection.stride(0),
        K=k, K2=k2, SC=slots, C=max(16, slots * k2), BG=groups_a_tile, BD=row["bd"],
        R=r, BR=min(row["br"], launch.bottleneck(r)), NORM=norm.name, FORM=groups.form,
        PRECISION=launch.precision(x), **launch.options(row),
    )  # fmt: skip
    return d_norm_weight, d_norm_bias
