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

define("int8_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` in int8; shapes, dtypes and errors are the same, under autocast too."""
    stored = prepack.result_dtype(x, weight, bias)
    if stored is None:
        return F.linear(x, weight, bias)
    x = x.to(stored)
    if nothing_between((x, weight, bias)):
        return _forward(x, weight, bias)
    return torch.ops.variator.int8_linear.default(x, weight, bias)


@torch.library.impl(LIBRARY, "int8_linear", "CPU")
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # Exported programs come here without the public function.
    fits = weight.dim() == 2 and x.dim() > 0 and x.shape[-1] == weight.shape[1]
    require(fits and (bias is None or bias.shape == weight.shape[:1]), "shapes as F.linear's")
    rows, product = x.reshape(-1, weight.shape[1]), packed(weight, bias)
    if product is None:  # NaN or infinity came into the weight
        y = F.linear(rows.to(weight.dtype), weight, bias).to(x.dtype)
    else:
        y = product(rows)
    return y.view(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("variator::int8_linear")
def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.bias = None if inputs[2] is None else inputs[2].dtype


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Those of the product that is not rounded; programs that were exported may ask for them."""
    refuse_second_derivatives()
    refuse_transforms((dy,))
    x, weight = ctx.saved_tensors
    dx, dw, db = ctx.needs_input_grad
    rows = dy.flatten(0, -2).to(weight.dtype)
    return (
        (dy.to(weight.dtype) @ weight).to(x.dtype) if dx else None,
        rows.t() @ x.flatten(0, -2).to(weight.dtype) if dw else None,
        rows.sum(0).to(ctx.bias) if db and ctx.bias is not None else None,
    )


torch.library.register_autograd(
    "variator::int8_linear", _gradients, setup_context=_setup, lib=LIBRARY
)
