"""``nn.Linear`` in int8, for layers of a model that are no part of a compressed sublayer's op."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ..frozen_linear import LEAST, FrozenLinear
from . import here, op, stored_here, torchao
from .stored import StoredWeight, in_int8


class Linear(FrozenLinear):
    """Its products run in int8 where :func:`here` says so, else as they did."""

    def forward(self, input: Tensor) -> Tensor:
        # Small ones may be somebody's adapters, and gain nothing.
        runs = input.is_cpu and self.in_features * self.out_features >= LEAST
        runs = runs and here("int8", self.training) is not None
        if not runs or not self.has_plain_weight():
            return super().forward(input)
        return op.linear(input, self.weight, self.bias)


class StoredLinear(FrozenLinear):
    """With a weight of torchao's: its numbers multiply as they are where :func:`stored_here` says
    so; else torchao does."""

    def forward(self, input: Tensor) -> Tensor:
        found = _stored(self, input, None)
        return super().forward(input) if found is None else found


class RoundedStoredLinear(FrozenLinear):
    """The same under ``precision="int8"``: vectors are rounded too where the weight alone came in
    int8."""

    def forward(self, input: Tensor) -> Tensor:
        found = _stored(self, input, "int8")
        return super().forward(input) if found is None else found


def _stored(layer: FrozenLinear, x: Tensor, precision: str | None) -> Tensor | None:
    if layer.training or not stored_here(x):
        return None
    weight = torchao.read(layer.weight)
    if isinstance(weight, str) or not weight.numbers.is_cpu:
        return None
    return _multiplied(x, weight, layer.bias, precision)


def _multiplied(
    x: Tensor, weight: StoredWeight, bias: Tensor | None, precision: str | None
) -> Tensor | None:
    """None where the layer's own module multiplies in int8, and the kernel here does not bear its
    numbers."""
    if weight.dynamic and in_int8(weight.numbers, weight.scales, bias) is None:
        return None
    return op.stored_linear(x, weight, bias, weight.dynamic or precision == "int8")


class StoredProduct(NamedTuple):
    """A linear layer whose weight came in int8: ``[..., in]`` to ``[..., out]``."""

    module: Callable[[Tensor], Tensor]
    """The layer itself, which runs where :func:`stored_here` says no."""
    weight: StoredWeight
    bias: Tensor | None

    def __call__(self, x: Tensor, precision: str | None = None) -> Tensor:
        """``precision="int8"``: vectors are rounded too, whatever the weight says."""
        if not stored_here(x, self.weight.numbers):
            return self.module(x)
        found = _multiplied(x, self.weight, self.bias, precision)
        return self.module(x) if found is None else found

    def part(self, first: int, last: int) -> StoredProduct:
        """Of the output channels from ``first`` to ``last``."""

        def module(x: Tensor) -> Tensor:
            return self.module(x)[..., first:last]

        bias = None if self.bias is None else self.bias[first:last]
        return StoredProduct(module, self.weight.part(first, last), bias)
