"""A feed-forward sublayer without plugins in few passes, for inference on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .arguments import NO_NORM, flat
from .fast_norm import normalize_fast
from .feed_forward import FeedForward
from .fused_product import Product, runs

PIECE = 2048
"""So many tokens pass the sublayer together: what lies between its products stays in cache."""


def feed_forward(x: Tensor, ffn: FeedForward) -> Tensor | None:
    """The sublayer, norm to residual: ``x [..., d]`` to the same shape. None where it does more
    than its weights say, or :func:`fused_product.runs` does not hold: it runs as it is then."""
    if ffn.module is not None or ffn.dropout_inner > 0 or ffn.dropout_outer > 0:
        return None
    if not (ffn.pack and runs(x, (*ffn[:6], ffn.norm_weight, ffn.norm_bias))):
        return None
    rows = flat(x)
    return together(_pass(rows[first:last], ffn) for first, last in pieces(len(rows), PIECE)).view(
        x.shape
    )


def _pass(rows: Tensor, ffn: FeedForward) -> Tensor:
    norm, precision = ffn.pre_norm, ffn.precision
    h = rows
    if ffn.w_gate is not None and precision is None:  # two products read it
        h, norm = normalize_fast(rows, norm), NO_NORM
    inner = Product((ffn.w_in,), (ffn.b_in,), precision)(h, norm, ffn.activation)
    if ffn.w_gate is not None:
        inner = Product((ffn.w_gate,), (ffn.b_gate,), precision)(h, norm, factor=inner)
    residual = rows if ffn.residual else None
    y = Product((ffn.w_out,), (ffn.b_out,), precision)(inner, residual=residual)
    return normalize_fast(y, ffn.any_norm) if ffn.post_norm else y


def pieces(count: int, most: int) -> Iterator[tuple[int, int]]:
    """``count`` in a row, at most ``most`` at a time: from where to where."""
    for first in range(0, count, most):
        yield first, min(count, first + most)


def together(parts: Iterator[Tensor]) -> Tensor:
    """One below the other."""
    found = list(parts)
    return found[0] if len(found) == 1 else torch.cat(found)
