"""What every kernel backend checks the same way before it reads addresses."""

from __future__ import annotations

from torch import Tensor


def require(holds: bool, what: str) -> None:
    """The kernels read addresses: an op called with arguments that do not fit must not run."""
    if not holds:
        raise ValueError(f"argument does not fit: {what}")


def flat(x: Tensor) -> Tensor:
    """``[tokens, d]`` with unit inner stride; a view where the memory allows it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] <= 1 else rows.contiguous()


def check_merge(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    projection: Tensor | None,
    k: int,
) -> None:
    """W_c ``[k, k*d]``, norm vectors ``[d]``, projection ``[r, d]``."""
    d = x.shape[-1]
    require(weight.shape == (k, k * d), f"weight is {list(weight.shape)}")
    require(projection is None or projection.shape[1] == d, "projection's columns")
    for vector in (norm_weight, norm_bias):
        require(vector is None or vector.shape == (d,), "norm weight or bias")


def check_merge_backward(
    d_merged: Tensor, x: Tensor, weights: Tensor, weight: Tensor, groups: int
) -> None:
    """What the forward of ``groups`` groups made, and gradients of its shapes."""
    k, d = weights.shape[-1], x.shape[-1]
    require(weights.numel() == groups * k, f"weights are {list(weights.shape)}")
    require(d_merged.numel() == groups * d, f"d_merged is {list(d_merged.shape)}")
    require(weight.shape == (k, k * d), f"weight is {list(weight.shape)}")


def check_decompress(
    u: Tensor, projected: Tensor, w1u: Tensor, b1: Tensor, w2: Tensor, groups: int
) -> None:
    """u ``[groups, d]``, W_1u ``[r, d]``, b_1 ``[r]``, W_2 ``[d, r]`` for ``projected [.., r]``."""
    d, r = u.shape[-1], projected.shape[-1]
    require(u.numel() == groups * d, f"u is {list(u.shape)}")
    require(w1u.shape == (r, d), f"w1u is {list(w1u.shape)}")
    require(b1.shape == (r,), f"b1 is {list(b1.shape)}")
    require(w2.shape == (d, r), f"w2 is {list(w2.shape)}")
