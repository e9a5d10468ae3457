"""group_merge on the Triton kernels (triton_kernels/merge.py, merge_backward.py)."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ...triton_kernels import launch
from ...triton_kernels.merge import group_merge_kernel, weighted_sum_kernel
from ...triton_kernels.merge_backward import merge_backward_kernel, score_gradient_kernel
from ..arguments import Norm, check_merge_backward, flat
from ..gpu_arguments import Groups, dense, groups, merge_outputs, rows_of
from ..triton_sums import NO_STATISTICS, Statistics, weight_sums

# Columns of the score product: a tile holds as many slots as fit.
SCORE_COLUMNS = 64


def _slots(k: int) -> tuple[int, int]:
    """k padded to a power of two, and how many slots a tile holds."""
    k2 = launch.power_of_2(k)
    return k2, max(1, min(k2, SCORE_COLUMNS // k2))


def run(
    x: Tensor,
    spans: Groups,
    weight: Tensor,
    bias: Tensor,
    norm: Norm,
    projection: Tensor | None,
    merged: Tensor,
    projected: Tensor | None,
    weights: Tensor,
) -> None:
    """Merges flat ``x [tokens, d]`` to ``merged``, ``projected`` and the softmax ``weights``."""
    if spans.launched == 0:
        return
    k, d = spans.ratio, x.shape[1]
    k2, slots = _slots(k)
    parts = k2 // slots
    case = {"arch": launch.arch(x), "d": d, "k": k, "dtype": launch.name(x.dtype)}
    row = launch.settings("group_merge", **case)
    groups_a_tile = max(1, row["bt"] // slots)
    scores = mean = rstd = None
    if parts > 1:
        scores = x.new_empty(parts, spans.total, k2, dtype=torch.float32)
        if norm.name != "none":
            rstd = x.new_empty(spans.total, k2, dtype=torch.float32)
            mean = torch.empty_like(rstd) if norm.name == "layer" else None
    weight, r = rows_of(weight), 0 if projection is None else projection.shape[0]
    if projection is not None:
        projection = rows_of(projection)
    group_merge_kernel[(triton.cdiv(spans.launched, groups_a_tile), parts)](
        x, weight, bias, projection, norm.weight, norm.bias,
        spans.start, spans.length, spans.span, spans.mask,
        merged, projected, weights, scores, mean, rstd,
        spans.total, spans.launched, spans.n, spans.per_row, d,
        x.stride(0), weight.stride(0), 0 if projection is None else projection.stride(0), norm.eps,
        K=k, K2=k2, SC=slots, C=max(16, slots * k2), BG=groups_a_tile,
        BD=row["bd"], BS=row["bs"], R=r, R2=launch.power_of_2(r, 16),
        NORM=norm.name, FORM=spans.form,
        # In fp16 the norm's weight times x, not yet normalised, could overflow.
        STATISTICS_FIRST=norm.name == "layer"
        or (norm.name == "rms" and x.dtype == torch.float16),
        PRECISION=launch.precision(x), **launch.options(row),
    )  # fmt: skip
    if parts > 1:
        row = launch.settings("weighted_sum", **case)
        grid = (triton.cdiv(spans.launched, row["bg"]), triton.cdiv(d, row["bs"]))
        weighted_sum_kernel[grid](
            x, bias, norm.weight, norm.bias, spans.start, spans.length, spans.span, spans.mask,
            merged, weights, scores, mean, rstd,
            spans.total, spans.launched, spans.n, spans.per_row, d, x.stride(0),
            K=k, K2=k2, PARTS=parts, BG=row["bg"], BS=row["bs"], NORM=norm.name, FORM=spans.form,
            **launch.options(row),
        )  # fmt: skip


def group_merge(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    projection: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    spans, merged, projected, weights = merge_outputs(
        x, weight, bias, mask, cu_seqlens, norm_weight, norm_bias, projection
    )
    with launch.device_of(x):
        run(
            flat(x), spans, weight, bias.contiguous(),
            Norm(norm, dense(norm_weight), dense(norm_bias), eps),
            projection, merged,
            projected if projected.shape[-1] else None, weights,
        )  # fmt: skip
    return merged, projected, weights


def group_merge_backward(
    d_merged: Tensor,
    d_projected: Tensor,
    x: Tensor,
    weights: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    projection: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    k, d = weights.shape[-1], x.shape[-1]
    r = 0 if projection is None else projection.shape[0]
    spans = groups(x, mask, cu_seqlens, k)
    check_merge_backward(d_merged, x, weights, weight, spans.total)
    vectors = Norm(norm, dense(norm_weight), dense(norm_bias), eps)
    dx = x.new_empty(x.shape)
    if spans.launched == 0:
        wide = x.new_zeros(k * k * d + k + r * d, dtype=torch.float32)
        d_weight, d_bias, d_projection = wide.split([k * k * d, k, r * d])
        d_norm_weight, d_norm_bias = (
            x.new_zeros(0 if v is None else d, dtype=torch.float32) for v in vectors[1:3]
        )
        d_weight, d_projection = d_weight.view(k, k * d), d_projection.view(r, d)
        return dx, d_weight, d_bias, d_projection, d_norm_weight, d_norm_bias
    with launch.device_of(x):
        rows, d_merged = flat(x), d_merged.to(x.dtype).contiguous()
        d_rows = d_projected.to(torch.float32).contiguous().view(-1, r) if r else None
        d_scores, statistics = _score_gradient(rows, spans, vectors, weights, d_merged)
        parts = _hidden_gradient(
            rows, spans, vectors, weights, weight, projection,
            d_merged, d_rows, d_scores, statistics, dx,
        )  # fmt: skip
        sums = weight_sums(
            rows, spans, d_rows, norm=vectors, statistics=statistics, scores=d_scores
        )
    d_weight = sums.scores.transpose(0, 1).reshape(k, k * d)
    d_norm_weight, d_norm_bias = (part.sum(0) for part in parts)
    return dx, d_weight, d_scores.sum(0)[:k], sums.b, d_norm_weight, d_norm_bias


def _score_gradient(
    x: Tensor, spans: Groups, norm: Norm, weights: Tensor, d_merged: Tensor
) -> tuple[Tensor, Statistics]:
    """The scores' gradient ``[groups, K2]`` and the rows' statistics by slot."""
    k, d = spans.ratio, x.shape[1]
    k2 = launch.power_of_2(k)
    case = {"arch": launch.arch(x), "d": d, "k": k, "dtype": launch.name(x.dtype)}
    row = launch.settings("score_gradient", **case)
    d_scores = x.new_empty(spans.total, k2, dtype=torch.float32)
    statistics = NO_STATISTICS
    if norm.name != "none":
        statistics = Statistics(torch.empty_like(d_scores), torch.empty_like(d_scores))
    groups_a_tile = max(1, row["bt"] // k2)
    score_gradient_kernel[(triton.cdiv(spans.total, groups_a_tile),)](
        x, norm.weight, norm.bias, spans.start, spans.length, spans.span, spans.mask,
        weights.contiguous(), d_merged, d_scores, *statistics,
        spans.total, spans.launched, spans.n, spans.per_row, d, x.stride(0), norm.eps,
        K=k, K2=k2, BG=groups_a_tile, BD=row["bd"], NORM=norm.name, FORM=spans.form,
        **launch.options(row),
    )  # fmt: skip
    return d_scores, statistics


def _hidden_gradient(
    x: Tensor,
    spans: Groups,
    norm: Norm,
    weights: Tensor,
    weight: Tensor,
    projection: Tensor | None,
    d_merged: Tensor,
    d_projected: Tensor | None,
    d_scores: Tensor,
    statistics: Statistics,
    dx: Tensor,
) -> tuple[Tensor, Tensor]:
    """Writes dx; returns the programs' parts of the norm's gradients, ``[programs, 0 or d]``."""
    k, d = spans.ratio, x.shape[1]
    k2, slots = _slots(k)
    case = {"arch": launch.arch(x), "d": d, "k": k, "dtype": launch.name(x.dtype)}
    row = launch.settings("merge_backward", **case)
    groups_a_tile = max(1, row["bt"] // slots)
    grid = (triton.cdiv(spans.launched, groups_a_tile), k2 // slots)
    d_norm_weight, d_norm_bias = (
        x.new_empty(grid[0] * grid[1], 0 if vector is None else d, dtype=torch.float32)
        for vector in norm[1:3]
    )
    weight, r = rows_of(weight), 0 if projection is None else projection.shape[0]
    if projection is not None:
        projection = rows_of(projection)
    merge_backward_kernel[grid](
        x, weight, projection, norm.weight, norm.bias,
        spans.start, spans.length, spans.span, spans.mask,
        weights.contiguous(), d_merged, d_projected, d_scores, *statistics,
        dx, d_norm_weight, d_norm_bias,
        spans.total, spans.launched, spans.n, spans.per_row, d,
        x.stride(0), weight.stride(0), 0 if projection is None else projection.stride(0),
        K=k, K2=k2, SC=slots, C=max(16, slots * k2), BG=groups_a_tile, BD=row["bd"],
        R=r, R2=launch.power_of_2(r, 16), NORM=norm.name, FORM=spans.form,
        PRECISION=launch.precision(x), **launch.options(row),
    )  # fmt: skip
    return d_norm_weight, d_norm_bias
