"""group_merge on the Triton kernels (triton_kernels/merge.py, merge_backward.py)."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ...triton_kernels import launch
from ...triton_kernels.merge import group_merge_kernel, weighted_sum_kernel
from ..arguments import check_merge, flat
from ..gpu_arguments import Groups, dense, groups, rows_of

# Columns of the score product: a tile holds as many slots as fit.
SCORE_COLUMNS = 64


def run(
    x: Tensor,
    spans: Groups,
    weight: Tensor,
    bias: Tensor,
    norm: tuple[str, Tensor | None, Tensor | None, float],
    projection: Tensor | None,
    merged: Tensor,
    projected: Tensor | None,
    weights: Tensor,
) -> None:
    """Merges flat ``x [tokens, d]``: writes ``merged``, ``projected`` and the softmax ``weights``."""
    if spans.launched == 0:
        return
    name, norm_weight, norm_bias, eps = norm
    k, d = spans.ratio, x.shape[1]
    k2 = launch.power_of_2(k)
    slots = max(1, min(k2, SCORE_COLUMNS // k2))
    parts = k2 // slots
    arch = launch.arch(x)
    row = launch.settings("group_merge", arch=arch, d=d, k=k, dtype=launch.name(x.dtype))
    groups_a_tile = max(1, row["bt"] // slots)
    scores = mean = rstd = None
    if parts > 1:
        scores = x.new_empty(parts, spans.count, k2, dtype=torch.float32)
        if name != "none":
            rstd = x.new_empty(spans.count, k2, dtype=torch.float32)
            mean = torch.empty_like(rstd) if name == "layer" else None
    weight, r = rows_of(weight), 0 if projection is None else projection.shape[0]
    if projection is not None:
        projection = rows_of(projection)
    group_merge_kernel[(triton.cdiv(spans.launched, groups_a_tile), parts)](
        x, weight, bias, projection, norm_weight, norm_bias,
        spans.start, spans.length, spans.span, spans.mask,
        merged, projected, weights, scores, mean, rstd,
        spans.count, spans.launched, spans.n, spans.per_row, d,
        x.stride(0), weight.stride(0), 0 if projection is None else projection.stride(0), eps,
        K=k, K2=k2, SC=slots, C=max(16, slots * k2), BG=groups_a_tile,
        BD=row["bd"], BS=row["bs"], R=r, R2=launch.power_of_2(r, 16), NORM=name, FORM=spans.form,
        # In fp16 the norm's weight times x, not yet normalised, could overflow.
        STATISTICS_FIRST=name == "layer" or (name == "rms" and x.dtype == torch.float16),
        PRECISION=launch.precision(x.dtype), **launch.options(row),
    )  # fmt: skip
    if parts > 1:
        row = launch.settings("weighted_sum", arch=arch, d=d, k=k, dtype=launch.name(x.dtype))
        grid = (triton.cdiv(spans.launched, row["bg"]), triton.cdiv(d, row["bs"]))
        weighted_sum_kernel[grid](
            x, bias, norm_weight, norm_bias, spans.start, spans.length, spans.span, spans.mask,
            merged, weights, scores, mean, rstd,
            spans.count, spans.launched, spans.n, spans.per_row, d, x.stride(0),
            K=k, K2=k2, PARTS=parts, BG=row["bg"], BS=row["bs"], NORM=name, FORM=spans.form,
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
    k, d = bias.shape[0], x.shape[-1]
    check_merge(x, weight, norm_weight, norm_bias, projection, k)
    spans = groups(x, mask, cu_seqlens, k)
    lead = x.shape[:-2] if cu_seqlens is None else ()
    merged = x.new_empty(*lead, spans.per_row, d)
    weights = x.new_empty(*lead, spans.per_row, k, dtype=torch.float32)
    r = 0 if projection is None else projection.shape[0]
    projected = x.new_empty(*x.shape[:-1], r, dtype=torch.float32)
    with launch.device_of(x):
        run(
            flat(x), spans, weight, bias.contiguous(),
            (norm, dense(norm_weight), dense(norm_bias), eps),
            projection, merged, projected if r else None, weights,
        )  # fmt: skip
    return merged, projected, weights
