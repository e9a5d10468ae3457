"""What stands in for the class of a plain ``nn.Linear`` whose product runs otherwise."""

from __future__ import annotations

import torch
from torch import nn

LEAST = 1 << 14
"""Smaller weights (a classifier's, an adapter's) are left to PyTorch: the call costs more than it
saves."""


class FrozenLinear(nn.Linear):
    """A base: weights, keys and everything but the product are ``nn.Linear``'s."""

    def has_plain_weight(self) -> bool:
        """Whether nobody has quantised, sharded, pruned or parametrised the weight since."""
        weight = self._parameters.get("weight")
        return type(weight) is nn.Parameter and weight.layout is torch.strided


def is_plain_class(kind: type) -> bool:
    """Whether layers of a class are no more than a weight and a bias."""
    return kind is nn.Linear or FrozenLinear in kind.__bases__
