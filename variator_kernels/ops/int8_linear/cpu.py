"""Products in int8 by the kernel of this package (csrc/cpu/int8_linear.h)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import extension
from ..arguments import NO_NORM, Norm
from ..cpu_arguments import address
from ..own_linear import multiply, padded
from .reference import Quantised


class CpuProduct(NamedTuple):
    """A weight in panels for one instruction set; numbers of each output channel, padded."""

    outputs: int
    panels: Tensor
    sums: Tensor
    """Of a channel's numbers, in int32: what a row's zero point adds."""
    scales: Tensor
    bias: Tensor | None
    kernel: Any
    """The extension's own ``Linear``, of these tensors' memory."""

    @classmethod
    def pack(cls, weight: Quantised, bias: Tensor | None, isa: str) -> CpuProduct:
        """Of ``weight [out, in]``, whose numbers the instruction set bears, and ``bias [out]``."""
        numbers = weight.numbers.to(torch.int8).contiguous()
        outputs, inner = numbers.shape
        pack, sizes = extension.load().int8_pack, {"isa": isa, "inner": inner, "columns": outputs}
        panels = torch.empty(pack(**sizes), dtype=torch.int8)
        pack(**sizes, source=numbers.data_ptr(), packed=panels.data_ptr())
        sums = padded(numbers.sum(1, dtype=torch.int32))
        scales = padded(weight.scales)
        shift = None if bias is None else padded(bias.float())
        kernel = extension.load().Linear(
            isa=isa,
            inner=inner,
            columns=outputs,
            packed=panels.data_ptr(),
            bias=address(shift),
            sums=sums.data_ptr(),
            scales=scales.data_ptr(),
        )
        return cls(outputs, panels, sums, scales, shift, kernel)

    def multiply(
        self,
        x: Tensor,
        activation: str,
        other: Tensor | None = None,
        norm: Norm = NO_NORM,
        residual: Tensor | None = None,
    ) -> Tensor:
        """``activation(norm(x) · weightᵀ + bias) [* other] [+ residual]`` for ``x [rows, in]``,
        ``other`` and ``residual`` ``[rows, out]``; in x's dtype."""
        return multiply(self.kernel, self.outputs, x, activation, other, norm, residual)
