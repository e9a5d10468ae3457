"""Products in int8 by oneDNN, through PyTorch's quantised linear op.

The op knows one scale and one zero point for all of x, so rows get theirs afterwards, in fp32, with
bias and activation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import NO_NORM, Norm
from ..fast_norm import normalize_fast
from ..feed_forward import activate
from ..row_blocks import KEPT_SIZES, blocks
from .reference import Levels, Quantised, quantise_rows

LEVELS = Levels(255, 127)
ZERO = 128
"""The zero point that the op is told: a row's own differs little where its values have both signs.
"""


class OneDnnProduct(NamedTuple):
    """A packed weight ``[in, out]``, and fp32 numbers for each output channel."""

    weight: Tensor
    scales: Tensor
    sums: Tensor
    """Of a channel's weights: what a row's zero point adds."""
    zero_points: Tensor
    bias: Tensor | None

    @classmethod
    def pack(cls, weight: Quantised, bias: Tensor | None) -> OneDnnProduct:
        """Of ``weight [out, in]`` and ``bias [out]``."""
        numbers, scales = weight.numbers.to(torch.int8).contiguous(), weight.scales
        packed = torch.ops.onednn.qlinear_prepack(numbers, None)
        zero_points = torch.zeros(len(scales), dtype=torch.int32)
        sums = numbers.sum(1) * scales
        shift = None if bias is None else bias.float()
        return cls(packed, scales, sums, zero_points, shift)

    def multiply(
        self,
        x: Tensor,
        activation: str,
        other: Tensor | None = None,
        norm: Norm = NO_NORM,
        residual: Tensor | None = None,
    ) -> Tensor:
        """``activation(norm(x) · weightᵀ + bias) [* other] [+ residual]`` for ``x [rows, in]``; in
        x's dtype."""
        x = normalize_fast(x, norm)
        y = self._multiply(x, activation, other)
        return y if residual is None else y.add_(residual)

    def _multiply(self, x: Tensor, activation: str, other: Tensor | None) -> Tensor:
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
        numbers, scales, zeros = quantise_rows(x, LEVELS.rows)
        numbers = numbers.to(torch.uint8)
        if len(x) < size:
            numbers = F.pad(numbers, (0, 0, 0, size - len(x)))
        multiply = torch.ops.onednn.qlinear_pointwise
        y = multiply(
            numbers, 1.0, ZERO, self.weight, self.scales, self.zero_points,
            None, 1.0, 0, torch.float32, "none", [], "",
        )[: len(x)]  # fmt: skip
        y.addr_(ZERO - zeros[:, 0], self.sums).mul_(scales)
        if self.bias is not None:
            y.add_(self.bias)
        if activation == "relu":
            y.relu_()
        elif activation != "none":
            y = activate(y, activation)
        return y if other is None else y.mul_(other)
