"""Which neurons of an FFN stay where the last product is fitted anew to those that do."""

from __future__ import annotations

import torch
from torch import Tensor

PARTS = 64
"""The share of the neurons that goes before all that is left is looked at again,"""
POOL = 4
"""and times as many as go are looked at while they go one after another."""
RIDGE = 1e-4
"""Of the mean second moment."""


def survivors(moments: Tensor, weight: Tensor, size: int) -> Tensor:
    """The indices of the ``size`` neurons that stay, ascending.

    Optimal Brain Surgeon for whole neurons: without neuron j, when the other columns of the last
    matrix take over what they can, the output loses ``|w_j|² / (H⁻¹)_jj`` of its second moment. The
    cheapest goes, the others' columns and H⁻¹ become what they are without it, and so on. One after
    another: of two that say the same the second is no longer cheap when the first has gone.

    Args:
        moments: ``[f, f]`` float64, H: the second moments of what the last matrix reads.
        weight: ``[out, f]`` float64: that matrix.
    """
    f = len(moments)
    inverse = moments.clone()
    inverse.diagonal().add_(RIDGE * moments.diagonal().mean().clamp_min(1e-30))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(inverse))
    left = torch.arange(f, device=moments.device)
    while len(left) > size:
        count = min(max(1, f // PARTS), len(left) - size)
        order = (weight.square().sum(0) / inverse.diagonal()).argsort(stable=True)
        pool = order[: POOL * count]
        gone = pool[_cheapest(inverse[pool][:, pool], weight[:, pool], count)]
        stays = torch.ones(len(left), dtype=torch.bool, device=left.device)
        stays[gone] = False
        kept = stays.nonzero()[:, 0]
        shared = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, kept])
        weight = weight[:, kept] - weight[:, gone] @ shared
        inverse = inverse[kept][:, kept] - inverse[kept][:, gone] @ shared
        left = left[kept]
    return left


def _cheapest(inverse: Tensor, weight: Tensor, count: int) -> list[int]:
    """Which of a pool go, one after another."""
    inverse, weight = inverse.clone(), weight.clone()
    gone: list[int] = []
    for _ in range(count):
        losses = weight.square().sum(0) / inverse.diagonal()
        losses[gone] = torch.inf
        place = int(losses.argmin())
        share = inverse[place] / inverse[place, place]
        weight -= weight[:, place, None] * share
        inverse -= inverse[:, place, None] * share
        gone.append(place)
    return gone
