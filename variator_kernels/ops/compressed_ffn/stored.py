"""An FFN whose weights came in int8: all of them, in one way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import prepack
from ..feed_forward import FeedForward
from ..int8_linear import stored


def holds(ffn: FeedForward) -> bool:
    return ffn.w_in.dtype == torch.int8


def as_it_runs(ffn: FeedForward, precision: str | None) -> FeedForward | None:
    """In int8 where the weights are for that, or ``precision`` asks for it, and the kernel here
    bears their numbers. Where it does not: weights alone that came in int8 run packed; None for the
    others, whose own modules multiply in int8."""
    if ffn.precision is None and precision is None:
        return ffn
    if all(w is None or stored.in_int8(w, scales, b) for w, b, scales in _products_of(ffn)):
        return ffn._replace(precision="int8")
    return ffn if ffn.precision is None else None


def packed(ffn: FeedForward, dtype: torch.dtype, isa: str) -> list[Any]:
    """What multiplies in the place of ``w_in``, ``w_out``, ``w_gate``, for vectors of ``dtype``,
    with the kernels of ``isa``; None where nothing does."""
    dynamic, dtype = ffn.precision == "int8", prepack.product_dtype(dtype)
    return [
        None if w is None else stored.product(w, scales, b, dtype, dynamic, isa)
        for w, b, scales in _products_of(ffn)
    ]


def dequantised(ffn: FeedForward, dtype: torch.dtype) -> FeedForward:
    """The sublayer with the weights in ``dtype`` that those in int8 stand for; others as it is."""
    if not holds(ffn):
        return ffn
    weights = [
        None if w is None else stored.dequantised(w, scales, dtype)
        for w, _, scales in _products_of(ffn)
    ]
    biases = [None if b is None else b.to(dtype) for b in ffn[3:6]]
    return FeedForward._make([*weights, *biases, *ffn[6:]])


def _products_of(ffn: FeedForward) -> list[tuple[Tensor | None, Tensor | None, Any]]:
    """Weight, bias and scales of each product."""
    return list(zip(ffn[:3], ffn[3:6], ffn.scales, strict=True))
