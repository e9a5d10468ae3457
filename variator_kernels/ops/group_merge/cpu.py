"""group_merge on the CPU kernels (csrc/cpu/merge.h, merge_backward.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import extension
from ..arguments import Norm, check_merge, check_merge_backward, flat
from ..cpu_arguments import (
    DTYPES,
    NORMS,
    Groups,
    Layout,
    accumulator,
    address,
    as_accumulator,
    folded,
    folds,
    optional_accumulator,
    pack_columns,
    pack_merge,
    pack_merge_rows,
    pack_rows,
)
from ..groups import max_groups


def run(
    x: Tensor,
    groups: Groups,
    span: tuple[int, int],
    merge_weight: Tensor,
    merge_bias: Tensor,
    projection_packed: Tensor | None,
    r: int,
    norm: Norm,
    merged: Tensor,
    projected: Tensor | None,
    weights: Tensor | None,
    poison: Tensor | None = None,
) -> None:
    """Merges the groups ``first .. first+count-1`` of flat ``x [tokens, d]`` into ``merged``.

    ``merge_weight`` and ``projection_packed`` are packed from ``folded(...)``.
    ``poison [groups]`` gets 0, or NaN for a group that holds NaN.
    """
    extension.load().merge(
        DTYPES[x.dtype],
        torch.get_num_threads(),
        *groups.arguments(*span),
        x.shape[1],
        r,
        x.data_ptr(),
        x.stride(0),
        NORMS[norm.name],
        address(norm.weight),
        address(norm.bias),
        norm.eps,
        folds(norm),
        merge_weight.data_ptr(),
        merge_bias.data_ptr(),
        address(projection_packed),
        merged.data_ptr(),
        address(projected),
        address(weights),
        address(poison),
    )


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
    layout = Layout(x, mask, cu_seqlens)
    groups = layout.groups(k, compact=False)
    wide = accumulator(x.dtype)
    lead = x.shape[:-2] if cu_seqlens is None else ()
    per_row = max_groups(x, k, cu_seqlens)
    merged = x.new_empty(*lead, per_row, d)
    weights = x.new_empty(*lead, per_row, k, dtype=wide)
    r = 0 if projection is None else projection.shape[0]
    fresh = torch.empty if layout.covers_all else torch.zeros
    projected = fresh(*x.shape[:-1], r, dtype=wide)
    rows = flat(x)
    wide_norm = Norm(
        norm,
        optional_accumulator(norm_weight, x.dtype),
        optional_accumulator(norm_bias, x.dtype),
        eps,
    )
    packed = None
    if projection is not None:
        packed = pack_columns(folded(projection, wide_norm, x.dtype), x.dtype, bf16=True)
    bias = as_accumulator(bias, x.dtype)
    run(
        rows,
        groups,
        (0, groups.groups),
        pack_merge(folded(weight, wide_norm, x.dtype), x.dtype),
        bias,
        packed,
        r,
        wide_norm,
        merged,
        projected if r else None,
        weights,
    )
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
    layout = Layout(x, mask, cu_seqlens)
    k, d = weights.shape[-1], x.shape[-1]
    groups = layout.groups(k, compact=False)
    check_merge_backward(d_merged, x, weights, weight, groups.groups)
    wide = accumulator(x.dtype)
    rows = flat(x)
    dx = (torch.empty if layout.covers_all else torch.zeros)(x.shape, dtype=x.dtype)
    d_weight = torch.empty(k, k, d, dtype=wide)  # [slot, score, d]
    d_bias = torch.empty(k, dtype=wide)
    r = 0 if projection is None else projection.shape[0]
    d_projection = torch.empty(r, d, dtype=wide)
    d_norm_weight = torch.empty(0 if norm_weight is None else d, dtype=wide)
    d_norm_bias = torch.empty(0 if norm_bias is None else d, dtype=wide)
    merge_rows = pack_merge_rows(weight, x.dtype)
    projection_rows = None if projection is None else pack_rows(projection, x.dtype)
    wide_norm_weight, wide_norm_bias = (
        optional_accumulator(t, x.dtype) for t in (norm_weight, norm_bias)
    )
    d_merged = d_merged.to(x.dtype).contiguous()
    d_projected = d_projected.to(wide).contiguous()
    weights = weights.contiguous()
    extension.load().merge_backward(
        DTYPES[x.dtype],
        torch.get_num_threads(),
        *groups.arguments(),
        d,
        r,
        rows.data_ptr(),
        rows.stride(0),
        NORMS[norm],
        address(wide_norm_weight),
        address(wide_norm_bias),
        eps,
        weights.data_ptr(),
        merge_rows.data_ptr(),
        address(projection_rows),
        d_merged.data_ptr(),
        d_projected.data_ptr() if r else 0,
        dx.data_ptr(),
        d_weight.data_ptr(),
        d_bias.data_ptr(),
        d_projection.data_ptr() if r else 0,
        d_norm_weight.data_ptr() if norm_weight is not None else 0,
        d_norm_bias.data_ptr() if norm_bias is not None else 0,
    )
    d_weight = d_weight.transpose(0, 1).reshape(k, k * d)
    return dx, d_weight, d_bias, d_projection, d_norm_weight, d_norm_bias
