"""group_merge on the CPU kernels (csrc/cpu/merge.h, merge_backward.h)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import extension
from .. import prepack
from ..arguments import (
    MergeWeights,
    Norm,
    check_merge,
    check_merge_backward,
    flat,
    norm_form,
    norm_of,
)
from ..cpu_arguments import (
    PrepackedMerge,
    address,
    dtype_code,
    norm_kernel,
    pack_merge_rows,
    pack_rows,
    prepack_merge,
    wide_norm,
)
from ..groups import Groups
from ..library import accumulator
from ..listed import Listed, listed


class Outputs(NamedTuple):
    """What a merge writes, contiguous: ``merged [groups, d]``; in the accumulator dtype
    ``projected [tokens, r]``, ``softmax [groups, k]``, and ``poison [groups]``: 0, or NaN for a
    group that holds NaN."""

    merged: Tensor
    projected: Tensor | None = None
    softmax: Tensor | None = None
    poison: Tensor | None = None


def run(x: Tensor, groups: Listed, merge: PrepackedMerge, out: Outputs) -> None:
    """Merges flat ``x [tokens, d]``."""
    extension.load().Merge(
        isa=merge.isa,
        dtype=dtype_code(x.dtype),
        threads=torch.get_num_threads(),
        groups=groups.kernel,
        d=x.shape[1],
        r=merge.bottleneck,
        x=x.data_ptr(),
        x_stride=x.stride(0),
        norm=merge.norm_kernel,
        weight=merge.weight.data_ptr(),
        bias=merge.bias.data_ptr(),
        projection=address(merge.projection),
        merged=out.merged.data_ptr(),
        projected=address(out.projected),
        softmax=address(out.softmax),
        poison=address(out.poison),
    ).run()


def group_merge(
    x: Tensor, merge: MergeWeights, groups: Groups, norm: Norm
) -> tuple[Tensor, Tensor, Tensor]:
    check_merge(x, merge, groups, norm)
    rows, shape, wide = flat(x), groups.shape(x), accumulator(x.dtype)
    lists = listed(groups, rows.shape[0])
    merged = x.new_empty(*shape, x.shape[-1])
    softmax = x.new_empty(*shape, groups.ratio, dtype=wide)
    fresh = torch.empty if lists.covers_all else torch.zeros
    projected = fresh(*x.shape[:-1], merge.bottleneck, dtype=wide)
    out = Outputs(merged, projected if merge.bottleneck else None, softmax)
    run(rows, lists, prepack_merge(merge, norm, x.dtype, prepack.instruction_set()), out)
    return merged, projected, softmax


def merged(x: Tensor, merge: MergeWeights, groups: Groups, norm: Norm) -> Tensor:
    """The merged vectors alone, in inference: what is made of weights is kept from call to call."""
    check_merge(x, merge, groups, norm)
    rows = flat(x)
    lists = listed(groups, rows.shape[0])
    out = x.new_empty(*groups.shape(x), x.shape[-1])
    packed = prepacked(merge, norm, x.dtype, prepack.instruction_set())
    run(rows, lists, packed, Outputs(out))
    return out


def prepacked(merge: MergeWeights, norm: Norm, dtype: torch.dtype, isa: str) -> PrepackedMerge:
    """Without a projection; kept."""
    vectors = tuple(t for t in (norm.weight, norm.bias) if t is not None)

    def make(weight: Tensor, bias: Tensor, *copies: Tensor) -> PrepackedMerge:
        its = norm_of(norm, copies)
        return prepack_merge(MergeWeights(weight, bias), its, dtype, isa)

    form = ("merge", dtype, *norm_form(norm), isa)
    return prepack.cache.get((merge.weight, merge.bias, *vectors), form, make)


def known(merge: PrepackedMerge, dtype: torch.dtype, ratio: int, d: int) -> Any:
    """What the extension knows of a merge before a call; it reads ``merge``'s memory."""
    return extension.load().MergeWeights(
        dtype=dtype_code(dtype),
        k=ratio,
        d=d,
        r=merge.bottleneck,
        norm=merge.norm_kernel,
        weight=merge.weight.data_ptr(),
        bias=merge.bias.data_ptr(),
        projection=address(merge.projection),
    )


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
    rows, k, d, r = flat(x), groups.ratio, x.shape[-1], merge.bottleneck
    lists = listed(groups, rows.shape[0])
    wide, vectors = accumulator(x.dtype), wide_norm(norm, x.dtype)
    dx = (torch.empty if lists.covers_all else torch.zeros)(x.shape, dtype=x.dtype)
    d_weight = torch.empty(k, k, d, dtype=wide)  # [slot, score, d]
    d_bias = torch.empty(k, dtype=wide)
    d_projection = torch.empty(r, d, dtype=wide)
    d_norm_weight = torch.empty(0 if norm.weight is None else d, dtype=wide)
    d_norm_bias = torch.empty(0 if norm.bias is None else d, dtype=wide)
    isa, projection_rows = prepack.instruction_set(), None
    weight_rows = pack_merge_rows(merge.weight, x.dtype, isa)
    if merge.projection is not None:
        projection_rows = pack_rows(merge.projection, x.dtype, isa)
    d_merged = d_merged.to(x.dtype).contiguous()
    d_projected = d_projected.to(wide).contiguous()
    softmax = softmax.contiguous()
    extension.load().MergeBackward(
        isa=isa,
        dtype=dtype_code(x.dtype),
        threads=torch.get_num_threads(),
        groups=lists.kernel,
        d=d,
        r=r,
        x=rows.data_ptr(),
        x_stride=rows.stride(0),
        norm=norm_kernel(vectors),
        softmax=softmax.data_ptr(),
        weight_rows=weight_rows.data_ptr(),
        projection_rows=address(projection_rows),
        d_merged=d_merged.data_ptr(),
        d_projected=d_projected.data_ptr() if r else 0,
        dx=dx.data_ptr(),
        d_weight=d_weight.data_ptr(),
        d_bias=d_bias.data_ptr(),
        d_projection=d_projection.data_ptr() if r else 0,
        d_norm_weight=d_norm_weight.data_ptr() if norm.weight is not None else 0,
        d_norm_bias=d_norm_bias.data_ptr() if norm.bias is not None else 0,
    ).run()
    d_weight = d_weight.transpose(0, 1).reshape(k, k * d)
    return dx, d_weight, d_bias, d_projection, d_norm_weight, d_norm_bias
