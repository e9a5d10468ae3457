"""A product of this package's kernels, in int8 or in floating point (csrc/cpu/sublayer.h)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import extension
from .arguments import NO_NORM, Norm
from .cpu_arguments import address, dtype_code, norm_kernel, wide_norm

VECTOR = 16
"""Output channels whose numbers a kernel reads at once, at most."""


def padded(numbers: Tensor) -> Tensor:
    """``numbers [out]`` to whole vectors."""
    count = numbers.shape[0]
    found = numbers.new_zeros(-(-count // VECTOR) * VECTOR)
    found[:count] = numbers
    return found


def multiply(
    kernel: Any,
    outputs: int,
    x: Tensor,
    activation: str = "none",
    other: Tensor | None = None,
    norm: Norm = NO_NORM,
    residual: Tensor | None = None,
) -> Tensor:
    """``activation(norm(x) · weightᵀ + bias) [* other] [+ residual]`` for ``x [rows, in]``,
    ``other`` and ``residual`` ``[rows, outputs]``; in x's dtype. ``kernel``: the extension's
    ``Linear``."""
    rows, inner = x.shape
    x = x if x.stride(1) == 1 or inner == 1 else x.contiguous()
    other = None if other is None else other.to(x.dtype).contiguous()
    residual = None if residual is None else residual.to(x.dtype).contiguous()
    norm = wide_norm(norm, x.dtype)
    y = x.new_empty(rows, outputs)
    kernel.run(
        dtype=dtype_code(x.dtype),
        threads=torch.get_num_threads(),
        rows=rows,
        x=x.data_ptr(),
        x_stride=x.stride(0),
        activation=extension.enum_value("cpu", "ffn_activations", activation),
        norm=norm_kernel(norm),
        other=address(other),
        residual=address(residual),
        y=y.data_ptr(),
    )
    return y
