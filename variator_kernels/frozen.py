"""Products with frozen weights while plugins train on the CPU: packed once, for both directions.

PyTorch packs a weight anew in each call of ``F.linear``, and under autocast converts it too. The
base model's weights do not change while plugins train, so their packed forms serve every step: in
the teacher, in the student and, transposed, in the student's backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import packing

LEAST = 1 << 14
"""Smaller weights (a classifier's) are left to PyTorch: the call costs more than it saves."""


class FrozenProducts(TorchFunctionMode):
    """While active, ``F.linear`` of a frozen weight on the CPU runs on its packed form.

    Everything else, and weights that get gradients, are left alone. Not for gradient checkpointing:
    a mode is off in the backward pass, so what it runs again would not match.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return _linear(*args, **kwargs)
        return func(*args, **kwargs)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    dtype = _product_dtype(input, weight, bias)
    forward = None if dtype is None else packing.linear(weight, bias, dtype)
    if dtype is None or forward is None:
        return F.linear(input, weight, bias)
    return _Product.apply(input.to(dtype), weight, forward)


def _product_dtype(x: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype | None:
    """What the product runs in; None: it is PyTorch's."""
    frozen = type(weight) is nn.Parameter and not weight.requires_grad
    if not frozen or (bias is not None and bias.requires_grad) or weight.numel() < LEAST:
        return None
    if not (x.is_cpu and weight.is_cpu and x.numel() > 0):
        return None
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype("cpu")
    elif x.dtype == weight.dtype:
        dtype = x.dtype
    else:
        return None  # PyTorch has an error for it
    return dtype if packing.half_products(dtype) else None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, packed: packing.PackedLinear) -> Tensor:
        ctx.save_for_backward(weight)  # notices writes in between
        return packed(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        (weight,) = ctx.saved_tensors
        transposed = packing.transposed(weight, dy.dtype)
        rows = dy.reshape(-1, dy.shape[-1])
        dx = rows @ weight.to(dy.dtype) if transposed is None else transposed(rows)
        return dx.view(*dy.shape[:-1], weight.shape[1]), None, None
