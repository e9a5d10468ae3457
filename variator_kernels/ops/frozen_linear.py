"""What stands in for the class of a plain ``nn.Linear`` whose product runs otherwise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

# The last two stand for plain weights while a program is exported, and under a fake mode.
PLAIN_TENSORS = (nn.Parameter, Tensor, FakeTensor, FunctionalTensor)

LEAST = 1 << 14
"""Smaller weights (a classifier's, an adapter's) are left to PyTorch: the call costs more than it
saves."""


class FrozenLinear(nn.Linear):
    """A base: weights, keys and everything but the product are ``nn.Linear``'s."""

    def has_plain_weight(self) -> bool:
        """Whether nobody has quantised, sharded, pruned or parametrised the weight since."""
        weight: Any = self._parameters.get("weight")
        return is_plain_weight(weight) and weight.layout is torch.strided


def is_plain_weight(weight: Any) -> bool:
    """Whether it is of no subclass (quantised, sharded)."""
    return type(weight) in PLAIN_TENSORS


def is_plain_class(kind: type) -> bool:
    """Whether layers of a class are no more than a weight and a bias."""
    return kind is nn.Linear or FrozenLinear in kind.__bases__
