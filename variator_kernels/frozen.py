"""Products with frozen weights while plugins train on the CPU: packed once, for both directions.

PyTorch packs a weight anew in each call of ``F.linear``, and under autocast converts it too. The
base model's weights do not change while plugins train, so their packed forms serve every step: in
the teacher, in the student and, transposed, in the student's backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from . import packing

LEAST = 1 << 14
"""Smaller weights (a classifier's) are left to PyTorch: the call costs more than it saves."""


class FrozenProducts(TorchFunctionMode):
    """While active, ``F.linear`` of a frozen weight on the CPU runs on its packed form.

    Weights that get gradients, those in ``ignored``, compiled code, and what PyTorch has an error
    for are left alone. Not for gradient checkpointing: a mode is off in the backward pass, so what
    runs again there would not match. There are no second derivatives.
    """

    def __init__(self, ignored: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.ignored = {id(weight) for weight in ignored}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.linear or torch.compiler.is_compiling():
            return func(*args, **kwargs)
        return self._linear(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        dtype = None if id(weight) in self.ignored else _product_dtype(input, weight, bias)
        packed = None if dtype is None else packing.linear(weight, bias, dtype)
        if dtype is None or packed is None:
            return F.linear(input, weight, bias)
        rows = input.to(dtype).reshape(-1, weight.shape[1])
        # A view made in the Function itself would refuse in-place operations on it.
        return _Product.apply(rows, weight, packed).view(*input.shape[:-1], weight.shape[0])


def _product_dtype(x: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype | None:
    """What the product runs in; None: it is PyTorch's."""
    frozen = type(weight) is nn.Parameter and not weight.requires_grad
    if not frozen or (bias is not None and bias.requires_grad) or weight.numel() < LEAST:
        return None
    if not (x.is_cpu and weight.is_cpu and x.is_floating_point() and x.numel() > 0):
        return None
    fits = weight.dim() == 2 and x.dim() > 0 and x.shape[-1] == weight.shape[1]
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        return None
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype("cpu")
    elif x.dtype == weight.dtype:
        dtype = x.dtype
    else:
        return None
    return dtype if packing.half_products(dtype) else None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, packed: packing.PackedLinear) -> Tensor:
        ctx.save_for_backward(weight)  # notices writes in between
        return packed(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        transposed = packing.transposed(weight, dy.dtype)
        dx = dy @ weight.to(dy.dtype) if transposed is None else transposed(dy)
        return dx, None, None
