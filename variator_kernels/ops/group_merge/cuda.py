"""group_merge on the CUDA kernels (csrc/cuda/kernels/merge*.cuh)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import extension
from ..arguments import MergeWeights, Norm, check_merge, check_merge_backward, flat
from ..cuda_arguments import (
    address,
    aligned,
    aligned_rows,
    as_vector,
    check_sizes,
    cuda_norm,
    dtype_code,
    groups_kernel,
    norm_kernel,
    pad_columns,
    pad_rows,
    target,
    vector,
)
from ..cuda_weight_gradient import Left, NormedRows, weight_gradient
from ..gpu_arguments import GpuGroups, MergeOutputs, gpu_groups, merge_outputs
from ..groups import Groups


class Merge:
    """One launch of the merge kernel; keeps alive what it reads."""

    def __init__(
        self,
        x: Tensor,
        groups: GpuGroups,
        merge: MergeWeights,
        norm: Norm,
        out: MergeOutputs,
    ) -> None:
        """Of flat ``x [tokens, d]``; ``norm`` is of :func:`cuda_norm`."""
        d, r = x.shape[1], merge.bottleneck
        check_sizes(d, groups.ratio, r)
        x = aligned_rows(x)
        weight = aligned(merge.weight.to(x.dtype))
        bias = as_vector(merge.bias, x.dtype)
        projection = None if merge.projection is None else pad_rows(merge.projection, x.dtype)
        self.kept = (x, groups, weight, bias, norm, projection)
        self.params: Any = extension.load("cuda").Merge(
            dtype=dtype_code(x.dtype),
            groups=groups_kernel(groups),
            d=d,
            r=0 if projection is None else projection.shape[0],
            x=x.data_ptr(),
            x_stride=x.stride(0),
            norm=norm_kernel(norm),
            merge_weight=weight.data_ptr(),
            merge_bias=vector(bias),
            projection=address(projection),
            projection_stride=0 if projection is None else projection.stride(0),
            projected_columns=r,
            merged=out.merged.data_ptr(),
            projected=address(out.projected),
            weights=address(out.softmax),
        )

    def run(self, x: Tensor) -> None:
        """Launches on ``x``'s device and its current stream."""
        self.params.run(target(x))


def group_merge(
    x: Tensor, merge: MergeWeights, groups: Groups, norm: Norm
) -> tuple[Tensor, Tensor, Tensor]:
    launched, merged, projected, softmax = merge_outputs(x, merge, groups, norm)
    out = MergeOutputs(merged, projected if merge.bottleneck else None, softmax)
    Merge(flat(x), launched, merge, cuda_norm(norm, x.dtype), out).run(x)
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
    cuda = extension.load("cuda")
    check_merge(x, merge, groups, norm)
    check_merge_backward(d_merged, d_projected, softmax, x, merge, groups)
    k, d, r = groups.ratio, x.shape[-1], merge.bottleneck
    check_sizes(d, k, r)
    launched, vectors = gpu_groups(groups, x), cuda_norm(norm, x.dtype)
    rows, softmax = aligned_rows(flat(x)), aligned(softmax)
    d_merged = aligned(d_merged.to(x.dtype))
    d_projected = aligned(d_projected.float())
    merge_weight = aligned(merge.weight.to(x.dtype))
    transpose = None
    if merge.projection is not None:
        transpose = pad_columns(merge.projection.t(), x.dtype)
    dx = x.new_empty(x.shape)
    d_scores = x.new_empty(launched.total, k, dtype=torch.float32)
    moments = x.new_empty(launched.total, k, 2, dtype=torch.float32)
    d_norm_weight, d_norm_bias = (
        x.new_empty(cuda.tiles(launched.launched), 0 if v is None else d, dtype=torch.float32)
        for v in (norm.weight, norm.bias)
    )
    cuda.merge_backward(
        target(x),
        dtype=dtype_code(x.dtype),
        groups=groups_kernel(launched),
        d=d,
        r=0 if transpose is None else transpose.shape[1],
        x=rows.data_ptr(),
        x_stride=rows.stride(0),
        norm=norm_kernel(vectors),
        weights=softmax.data_ptr(),
        merge_weight=merge_weight.data_ptr(),
        projection_transpose=address(transpose),
        projected_columns=r,
        d_merged=d_merged.data_ptr(),
        d_projected=d_projected.data_ptr() if r else 0,
        dx=dx.data_ptr(),
        d_scores=d_scores.data_ptr(),
        moments=moments.data_ptr(),
        d_norm_weight=0 if norm.weight is None else d_norm_weight.data_ptr(),
        d_norm_bias=0 if norm.bias is None else d_norm_bias.data_ptr(),
    )
    left = Left(d_projected.view(-1, r) if r else None, d_scores)
    sums = weight_gradient(left, rows, launched, normed=NormedRows(vectors, moments))
    d_weight = sums.scores.transpose(0, 1).reshape(k, k * d)
    return (
        dx,
        d_weight,
        d_scores.sum(0),
        sums.rows,
        d_norm_weight.sum(0),
        d_norm_bias.sum(0),
    )
