"""Sublayers whose products are all this package's own: the extension runs such a one in one call
(csrc/cpu/sublayer.h)."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

from .. import extension
from . import prepack, rows_linear
from .feed_forward import FeedForward
from .int8_linear import packed as int8
from .int8_linear import stored
from .int8_linear.cpu import CpuProduct

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Own:
    """An object of the extension and what it reads by address.

    No tuple: what it holds is counted where it is packed, and shared by all ratios.
    """

    __slots__ = ("held", "kernel")

    def __init__(self, kernel: Any, *held: Any) -> None:
        self.kernel = kernel
        self.held = held


def stacked(
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    precision: str | None,
    dtype: torch.dtype,
    isa: str,
) -> Any:
    """What is packed of matrices one below the other, perhaps another library's; None where one is
    not finite."""
    if precision == "int8":
        return int8.stacked(weights, biases, isa)
    return rows_linear.stacked(weights, biases, dtype, isa)


def linear(found: Any) -> Any:
    """The extension's ``Linear`` of what is packed; None of other libraries' products."""
    product = found.product if isinstance(found, int8.Int8Linear) else found
    return product.kernel if isinstance(product, (CpuProduct, rows_linear.RowsLinear)) else None


def takes(rows: Iterable[int], weights: Iterable[Tensor], dtype: torch.dtype, isa: str) -> bool:
    """Whether floating products of these numbers of rows are this package's own, unless a weight is
    not finite."""
    if not all(rows_linear.takes(count, dtype, isa) for count in rows):
        return False
    return not any(map(prepack.cache.reads_much, weights))


def weights(ffn: FeedForward) -> Iterable[Tensor]:
    return (w for w in ffn[:3] if w is not None)


def sources(ffn: FeedForward) -> tuple[Tensor, ...]:
    """Of which :func:`products` makes something."""
    return tuple(t for t in (*ffn[:6], *ffn.scales) if t is not None)


def form(ffn: FeedForward) -> tuple[Hashable, ...]:
    """What else it depends on, but for dtype and instruction set."""
    absent = tuple(t is None for t in (*ffn[2:6], *ffn.scales))
    return absent, ffn.activation, ffn.precision, ffn.residual


def products(ffn: FeedForward, dtype: torch.dtype, isa: str) -> Own | None:
    """Of vectors of ``dtype``, with the kernels of ``isa``; None where a product is another
    library's, or none (a weight is not finite)."""
    each = tuple(zip(ffn[:3], ffn[3:6], ffn.scales, strict=True))

    def packed(weight: Tensor | None, bias: Tensor | None, scales: Tensor | None) -> Any:
        if weight is None:
            return None
        if scales is not None:
            return stored.in_int8(weight, scales, bias, isa)
        return stacked((weight,), (bias,), ffn.precision, dtype, isa)

    found = [packed(*one) for one in each]
    kernels = [linear(one) for one in found]
    if any(kernel is None and w is not None for kernel, w in zip(kernels, ffn[:3], strict=True)):
        return None
    w_in, w_out, w_gate = kernels
    activation = extension.enum_value("cpu", "ffn_activations", ffn.activation)
    made = extension.load().FfnProducts(
        w_in=w_in, w_out=w_out, w_gate=w_gate, activation=activation
    )
    return Own(made, found)
