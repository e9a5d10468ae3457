"""Weights in the layout of the int8 kernel, kept from call to call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import prepack
from ..arguments import Norm
from .kernels import kernel


class Int8Linear(NamedTuple):
    """:class:`prepack.PackedLinear` in int8: the same methods, for any floating dtype and any
    number of rows."""

    product: Any

    def __call__(self, x: Tensor, activation: str = "none") -> Tensor:
        """``activation(x · weightᵀ + bias)`` for ``x [rows, in]``, in x's dtype."""
        return self._multiply(x, activation, None)

    def block(self, x: Tensor, activation: str = "none") -> Tensor:
        return self._multiply(x, activation, None)

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """``(x · weightᵀ + bias) * other``."""
        return self._multiply(x, "none", other)

    def fused(
        self,
        x: Tensor,
        activation: str,
        factor: Tensor | None,
        norm: Norm,
        residual: Tensor | None,
    ) -> Tensor:
        """``activation(norm(x) · weightᵀ + bias) [* factor] [+ residual]``; not in fp64."""
        return self.product.multiply(x, activation, factor, norm, residual)

    def _multiply(self, x: Tensor, activation: str, other: Tensor | None) -> Tensor:
        if x.dtype != torch.float64:
            return self.product.multiply(x, activation, other)
        other = None if other is None else other.float()
        return self.product.multiply(x.float(), activation, other).double()


def packed(weight: Tensor, bias: Tensor | None, isa: str | None = None) -> Int8Linear | None:
    """The packed form of ``weight [out, in]`` and ``bias [out]`` for the kernels of ``isa`` (None:
    those in use); None where the weight is not finite, or so long that sums could overflow, or
    nothing multiplies in int8 here."""
    return stacked((weight,), (bias,), isa)


def stacked(
    weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...], isa: str | None = None
) -> Int8Linear | None:
    """The same of matrices one below the other, with a bias or None for each."""
    chosen, inner = kernel(isa), weights[0].shape[1]
    if chosen is None or any(weight.numel() == 0 for weight in weights):
        return None
    # Beyond, sums would not fit into int32.
    if inner * chosen.levels.rows * chosen.levels.weight >= 2**31:
        return None

    def pack(*copies: Tensor) -> Int8Linear | None:
        weight, bias = prepack.stack(copies, len(weights), biases)
        if not weight.isfinite().all():
            return None
        return Int8Linear(chosen.round_and_pack(weight, bias))

    absent = tuple(bias is None for bias in biases)
    sources = (*weights, *(bias for bias in biases if bias is not None))
    return prepack.cache.get(sources, ("int8", chosen.name, len(weights), absent), pack)
