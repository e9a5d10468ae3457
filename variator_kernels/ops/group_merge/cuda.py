"""group_merge on the CUDA kernels (csrc/cuda/kernels/merge*.cuh)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import extension
from ..arguments import Norm, check_merge_backward, flat
from ..cuda_arguments import (
    address,
    aligned,
    as_vector,
    check_sizes,
    dtype_code,
    norm_as_read,
    norm_of,
    pad_columns,
    pad_rows,
    rows_of,
    spans_of,
    target,
    vector,
)
from ..cuda_sums import outer_sum
from ..gpu_arguments import Groups, groups, merge_outputs


class Merge:
    """One launch of the merge kernel; keeps alive what it reads."""

    def __init__(
        self,
        x: Tensor,
        spans: Groups,
        weight: Tensor,
        bias: Tensor,
        norm: Norm,
        projection: Tensor | None,
        merged: Tensor,
        projected: Tensor | None,
        weights: Tensor | None,
    ) -> None:
        """Flat ``x [tokens, d]``; the outputs are ``merged``, ``projected`` and ``weights``."""
        d, r = x.shape[1], 0 if projection is None else projection.shape[0]
        check_sizes(d, spans.ratio, r)
        x = rows_of(x)
        weight = aligned(weight.detach().to(x.dtype))
        bias = as_vector(bias, x.dtype)
        projection = None if projection is None else pad_rows(projection, x.dtype)
        self.kept = (x, spans, weight, bias, norm, projection)
        self.params: Any = extension.load("cuda").Merge(
            dtype=dtype_code(x.dtype),
            groups=spans_of(spans),
            d=d,
            r=0 if projection is None else projection.shape[0],
            x=x.data_ptr(),
            x_stride=x.stride(0),
            norm=norm_as_read(norm),
            merge_weight=weight.data_ptr(),
            merge_bias=vector(bias),
            projection=address(projection),
            projection_stride=0 if projection is None else projection.stride(0),
            projected_columns=r,
            merged=merged.data_ptr(),
            projected=address(projected),
            weights=address(weights),
        )

    def run(self, x: Tensor) -> None:
        """Launches on ``x``'s device and its current stream."""
        self.params.run(target(x))


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
    vectors = norm_of(norm, norm_weight, norm_bias, eps, x.dtype)
    Merge(
        flat(x),
        spans,
        weight,
        bias,
        vectors,
        projection,
        merged,
        projected if projected.shape[-1] else None,
        weights,
    ).run(x)
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
    cuda = extension.load("cuda")
    k, d = weights.shape[-1], x.shape[-1]
    r = 0 if projection is None else projection.shape[0]
    spans = groups(x, mask, cu_seqlens, k)
    check_merge_backward(d_merged, x, weights, weight, spans.total)
    check_sizes(d, k, r)
    vectors = norm_of(norm, norm_weight, norm_bias, eps, x.dtype)
    rows, weights = rows_of(flat(x)), aligned(weights)
    d_merged = aligned(d_merged.to(x.dtype))
    d_projected = aligned(d_projected.float())
    merge_weight = aligned(weight.detach().to(x.dtype))
    transpose = None if projection is None else pad_columns(projection.t(), x.dtype)
    dx = x.new_empty(x.shape)
    d_scores = x.new_empty(spans.total, k, dtype=torch.float32)
    moments = x.new_empty(spans.total, k, 2, dtype=torch.float32)
    d_norm_weight, d_norm_bias = (
        x.new_empty(cuda.tiles(spans.launched), 0 if v is None else d, dtype=torch.float32)
        for v in (norm_weight, norm_bias)
    )
    cuda.merge_backward(
        target(x),
        dtype=dtype_code(x.dtype),
        groups=spans_of(spans),
        d=d,
        r=0 if transpose is None else transpose.shape[1],
        x=rows.data_ptr(),
        x_stride=rows.stride(0),
        norm=norm_as_read(vectors),
        weights=weights.data_ptr(),
        merge_weight=merge_weight.data_ptr(),
        projection_transpose=address(transpose),
        projected_columns=r,
        d_merged=d_merged.data_ptr(),
        d_projected=d_projected.data_ptr() if r else 0,
        dx=dx.data_ptr(),
        d_scores=d_scores.data_ptr(),
        moments=moments.data_ptr(),
        d_norm_weight=0 if norm_weight is None else d_norm_weight.data_ptr(),
        d_norm_bias=0 if norm_bias is None else d_norm_bias.data_ptr(),
    )
    hidden: dict[str, Any] = {"norm": vectors, "moments": moments}
    slots = [
        outer_sum(d_scores, rows, spans, slot=j, left_by_group=True, **hidden) for j in range(k)
    ]
    d_weight = torch.stack(slots, 1).reshape(k, k * d)
    d_projection = x.new_zeros(0, d, dtype=torch.float32)
    if r:
        d_projection = outer_sum(d_projected.view(-1, r), rows, spans, **hidden)
    return (
        dx,
        d_weight,
        d_scores.sum(0),
        d_projection,
        d_norm_weight.sum(0),
        d_norm_bias.sum(0),
    )
