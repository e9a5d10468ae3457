"""Products of few rows in floating point by the kernel of this package (csrc/cpu/rows_linear.h).

A call of oneDNN's through PyTorch takes tens of microseconds beside the product, which few rows
notice, and knows a few numbers of rows; here any number goes, with the norm in front.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import extension
from . import prepack
from .arguments import Norm
from .cpu_arguments import address, dtype_code, norm_kernel, pack_columns, wide_norm

VECTOR = 16
"""Output channels whose biases a kernel reads at once, at most."""


MOST = {
    ("avx512_bf16", torch.bfloat16): 128,
    ("avx512_bf16", torch.float32): 64,
    ("avx512", torch.float32): 32,
    ("avx2", torch.float32): 32,
}
"""Rows up to which a product goes this way. Of T5-base's shapes on a core of Zen 4 this kernel took
0.68 to 0.87 of oneDNN's time for one row, 0.79 to 0.92 for 8, 0.87 to 1.0 for 32, 0.98 to 1.0 for
128 (fp32: 0.98 to 1.08) and 0.98 to 1.1 for 1024. AVX2 in fp32: 0.56 to 0.84, 0.84 to 0.99, 1.0 and
1.03 to 1.14."""


def takes(x: Tensor) -> bool:
    """Whether so few ``x [rows, in]`` go this way on this processor."""
    return x.shape[0] <= MOST.get((prepack.instruction_set(), x.dtype), 0)


class RowsLinear(NamedTuple):
    """Weights in panels for one instruction set and dtype, and the bias, padded."""

    isa: str
    inner: int
    outputs: int
    panels: Tensor
    bias: Tensor | None

    def __call__(
        self,
        x: Tensor,
        activation: str,
        factor: Tensor | None,
        norm: Norm,
        residual: Tensor | None,
    ) -> Tensor:
        """``activation(norm(x) · weightᵀ + bias) [* factor] [+ residual]`` for ``x [rows, in]``."""
        norm = wide_norm(norm, x.dtype)
        x = x if x.stride(1) == 1 or self.inner == 1 else x.contiguous()
        factor, residual = (None if t is None else t.contiguous() for t in (factor, residual))
        y = x.new_empty(x.shape[0], self.outputs)
        extension.load().RowsLinear(
            isa=self.isa,
            dtype=dtype_code(x.dtype),
            threads=torch.get_num_threads(),
            rows=x.shape[0],
            inner=self.inner,
            columns=self.outputs,
            x=x.data_ptr(),
            x_stride=x.stride(0),
            packed=self.panels.data_ptr(),
            bias=address(self.bias),
            activation=extension.enum_value("cpu", "ffn_activations", activation),
            norm=norm_kernel(norm),
            other=address(factor),
            residual=address(residual),
            y=y.data_ptr(),
        ).run()
        return y


def stacked(
    weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...], dtype: torch.dtype
) -> RowsLinear | None:
    """Of matrices ``[out, in]`` one below the other, with a bias or None for each, for vectors of
    ``dtype``; None where they are not finite, or every look at them would read them whole."""
    if any(map(prepack.cache.reads_much, weights)):
        return None
    isa, inner = prepack.instruction_set(), weights[0].shape[1]

    def pack(*copies: Tensor) -> RowsLinear | None:
        weight, bias = prepack.stack(copies, len(weights), biases)
        if not (weight.isfinite().all() and (bias is None or bias.isfinite().all())):
            return None
        outputs = weight.shape[0]
        if bias is not None:
            padded = torch.zeros(-(-outputs // VECTOR) * VECTOR)
            padded[:outputs] = bias
            bias = padded
        return RowsLinear(isa, inner, outputs, pack_columns(weight, dtype, isa, bf16=True), bias)

    absent = tuple(bias is None for bias in biases)
    sources = (*weights, *(bias for bias in biases if bias is not None))
    return prepack.cache.get(sources, ("rows", isa, dtype, len(weights), absent), pack)
