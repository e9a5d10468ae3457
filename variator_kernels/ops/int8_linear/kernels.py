"""Which kernel multiplies in int8 on this processor, and why."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import environment, extension
from .. import prepack
from .cpu import CpuProduct
from .onednn import LEVELS, OneDnnProduct
from .reference import Levels, Quantised, int8_linear, quantise


class Kernel(NamedTuple):
    """``pack(weight, bias)`` makes a product with a method ``multiply(x, activation,
    other=None)``; ``levels`` says how x and weight are rounded."""

    name: str
    pack: Callable[[Quantised, Tensor | None], Any]
    levels: Levels
    description: str

    def round_and_pack(self, weight: Tensor, bias: Tensor | None) -> Any:
        """Of ``weight [out, in]``, finite, and ``bias [out]``."""
        return self.pack(quantise(weight, self.levels.weight), bias)


class Choice(NamedTuple):
    """The kernel, or None and why there is none."""

    kernel: Kernel | None
    why_none: str = ""


def _has_vnni() -> bool:
    """Whether oneDNN sums four products of 8 bits in 32; PyTorch asks the processor alone."""
    return torch.cpu._is_vnni_supported() and environment.onednn_allows("vnni")


def onednn() -> Kernel:
    """oneDNN's, for processors that sum four products in 32 bits (VNNI, AMX)."""
    return Kernel("oneDNN", OneDnnProduct.pack, LEVELS, "oneDNN with VNNI")


def own(isa: str) -> Kernel:
    """That of this package for an instruction set; from ``avx512_vnni`` on four products are
    summed in 32 bits (VNNI, AMX). Without, weights have 7 bits, because sums of two products
    saturate at 16 bits (2 · 255 · 64 fits)."""
    levels = Levels(255, extension.load().int8_weight_levels(isa))
    pack = functools.partial(CpuProduct.pack, isa=isa)
    return Kernel(f"own {isa}", pack, levels, f"kernel for {isa}, weights of -{levels.weight} to "
                  f"{levels.weight}")  # fmt: skip


def is_exact(kernel: Kernel) -> bool:
    """Whether the largest numbers that there are come out right, in all sizes of a kernel's tiles
    and beside them."""
    inner, sign = 67, torch.tensor([1.0, -1.0, 0.5])
    for columns in (70, 85, 100):
        weight = sign[:, None].expand(3, inner).repeat(34, 1)[:columns]
        product = kernel.round_and_pack(weight, None)
        for rows in (*range(1, 14), 17, 33, 70):
            x = sign[:, None].expand(3, inner).repeat(24, 1)[:rows]
            truth = int8_linear(x, weight, levels=kernel.levels)
            if not (product.multiply(x, "none").double() - truth).abs().max() <= 1e-4 * inner:
                return False
    return True


def choice(isa: str | None = None) -> Choice:
    """What runs here, with the kernels of ``isa``; None: of those in use, which may change at any
    time."""
    if extension.load() is None:
        return Choice(None, "the CPU kernels are missing")
    return _choice(isa or prepack.instruction_set())


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


def kernel(isa: str | None = None) -> Kernel | None:
    """What multiplies in int8 here, as :func:`choice` says; None: nothing does."""
    return choice(isa).kernel


def describe_stored() -> str:
    """What runs of weights that came in int8, in words."""
    chosen = kernel()
    runs = "those with activations in int8 "
    if chosen is None:
        runs += "as modules"
    else:
        runs += "as they are"
        runs += "" if chosen.levels.weight == 127 else " if they have 7 bits, else as modules"
    return (
        f"torchao's and torch.ao's int8 weights without groups and zero points: {runs}; weights "
        "alone packed in the model's own dtype"
    )


def describe() -> str:
    """What runs, or why nothing does, in words."""
    found, why = choice()
    return f"none: {why}" if found is None else found.description
