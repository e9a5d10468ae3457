"""A few values of the frozen weights, by which another checkpoint of the same shape is told apart.

Plugins reproduce the outputs of the weights that they were trained on. Shapes cannot tell a model
from its fine-tuned copy; values can, and unlike a digest they also match after a change of dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..ops.frozen_linear import is_plain_weight
from .found import Found
from .loading import ATTACHED

VALUES = 4
"""Taken of each weight matrix, evenly spaced."""
SAME = 0.005
"""Largest relative difference (root mean square) of one model in two dtypes: rounding to bfloat16
moves a value by 0.002 at most."""


def sample(found: Found, value: Callable[[Tensor], Tensor]) -> dict[str, list[float]]:
    """By the layer's number, values of its weight matrices in the order of their names.

    ``value`` of a parameter is all of it. A layer is left out whose weights are quantised, or not
    there.
    """
    taken: dict[str, list[float]] = {}
    seen: set[int] = set()
    for i, block in enumerate(found.blocks):
        if id(block) not in seen:
            seen.add(id(block))
            weights = [value(weight) for weight in _matrices(block)]
            if weights and all(map(_readable, weights)):
                values = torch.cat([spread(weight, VALUES) for weight in weights])
                taken[str(i)] = [float(f"{x:.5g}") for x in values.tolist()]
    return taken


def difference(ours: Mapping[str, Sequence[float]], theirs: Mapping[str, Sequence[float]]) -> float:
    """Relative difference of two samples (root mean square) over the layers that both have."""
    pairs = [
        (a, b)
        for layer in ours.keys() & theirs.keys()
        if len(ours[layer]) == len(theirs[layer])  # otherwise adapters or other classes are there
        for a, b in zip(ours[layer], theirs[layer], strict=True)
    ]
    apart = sum((a - b) ** 2 for a, b in pairs)
    size = sum(a * a for a, _ in pairs)
    return (apart / size) ** 0.5 if size else float(apart > 0)


def spread(weight: Tensor, count: int) -> Tensor:
    """``count`` values of ``weight``, evenly spaced in memory's order: ``[count]``, float64 on the
    CPU."""
    flat, last = weight.detach().reshape(-1), weight.numel() - 1
    # By numbers, not by an index tensor, which would be on a default device.
    return torch.stack([flat[last * i // (count + 1)] for i in range(1, count + 1)]).double().cpu()


def _matrices(block: nn.Module) -> list[Tensor]:
    named = (
        (name, weight)
        for name, weight in block.named_parameters()
        if weight.dim() == 2 and ATTACHED not in name.split(".") and ".lora_" not in name
    )
    return [weight for _, weight in sorted(named, key=lambda pair: pair[0])]


def _readable(weight: Tensor) -> bool:
    return is_plain_weight(weight) and weight.is_floating_point() and not weight.is_meta
