"""A frozen product together with what stands around it, for inference on the CPU.

A norm in front, an activation, a factor (a gate) and a residual behind: in int8 all in one pass
over the vectors; in floating point the norm is a pass, and oneDNN applies the rest to its sums.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import extension
from . import prepack, rows_linear
from .arguments import NO_NORM, Norm
from .fast_norm import normalize_fast
from .feed_forward import activate, autocasts
from .int8_linear import packed as int8
from .prepacked_linear import FEW
from .transforms import graphing, is_plain, transformed

PACKED = (torch.float32, torch.bfloat16, torch.float16)


def runs(x: Tensor, tensors: Iterable[Tensor | None]) -> bool:
    """Whether the products of these weights, norms and biases with ``x`` go this way: memory of one
    dtype, and nobody asks for a gradient or looks on. In a graph, where a registered op can stand
    for them, it is what it will be of."""
    if not (x.is_cpu and x.dtype in PACKED and x.numel() > 0 and (graphing() or is_plain(x))):
        return False
    if transformed() or autocasts(x) or not extension.built():
        return False
    derives = torch.is_grad_enabled()
    if derives and x.requires_grad:
        return False
    for t in tensors:
        if t is not None and (
            type(t) not in (Tensor, torch.nn.Parameter)
            or t.dtype != x.dtype
            or not t.is_cpu
            or (derives and t.requires_grad)
        ):
            return False
    return True


class Product(NamedTuple):
    """Matrices ``[out, in]`` that multiply the same vectors, one below the other, and a bias (or
    None) of each. More than one are packed as one, so vectors are read once for all."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    precision: str | None = None

    def __call__(
        self,
        rows: Tensor,
        norm: Norm = NO_NORM,
        activation: str = "none",
        factor: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """``activation(norm(rows) · weightᵀ + bias) [* factor] [+ residual]`` for ``rows [T, in]``
        of which :func:`runs` holds; ``factor`` and ``residual`` are ``[T, out]``."""
        if self.precision == "int8":
            quantised = int8.stacked(self.weights, self.biases)
            if quantised is not None:
                return quantised.fused(rows, activation, factor, norm, residual)
        isa = prepack.instruction_set()
        if rows_linear.takes(rows.shape[0], rows.dtype, isa):
            few = rows_linear.stacked(self.weights, self.biases, rows.dtype, isa)
            if few is not None:
                return few(rows, activation, factor, norm, residual)
        h, dtype = normalize_fast(rows, norm), prepack.product_dtype(rows.dtype, rows.shape[0])
        packed = None
        if rows.shape[0] > FEW:
            packed = prepack.stacked(self.weights, self.biases, dtype, rows.shape[0])
        if packed is None:  # NaN or infinity came into a weight, or so few rows are not worth it
            y = torch.cat([_linear(h, *one, dtype) for one in zip(*self[:2], strict=True)], -1)
            y = y if activation == "none" else activate(y, activation)
            y = y if factor is None else y * factor
            return y if residual is None else y + residual
        if dtype == rows.dtype:
            return packed(h, activation, factor, residual)
        y = packed(h.to(dtype), activation, None if factor is None else factor.to(dtype))
        y = y.to(rows.dtype)
        return y if residual is None else y.add_(residual)


def _linear(h: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    if dtype == h.dtype:
        return F.linear(h, weight, bias)
    wide = None if bias is None else bias.to(dtype)
    return F.linear(h.to(dtype), weight.to(dtype), wide).to(h.dtype)
