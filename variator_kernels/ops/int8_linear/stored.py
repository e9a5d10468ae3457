"""Weights that came in int8 (torchao's, torch.ao's): products with their numbers as they are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import prepack
from .kernels import kernel
from .packed import Int8Linear
from .reference import Quantised


class StoredWeight(NamedTuple):
    """``numbers [out, in]`` in int8; what 1 of them stands for is ``scales``, ``[1]`` or ``[out]``.

    ``dynamic``: vectors are rounded to 8 bits too before they meet it. Else it is a weight alone
    that was made small.
    """

    numbers: Tensor
    scales: Tensor
    dynamic: bool

    def part(self, first: int, last: int) -> StoredWeight:
        """Of the output channels from ``first`` to ``last``: views."""
        scales = self.scales if len(self.scales) == 1 else self.scales[first:last]
        return self._replace(numbers=self.numbers[first:last], scales=scales)


def dequantised(numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight ``[out, in]`` that they stand for, rounded once."""
    wide = torch.promote_types(dtype, torch.float32)
    return (numbers.to(wide) * scales.to(wide)[:, None]).to(dtype)


def product(
    numbers: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype, dynamic: bool,
    isa: str | None = None,
) -> Int8Linear | prepack.PackedLinear | None:  # fmt: skip
    """What multiplies with a :class:`StoredWeight` on the CPU: in int8 where it is ``dynamic`` and
    the kernel here bears its numbers; else the weight that they stand for, packed in ``dtype``.
    None where it is not finite, or ``dtype`` has no packed product."""
    found = in_int8(numbers, scales, bias, isa) if dynamic else None
    return _packed(numbers, scales, bias, dtype) if found is None else found


def bears(numbers: Tensor, isa: str | None = None) -> bool:
    """Whether the kernel here multiplies with such numbers: all that there are, or 7 bits."""
    chosen = kernel(isa)
    if chosen is None or numbers.numel() == 0:
        return False
    most = chosen.levels.weight
    return most == 127 or (int(numbers.amin()) >= -most and int(numbers.amax()) <= most)


def in_int8(
    numbers: Tensor, scales: Tensor, bias: Tensor | None, isa: str | None = None
) -> Int8Linear | None:
    """The product in int8; None where there is none, or its kernel does not bear such numbers:
    without VNNI those beyond 7 bits."""
    chosen = kernel(isa)
    # Beyond, sums would not fit into int32.
    if chosen is None or numbers.shape[1] * chosen.levels.rows * 128 >= 2**31:
        return None

    def pack(numbers: Tensor, scales: Tensor, bias: Tensor | None = None) -> Int8Linear | None:
        if not (bears(numbers, isa) and scales.isfinite().all()):
            return None
        each = scales.float().expand(len(numbers)).contiguous()
        return Int8Linear(chosen.pack(Quantised(numbers, each), bias))

    sources = (numbers, scales) if bias is None else (numbers, scales, bias)
    return prepack.cache.get(sources, ("stored int8", chosen.name), pack)


def _packed(
    numbers: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> prepack.PackedLinear | None:
    if dtype == torch.float64 or not torch.backends.mkldnn.is_available():
        return None

    def pack(
        numbers: Tensor, scales: Tensor, bias: Tensor | None = None
    ) -> prepack.PackedLinear | None:
        wide = dequantised(numbers, scales, dtype)
        bias = None if bias is None else bias.to(dtype)
        # oneDNN's activations would hide what comes of NaN and infinity.
        if not (wide.isfinite().all() and (bias is None or bias.isfinite().all())):
            return None
        return prepack.PackedLinear(torch.ops.mkldnn._reorder_linear_weight(wide), bias)

    sources = (numbers, scales) if bias is None else (numbers, scales, bias)
    return prepack.cache.get(sources, ("stored", dtype), pack)
