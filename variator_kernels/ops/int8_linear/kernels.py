"""Which kernel multiplies in int8 on this processor, and why."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import extension
from .. import prepack
from .cpu import CpuProduct
from .onednn import OneDnnProduct
from .reference import Levels, int8_linear

_LIMITS_WITHOUT_VNNI = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE")


class Kernel(NamedTuple):
    """``pack(weight, bias, levels)`` makes a product with a method ``multiply(x, activation,
    other=None)``; ``levels`` says how x and weight are rounded."""

    name: str
    pack: Callable[[Tensor, Tensor | None, Levels], Any]
    levels: Levels
    description: str


class Choice(NamedTuple):
    """The kernel, or None and why there is none."""

    kernel: Kernel | None
    why_none: str = ""


def _has_vnni() -> bool:
    """Whether oneDNN sums four products of 8 bits in 32; PyTorch asks the processor alone."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA", "")
    return torch.cpu._is_vnni_supported() and limit.strip().upper() not in _LIMITS_WITHOUT_VNNI


def onednn() -> Kernel:
    """oneDNN's, for processors that sum four products in 32 bits (VNNI, AMX)."""
    return Kernel("oneDNN", OneDnnProduct.pack, Levels(255, 127), "oneDNN with VNNI")


def own(isa: str) -> Kernel:
    """That of this package for an instruction set; ``avx512_bf16`` sums four products in 32 bits
    (VNNI). Without, weights have 7 bits, because sums of two products saturate at 16 bits (2 · 255
    · 64 fits)."""
    levels = Levels(255, extension.load().int8_weight_levels(isa))
    pack = functools.partial(CpuProduct.pack, isa=isa)
    return Kernel(f"own {isa}", pack, levels, f"kernel for {isa}, weights of -{levels.weight} to "
                  f"{levels.weight}")  # fmt: skip


def is_exact(kernel: Kernel) -> bool:
    """Whether the largest numbers that there are come out right, in all sizes of a kernel's tiles
    and beside them."""
    inner, sign = 67, torch.tensor([1.0, -1.0, 0.5])
    weight = sign[:, None].expand(3, inner).repeat(29, 1)[:85]
    product = kernel.pack(weight, None, kernel.levels)
    for rows in range(1, 14):
        x = sign[:, None].expand(3, inner).repeat(5, 1)[:rows]
        truth = int8_linear(x, weight, levels=kernel.levels)
        if not (product.multiply(x, "none").double() - truth).abs().max() <= 1e-4 * inner:
            return False
    return True


def choice() -> Choice:
    """What runs here; another instruction set may be chosen at any time."""
    if extension.load() is None:
        return Choice(None, "the CPU kernels are missing")
    return _choice(prepack.instruction_set())


@functools.cache
def _choice(isa: str) -> Choice:
    if isa == "portable":
        return Choice(None, "products of fp32 are faster on the portable kernels")
    ways = [own(isa)]
    # Where ours has that instruction too, it is the faster: rows are rounded, and sums scaled, by
    # the thread that multiplies them.
    narrow = ways[0].levels.weight < 127
    if narrow and _has_vnni() and torch.backends.mkldnn.is_available():
        ways.insert(0, onednn())
    # It may be asked while a trace is made, or under autocast: these are of the asking thread.
    with ThreadPoolExecutor(1) as thread:
        for kernel in ways:
            if thread.submit(is_exact, kernel).result():
                return Choice(kernel)
    return Choice(None, f"{ways[-1].description}, is not exact here")


def kernel() -> Kernel | None:
    """What multiplies in int8 here; None: nothing does."""
    return choice().kernel


def describe() -> str:
    """What runs, or why nothing does, in words."""
    found, why = choice()
    return f"none: {why}" if found is None else found.description
