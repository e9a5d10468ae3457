"""A feed-forward sublayer without plugins in few passes, for inference on the CPU. In a compiled
graph it is a registered op, which has no gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import extension
from . import own_products, prepack
from .arguments import NO_NORM, check_ffn, flat, norm_form, norm_of
from .cpu_arguments import dtype_code, norm_kernel, wide_norm
from .fast_norm import in_one_pass, normalize_fast
from .feed_forward import FeedForward
from .fused_product import Product, runs
from .library import LIBRARY, define
from .transforms import graphing

PIECE = 2048
"""So many tokens pass the sublayer together: what lies between its products stays in cache."""
_FIELDS = (*FeedForward._fields[:13], "precision")
define(
    "feed_forward(Tensor x, Tensor w_in, Tensor w_out, Tensor? w_gate, Tensor? b_in, Tensor? b_out,"
    " Tensor? b_gate, str activation, str norm, Tensor? norm_weight, Tensor? norm_bias, float eps,"
    " bool post_norm, bool residual, str? precision) -> Tensor"
)


def feed_forward(x: Tensor, ffn: FeedForward) -> Tensor | None:
    """The sublayer, norm to residual: ``x [..., d]`` to the same shape. None where it does more
    than its weights say, or :func:`fused_product.runs` does not hold: it runs as it is then."""
    if ffn.module is not None or ffn.dropout_inner > 0 or ffn.dropout_outer > 0:
        return None
    if not (ffn.pack and runs(x, (*ffn[:6], ffn.norm_weight, ffn.norm_bias))):
        return None
    return _node(x, ffn) if graphing() else _in_few_passes(x, ffn)


def _in_few_passes(x: Tensor, ffn: FeedForward) -> Tensor:
    rows, whole = flat(x), _whole(x, ffn)
    if whole is not None:
        return run(whole, rows).view(x.shape)
    return together(_pass(rows[first:last], ffn) for first, last in pieces(len(rows), PIECE)).view(
        x.shape
    )


def _node(x: Tensor, ffn: FeedForward) -> Tensor:
    return torch.ops.variator.feed_forward.default(x, *(getattr(ffn, name) for name in _FIELDS))


@torch.library.impl(LIBRARY, "feed_forward", "CPU")
def _forward(x: Tensor, *arguments: Any) -> Tensor:
    return _in_few_passes(x, FeedForward(**dict(zip(_FIELDS, arguments, strict=True))))


@torch.library.register_fake("variator::feed_forward")
def _fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


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


def _whole(x: Tensor, ffn: FeedForward) -> own_products.Own | None:
    """What runs the sublayer; None where a product is not this package's own."""
    dtype, d, isa = x.dtype, x.shape[-1], prepack.instruction_set()
    norm = NO_NORM if ffn.norm == "none" else ffn.any_norm
    vectors = tuple(t for t in (norm.weight, norm.bias) if t is not None)
    if ffn.precision is None:
        if not own_products.takes((x.numel() // d,), own_products.weights(ffn), dtype, isa):
            return None
        # PyTorch's norm goes in front of two products.
        front = ffn.pre_norm
        if ffn.w_gate is not None and front is not NO_NORM and not in_one_pass(front, dtype):
            return None

    def make(*copies: Tensor) -> own_products.Own | None:
        check_ffn(d, ffn[:6], norm)
        products = own_products.products(ffn, dtype, isa)
        if products is None:
            return None
        its = wide_norm(norm_of(norm, copies[len(copies) - len(vectors) :]), dtype)
        kernel = extension.load().DenseFfn(
            isa=isa,
            dtype=dtype_code(dtype),
            products=products.kernel,
            norm=norm_kernel(NO_NORM if ffn.post_norm else its),
            behind=norm_kernel(its if ffn.post_norm else NO_NORM),
            residual=ffn.residual,
        )
        return own_products.Own(kernel, its, products)

    form = "dense", dtype, d, *norm_form(norm), ffn.post_norm, isa, *own_products.form(ffn)
    return prepack.cache.get((*own_products.sources(ffn), *vectors), form, make)


def run(whole: own_products.Own, rows: Tensor) -> Tensor:
    """An object that reads and gives ``rows [T, d]``."""
    rows = rows.contiguous()  # as residuals are
    y = torch.empty_like(rows)
    whole.kernel.run(
        threads=torch.get_num_threads(),
        rows=rows.shape[0],
        x=rows.data_ptr(),
        x_stride=rows.stride(0),
        y=y.data_ptr(),
    )
    return y


def pieces(count: int, most: int) -> Iterator[tuple[int, int]]:
    """``count`` in a row, at most ``most`` at a time: from where to where."""
    for first in range(0, count, most):
        yield first, min(count, first + most)


def together(parts: Iterator[Tensor]) -> Tensor:
    """One below the other."""
    found = list(parts)
    return found[0] if len(found) == 1 else torch.cat(found)
