"""Products in floating point by the kernel of this package (csrc/cpu/rows_linear.h).

A call of oneDNN's through PyTorch takes tens of microseconds beside the product, which few rows
notice, and knows a few numbers of rows; here any number goes, with the norm in front. With AVX2
alone this kernel is the faster one for many rows too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import extension
from . import prepack
from .arguments import NO_NORM, Norm
from .cpu_arguments import address, pack_columns
from .own_linear import multiply, padded

ANY = 1 << 62
MOST = {
    ("amx", torch.bfloat16): 256,
    ("amx", torch.float32): 32,
    ("avx512_bf16", torch.bfloat16): 128,
    ("avx512_bf16", torch.float32): 64,
    ("avx512_vnni", torch.float32): 32,
    ("avx512_vnni", torch.bfloat16): ANY,
    ("avx512", torch.float32): 32,
    ("avx512", torch.bfloat16): ANY,
    ("avx2", torch.float32): ANY,
}
"""Rows up to which a product goes this way. ``python -m bench.products`` compares this kernel with
oneDNN's; its table for AVX2 is in docs/kernels.md. Of T5-base's shapes on a core of Zen 4 it took
0.68 to 0.87 of oneDNN's time for one row, 0.79 to 0.92 for 8, 0.87 to 1.0 for 32, 0.98 to 1.0 for
128 (fp32: 0.98 to 1.08) and 0.98 to 1.1 for 1024. Without the instruction for pairs, or where it is
slow, vectors of bf16 are widened on the way: 111 to 155 GFLOP/s of 32 to 4,096 rows on a core of
Sapphire Rapids, where oneDNN made 83 to 87 in bf16, and 108 to 167 in fp32 beside converting the
vectors. In AMX's tiles it took 0.83 to 0.95 of oneDNN's time for 64 rows of bf16, 0.94 to 1.08 for
128, 0.98 to 1.15 for 256 and 1.04 to 1.28 for 1024."""


def takes_any(rows: int, dtype: torch.dtype, isa: str) -> bool:
    """Whether products of every number of rows from this one on go this way: one packed form then
    serves all."""
    return takes(rows, dtype, isa) and takes(ANY, dtype, isa)


def takes(rows: int, dtype: torch.dtype, isa: str) -> bool:
    """Whether a product of so many rows goes this way with this instruction set."""
    return rows <= MOST.get((isa, dtype), 0) and not prepack.narrow(rows, dtype)


class RowsLinear(NamedTuple):
    """Weights in panels for one instruction set and dtype, and the bias, padded."""

    outputs: int
    panels: Tensor
    bias: Tensor | None
    kernel: Any
    """The extension's own ``Linear``, of these tensors' memory."""

    def __call__(
        self,
        x: Tensor,
        activation: str = "none",
        factor: Tensor | None = None,
        norm: Norm = NO_NORM,
        residual: Tensor | None = None,
    ) -> Tensor:
        """``activation(norm(x) · weightᵀ + bias) [* factor] [+ residual]`` for ``x [rows, in]``."""
        return multiply(self.kernel, self.outputs, x, activation, factor, norm, residual)


def stacked(
    weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...], dtype: torch.dtype, isa: str
) -> RowsLinear | None:
    """Of matrices ``[out, in]`` one below the other, with a bias or None for each, for vectors of
    ``dtype``; None where they are not finite, or every look at them would read them whole."""
    if any(map(prepack.cache.reads_much, weights)):
        return None
    inner = weights[0].shape[1]

    def pack(*copies: Tensor) -> RowsLinear | None:
        weight, bias = prepack.stack(copies, len(weights), biases)
        if not (weight.isfinite().all() and (bias is None or bias.isfinite().all())):
            return None
        outputs, shift = weight.shape[0], None if bias is None else padded(bias.float())
        panels = pack_columns(weight, dtype, isa, bf16=True)
        kernel = extension.load().Linear(
            isa=isa,
            inner=inner,
            columns=outputs,
            packed=panels.data_ptr(),
            bias=address(shift),
        )
        return RowsLinear(outputs, panels, shift, kernel)

    absent = tuple(bias is None for bias in biases)
    sources = (*weights, *(bias for bias in biases if bias is not None))
    return prepack.cache.get(sources, ("rows", isa, dtype, len(weights), absent), pack)
