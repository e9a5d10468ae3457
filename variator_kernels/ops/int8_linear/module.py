"""``nn.Linear`` in int8, for layers of a model that are no part of a compressed sublayer's op."""

from __future__ import annotations

from torch import Tensor

from ..frozen_linear import LEAST, FrozenLinear
from . import here, op


class Linear(FrozenLinear):
    """Its products run in int8 where :func:`here` says so, else as they did."""

    def forward(self, input: Tensor) -> Tensor:
        # Small ones may be somebody's adapters, and gain nothing.
        runs = input.is_cpu and self.in_features * self.out_features >= LEAST
        runs = runs and here("int8", self.training) is not None
        if not runs or not self.has_plain_weight():
            return super().forward(input)
        return op.linear(input, self.weight, self.bias)
