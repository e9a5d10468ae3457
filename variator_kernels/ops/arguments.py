"""Weights that belong together below the registered ops, and checks of their sizes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .groups import Groups


class Norm(NamedTuple):
    """The norm in front of a merge: its name, weight ``[d]`` and bias ``[d]`` (or None), eps."""

    name: str = "none"
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 0.0


NO_NORM = Norm()


def norm_of(norm: Norm, copies: Sequence[Tensor]) -> Norm:
    """The same of copies of those vectors that it has."""
    found = iter(copies)
    weight, bias = (None if t is None else next(found) for t in norm[1:3])
    return norm._replace(weight=weight, bias=bias)


def norm_form(norm: Norm) -> tuple[Hashable, ...]:
    """What there is to know but for the vectors' numbers."""
    return norm.name, norm.weight is None, norm.bias is None, norm.eps


class MergeWeights(NamedTuple):
    """W_c ``[k, k*d]`` and b_c ``[k]``; ``projection [r, d]`` is what h is multiplied with on the
    way (W_1h), if anything."""

    weight: Tensor
    bias: Tensor
    projection: Tensor | None = None

    @property
    def bottleneck(self) -> int:
        """r; 0 without a projection."""
        return 0 if self.projection is None else self.projection.shape[0]


class AdapterWeights(NamedTuple):
    """What decompresses: W_1u ``[r, d]`` (W_1's first half), b_1 ``[r]``, W_2 ``[d, r]``, b_2
    ``[d]``, and φ."""

    w1u: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    activation: str


def require(holds: bool, what: str) -> None:
    """The kernels read addresses: an op called with arguments that do not fit must not run."""
    if not holds:
        raise ValueError(f"argument does not fit: {what}")


def check_ffn(vectors: int, weights: tuple[Tensor | None, ...], norm: Norm) -> None:
    """w_in, w_out, w_gate, b_in, b_out, b_gate for ``vectors`` of that size, and a norm behind."""
    w_in, w_out, w_gate, b_in, b_out, b_gate = weights
    assert w_in is not None and w_out is not None
    d, f = vectors, w_in.shape[0]
    require(w_in.shape == (f, d), f"w_in is {list(w_in.shape)}")
    require(w_out.shape == (d, f), f"w_out is {list(w_out.shape)}")
    require(w_gate is None or w_gate.shape == (f, d), "w_gate's shape")
    for vector, size in ((b_in, f), (b_out, d), (b_gate, f), (norm.weight, d), (norm.bias, d)):
        require(vector is None or vector.shape == (size,), "a bias or norm vector's shape")


def flat(x: Tensor) -> Tensor:
    """``[tokens, d]`` with unit inner stride; a view where the memory allows it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] <= 1 else rows.contiguous()


def check_merge(x: Tensor, merge: MergeWeights, groups: Groups, norm: Norm) -> None:
    """Every vector and matrix is of the sizes that ``x`` and the groups ask for."""
    k, d = groups.ratio, x.shape[-1]
    require(merge.weight.shape == (k, k * d), f"weight is {list(merge.weight.shape)}")
    require(merge.bias.shape == (k,), f"bias is {list(merge.bias.shape)}")
    require(merge.projection is None or merge.projection.shape[1] == d, "projection's columns")
    for vector in (norm.weight, norm.bias):
        require(vector is None or vector.shape == (d,), "norm weight or bias")


def check_merge_backward(
    d_merged: Tensor, d_projected: Tensor, softmax: Tensor, x: Tensor, merge: MergeWeights,
    groups: Groups,
) -> None:  # fmt: skip
    """What the forward made, and gradients of its shapes."""
    shape, rows = groups.shape(x), (*x.shape[:-1], merge.bottleneck)
    require(d_projected.shape == rows, f"d_projected is {list(d_projected.shape)}")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    require(softmax.dtype == wide, f"softmax is {softmax.dtype}")
    require(softmax.shape == (*shape, groups.ratio), f"softmax is {list(softmax.shape)}")
    require(d_merged.shape == (*shape, x.shape[-1]), f"d_merged is {list(d_merged.shape)}")


def check_decompress(u: Tensor, projected: Tensor, adapter: AdapterWeights, groups: Groups) -> None:
    """u ``[.., G, d]`` and the adapter's matrices for ``projected [.., r]``."""
    d, r = u.shape[-1], projected.shape[-1]
    count = 1
    for size in groups.shape(projected):
        count *= size
    require(u.numel() == count * d, f"u is {list(u.shape)}")
    check_adapter(adapter, d, r)


def check_adapter(adapter: AdapterWeights, d: int, r: int) -> None:
    """For hidden size ``d`` and bottleneck ``r``."""
    require(adapter.w1u.shape == (r, d), f"w1u is {list(adapter.w1u.shape)}")
    require(adapter.b1.shape == (r,), f"b1 is {list(adapter.b1.shape)}")
    require(adapter.w2.shape == (d, r), f"w2 is {list(adapter.w2.shape)}")
    require(adapter.b2.shape == (d,), f"b2 is {list(adapter.b2.shape)}")
