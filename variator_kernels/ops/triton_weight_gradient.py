"""The launch of triton_kernels/weight_sums.py: weight gradients of both ops."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..triton_kernels import launch
from ..triton_kernels.weight_sums import weight_sums_kernel
from .arguments import NO_NORM, Norm
from .gpu_arguments import GpuGroups


class Sums(NamedTuple):
    """In fp32: ``b`` ``[r, d]``; ``scores`` ``[k (slot), k (score), d]``; ``a`` ``[d]``."""

    b: Tensor
    scores: Tensor
    a: Tensor


class Statistics(NamedTuple):
    """Mean and reciprocal deviation by slot, ``[groups, K2]`` fp32; None without a norm."""

    mean: Tensor | None = None
    rstd: Tensor | None = None


NO_STATISTICS = Statistics()


def weight_sums(
    a: Tensor,
    groups: GpuGroups,
    b: Tensor | None,
    *,
    norm: Norm = NO_NORM,
    statistics: Statistics = NO_STATISTICS,
    scores: Tensor | None = None,
    columns: bool = False,
) -> Sums:
    """``Σ b ⊗ norm(a)`` over the tokens of flat ``a [tokens, d]``, ``b [tokens, r]``.

    Also ``Σ scores ⊗ norm(a)`` for ``scores [groups, K2]``, and with ``columns`` the sum of ``a``;
    what is not asked for is empty.
    """
    k, d = groups.ratio, a.shape[1]
    k2, r = launch.power_of_2(k), 0 if b is None else b.shape[1]
    case = launch.case(a, d, k, launch.tiles(a.shape[0]), r=launch.bottleneck(r))
    row = launch.settings("weight_sums", **case)
    br = min(row["br"], launch.bottleneck(r))
    pieces = max(1, launch.cdiv(r, br))
    across = launch.cdiv(d, row["bd"])
    tiles = launch.cdiv(groups.total, row["bg"])
    shares = max(1, min(tiles, row["programs"] * launch.processors(a) // (across * k * pieces)))
    tiles_a_share = launch.cdiv(tiles, shares)
    parts = shares * k

    def part(*shape: int) -> Tensor:
        return a.new_empty(parts, *shape, dtype=torch.float32)

    sum_b, sum_scores = part(r, d), part(k if scores is not None else 0, d)
    sum_a = part(d if columns else 0)
    weight_sums_kernel[(across, k * pieces, shares)](
        a, norm.weight, norm.bias, *statistics, b, scores,
        *groups.pointers, sum_b, sum_scores, sum_a,
        *groups.sizes, d, a.stride(0), tiles_a_share,
        K=k, K2=k2, C=max(16, k2), BG=row["bg"], BD=row["bd"], R=r, BR=br,
        NORM=norm.name, FORM=groups.form, COLUMNS=columns, PRECISION=launch.precision(a),
        **launch.options(row),
    )  # fmt: skip
    by_slot = sum_scores.view(shares, k, *sum_scores.shape[1:]).sum(0)
    return Sums(sum_b.sum(0), by_slot, sum_a.sum(0))
