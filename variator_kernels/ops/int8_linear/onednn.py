"""Products in int8 by oneDNN, through PyTorch's quantised linear op.

The op knows one scale for all of x, so rows get theirs afterwards, in fp32, with bias and
activation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..feed_forward import activate
from ..row_blocks import KEPT_SIZES, blocks
from .reference import LEAST, Levels, quantise

ZERO = 128
"""What stands for 0 in rows of uint8. oneDNN takes int8 too, but makes it uint8 on the way."""


class OneDnnProduct(NamedTuple):
    """A packed weight ``[in, out]``, and fp32 numbers for each output channel."""

    weight: Tensor
    scales: Tensor
    zero_points: Tensor
    bias: Tensor | None
    levels: int
    """Of rows of x."""

    @classmethod
    def pack(cls, weight: Tensor, bias: Tensor | None, levels: Levels) -> OneDnnProduct:
        """Of ``weight [out, in]``, finite, and ``bias [out]``."""
        numbers, scales = quantise(weight, levels.weight)
        packed = torch.ops.onednn.qlinear_prepack(numbers.to(torch.int8).contiguous(), None)
        zero_points = torch.zeros(len(scales), dtype=torch.int32)
        return cls(packed, scales, zero_points, None if bias is None else bias.float(), levels.rows)

    def multiply(self, x: Tensor, activation: str, other: Tensor | None = None) -> Tensor:
        """``activation(x · weightᵀ + bias) [* other]`` for ``x [rows, in]``; in x's dtype."""
        count = x.shape[0]
        if count in KEPT_SIZES:
            return self._block(x, count, activation, other).to(x.dtype)
        y = x.new_empty(count, len(self.scales))
        # oneDNN compiles a product for each number of rows.
        for first, rows, size in blocks(count):
            part = slice(first, first + rows)
            factor = None if other is None else other[part]
            y[part] = self._block(x[part], size, activation, factor)
        return y

    def _block(self, x: Tensor, size: int, activation: str, other: Tensor | None) -> Tensor:
        """The same in fp32, of a product of ``size`` rows."""
        numbers, scales = _quantised(x.float(), self.levels)
        padded = F.pad(numbers, (0, 0, 0, size - len(x)))
        multiply = torch.ops.onednn.qlinear_pointwise
        y = multiply(
            padded, 1.0, ZERO, self.weight, self.scales, self.zero_points,
            None, 1.0, 0, torch.float32, "none", [], "",
        )[: len(x)]  # fmt: skip
        y.mul_(scales[:, None])
        if self.bias is not None:
            y.add_(self.bias)
        if activation == "relu":
            y.relu_()
        elif activation != "none":
            y = activate(y, activation)
        return y if other is None else y.mul_(other)


def _quantised(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """:func:`reference.quantise` of ``x [rows, in]``, in fewer passes: the numbers plus
    :data:`ZERO`. Those of rows that are not finite are any; their scales are NaN."""
    largest = x.abs().amax(1)
    counts = largest > LEAST
    factor = torch.where(counts, levels / largest, 0)
    scales = torch.where(counts, largest / levels, 0)
    scales = torch.where(largest.isfinite(), scales, torch.nan)
    return (x * factor[:, None]).round_().add_(ZERO).to(torch.uint8), scales
