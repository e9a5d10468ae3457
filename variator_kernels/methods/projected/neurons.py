"""Which neurons of an FFN stay where the last product is fitted anew to those that do."""

from __future__ import annotations

import torch
from torch import Tensor

PARTS = 64
"""The share of the neurons that goes before what is left is looked at again."""
RIDGE = 1e-4
"""Of the mean second moment."""


def survivors(moments: Tensor, weight: Tensor, size: int) -> Tensor:
    """The indices of the ``size`` neurons that stay, ascending.

    Optimal Brain Surgeon for whole neurons: without neuron j, when the other columns of the last
    matrix take over what they can, the output loses ``|w_j|² / (H⁻¹)_jj`` of its second moment. The
    cheapest go, the others' columns and H⁻¹ become what they are without them, and so on.

    Args:
        moments: ``[f, f]`` float64, H: the second moments of what the last matrix reads.
        weight: ``[out, f]`` float64: that matrix.
    """
    f = len(moments)
    ridge = RIDGE * moments.diagonal().mean().clamp_min(1e-30)
    inverse = torch.linalg.inv(moments + ridge * torch.eye(f, dtype=moments.dtype).to(moments))
    left = torch.arange(f, device=moments.device)
    while len(left) > size:
        losses = weight.square().sum(0) / inverse.diagonal()
        count = min(max(1, f // PARTS), len(left) - size)
        order = losses.argsort(stable=True)
        gone, kept = order[:count], order[count:].sort().values
        shared = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, kept])
        weight = weight[:, kept] - weight[:, gone] @ shared
        inverse = inverse[kept][:, kept] - inverse[kept][:, gone] @ shared
        left = left[kept]
    return left
