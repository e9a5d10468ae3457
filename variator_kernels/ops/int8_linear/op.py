"""int8_linear as a registered op: schema, fake, autograd."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import prepack
from ..arguments import require
from ..library import LIBRARY, define, refuse_second_derivatives
from ..transforms import nothing_between, refuse_transforms
from .packed import packed
from .stored import StoredWeight, dequantised, product

define(
    "int8_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? scales=None, bool dynamic=True)"
    " -> Tensor"
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` in int8; shapes, dtypes and errors are the same, under autocast too."""
    stored = prepack.result_dtype(x, weight, bias)
    if stored is None:
        return F.linear(x, weight, bias)
    x = x.to(stored)
    if nothing_between((x, weight, bias)):
        return _forward(x, weight, bias)
    return torch.ops.variator.int8_linear.default(x, weight, bias)


def stored_linear(x: Tensor, weight: StoredWeight, bias: Tensor | None, dynamic: bool) -> Tensor:
    """``x [..., in]`` times a weight that came in int8, plus ``bias [out]``: ``[..., out]`` in x's
    dtype; ``dynamic``: vectors are rounded to 8 bits too."""
    arguments = x, weight.numbers, bias, weight.scales, dynamic
    if nothing_between(arguments[:4]):
        return _forward(*arguments)
    return torch.ops.variator.int8_linear.default(*arguments)


@torch.library.impl(LIBRARY, "int8_linear", "CPU")
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scales: Tensor | None = None,
    dynamic: bool = True,
) -> Tensor:
    # Exported programs come here without the public function.
    fits = weight.dim() == 2 and x.dim() > 0 and x.shape[-1] == weight.shape[1]
    require(fits and (bias is None or bias.shape == weight.shape[:1]), "shapes as F.linear's")
    rows = x.reshape(-1, weight.shape[1])
    if scales is None:
        multiply = packed(weight, bias)
        if multiply is None:  # NaN or infinity came into the weight
            y = F.linear(rows.to(weight.dtype), weight, bias).to(x.dtype)
        else:
            y = multiply(rows)
    else:
        require(weight.dtype == torch.int8, "a weight with scales is in int8")
        require(scales.shape in ((1,), weight.shape[:1]), "a scale, or one an output channel")
        y = _stored(rows, weight, bias, scales, dynamic)
    return y.view(*x.shape[:-1], weight.shape[0])


def _stored(
    rows: Tensor, numbers: Tensor, bias: Tensor | None, scales: Tensor, dynamic: bool
) -> Tensor:
    dtype = prepack.product_dtype(rows.dtype)
    multiply = product(numbers, scales, bias, dtype, dynamic) if rows.numel() else None
    if multiply is None:  # it is not finite, or in a dtype without packed products
        bias = None if bias is None else bias.to(rows.dtype)
        return F.linear(rows, dequantised(numbers, scales, rows.dtype), bias)
    if isinstance(multiply, prepack.PackedLinear):
        return multiply(rows.to(dtype)).to(rows.dtype)
    return multiply(rows)


@torch.library.register_fake("variator::int8_linear")
def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scales: Tensor | None = None,
    dynamic: bool = True,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2], *inputs[3:4])
    ctx.bias = None if inputs[2] is None else inputs[2].dtype


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Those of the product that is not rounded; programs that were exported may ask for them."""
    refuse_second_derivatives()
    refuse_transforms((dy,))
    x, weight, scales = ctx.saved_tensors
    dx, dw, db = ctx.needs_input_grad[:3]
    if scales is not None:
        weight = dequantised(weight, scales, x.dtype)
    rows = dy.flatten(0, -2).to(weight.dtype)
    return (
        (dy.to(weight.dtype) @ weight).to(x.dtype) if dx else None,
        rows.t() @ x.flatten(0, -2).to(weight.dtype) if dw else None,
        rows.sum(0).to(ctx.bias) if db and ctx.bias is not None else None,
        None,
        None,
    )


torch.library.register_autograd(
    "variator::int8_linear", _gradients, setup_context=_setup, lib=LIBRARY
)
