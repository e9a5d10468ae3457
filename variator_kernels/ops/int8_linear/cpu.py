"""Products in int8 by the kernel of this package (csrc/cpu/int8_linear.h)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import extension
from ..arguments import NO_NORM, Norm
from ..cpu_arguments import address, dtype_code, norm_kernel, wide_norm
from .reference import Quantised

VECTOR = 16
"""Output channels whose numbers a kernel reads at once, at most."""


class CpuProduct(NamedTuple):
    """A weight in panels for one instruction set; numbers of each output channel, padded."""

    isa: str
    inner: int
    outputs: int
    panels: Tensor
    sums: Tensor
    """Of a channel's numbers, in int32: what a row's zero point adds."""
    scales: Tensor
    bias: Tensor | None

    @classmethod
    def pack(cls, weight: Quantised, bias: Tensor | None, isa: str) -> CpuProduct:
        """Of ``weight [out, in]``, whose numbers the instruction set bears, and ``bias [out]``."""
        numbers, scales = weight.numbers.to(torch.int8).contiguous(), weight.scales
        outputs, inner = numbers.shape
        pack, sizes = extension.load().int8_pack, {"isa": isa, "inner": inner, "columns": outputs}
        panels = torch.empty(pack(**sizes), dtype=torch.int8)
        pack(**sizes, source=numbers.data_ptr(), packed=panels.data_ptr())
        sums = numbers.sum(1, dtype=torch.int32)
        shift = None if bias is None else _padded(bias.float())
        return cls(isa, inner, outputs, panels, _padded(sums), _padded(scales), shift)

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
        x = x if x.stride(1) == 1 or self.inner == 1 else x.contiguous()
        other, residual = (
            None if t is None else t.to(x.dtype).contiguous() for t in (other, residual)
        )
        norm = wide_norm(norm, torch.float32)
        y = x.new_empty(x.shape[0], self.outputs)
        extension.load().Int8Linear(
            isa=self.isa,
            dtype=dtype_code(x.dtype),
            threads=torch.get_num_threads(),
            rows=x.shape[0],
            inner=self.inner,
            columns=self.outputs,
            x=x.data_ptr(),
            x_stride=x.stride(0),
            packed=self.panels.data_ptr(),
            sums=self.sums.data_ptr(),
            scales=self.scales.data_ptr(),
            bias=address(self.bias),
            activation=extension.enum_value("cpu", "ffn_activations", activation),
            norm=norm_kernel(norm),
            other=address(other),
            residual=address(residual),
            y=y.data_ptr(),
        ).run()
        return y


def _padded(numbers: Tensor) -> Tensor:
    """``numbers [out]`` to whole vectors."""
    count = numbers.shape[0]
    padded = numbers.new_zeros(-(-count // VECTOR) * VECTOR)
    padded[:count] = numbers
    return padded
