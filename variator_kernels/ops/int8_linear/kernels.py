"""Which kernel multiplies in int8 on this processor, and why."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import extension
from .onednn import OneDnnProduct
from .reference import Levels, int8_linear

_LIMITS_WITHOUT_VNNI = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE")


class Kernel(NamedTuple):
    """``pack(weight, bias, levels)`` makes a product with a method ``multiply(x, activation,
    other=None)``; ``levels(in)`` says how x and weight are rounded where they meet in sums of
    ``in`` terms."""

    name: str
    pack: Callable[[Tensor, Tensor | None, Levels], Any]
    levels: Callable[[int], Levels]
    description: str


class Choice(NamedTuple):
    """The kernel, or None and why there is none."""

    kernel: Kernel | None
    why_none: str = ""


def _has_vnni() -> bool:
    """Whether oneDNN sums four products of 8 bits in 32; PyTorch asks the processor alone."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA", "")
    return torch.cpu._is_vnni_supported() and limit.strip().upper() not in _LIMITS_WITHOUT_VNNI


def _onednn() -> Kernel:
    if _has_vnni():
        levels, how = Levels(127, 127), "oneDNN with VNNI"
    else:
        # Sums of two products saturate at 16 bits there: 2 · 255 · 64 fits.
        levels = Levels(127, 64)
        how = "oneDNN without VNNI, whose sums bear weights of 7 bits"
    return Kernel(f"oneDNN {levels}", OneDnnProduct.pack, lambda _: levels, how)


def is_exact(kernel: Kernel) -> bool:
    """Whether the largest numbers that there are come out right."""
    inner, sign = 64, torch.tensor([1.0, -1.0])
    levels = kernel.levels(inner)
    x = sign[:, None].expand(2, inner).contiguous()
    weight = x.repeat(16, 1)
    found = kernel.pack(weight, None, levels).multiply(x, "none").double()
    truth = int8_linear(x, weight, levels=levels)
    return bool((found - truth).abs().max() <= 1e-4 * inner)


@functools.cache
def choice() -> Choice:
    """What runs here."""
    if extension.load() is None:
        return Choice(None, "the CPU kernels are missing, which notice that a weight has changed")
    x86 = torch.cpu._is_avx2_supported()
    if not (x86 and torch.backends.mkldnn.is_available()):
        return Choice(None, "PyTorch has no int8 product for this processor")
    kernel = _onednn()
    with torch.inference_mode():
        exact = is_exact(kernel)
    return Choice(kernel) if exact else Choice(None, f"{kernel.description}, is not exact here")


def kernel() -> Kernel | None:
    """What multiplies in int8 here; None: nothing does."""
    return choice().kernel


def describe() -> str:
    """What runs, or why nothing does, in words."""
    found, why = choice()
    return f"none: {why}" if found is None else found.description
