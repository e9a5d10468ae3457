"""Weights in the layout of the int8 kernel, kept from call to call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import prepack
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

    def _multiply(self, x: Tensor, activation: str, other: Tensor | None) -> Tensor:
        if x.dtype != torch.float64:
            return self.product.multiply(x, activation, other)
        other = None if other is None else other.float()
        return self.product.multiply(x.float(), activation, other).double()


def packed(weight: Tensor, bias: Tensor | None) -> Int8Linear | None:
    """The packed form of ``weight [out, in]`` and ``bias [out]`` on the CPU; None where the weight
    is not finite, or so long that sums could overflow, or nothing multiplies in int8 here."""
    chosen = kernel()
    if chosen is None or weight.numel() == 0:
        return None
    # Beyond, sums would not fit into int32.
    if weight.shape[1] * chosen.levels.rows * chosen.levels.weight >= 2**31:
        return None

    def pack(weight: Tensor, bias: Tensor | None = None) -> Int8Linear | None:
        if not weight.isfinite().all():
            return None
        return Int8Linear(chosen.round_and_pack(weight, bias))

    sources = (weight,) if bias is None else (weight, bias)
    return prepack.cache.get(sources, ("int8", chosen.name), pack)
