"""Products with frozen weights while plugins are made on the CPU: packed once, both directions.

PyTorch packs a weight anew in each call of ``F.linear``, and under autocast converts it too. The
base model's weights do not change while plugins train or are calibrated, so their packed forms
serve every step: in the teacher, in the student and, transposed, in the student's backward pass.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import prepack

LEAST = 1 << 14
"""Smaller weights (a classifier's) are left to PyTorch: the call costs more than it saves."""


class _Local(threading.local):
    def __init__(self) -> None:
        self.packed = False


_local = _Local()


class Forward:
    """The ``forward`` of a layer while its products are packed: the layer is what it was."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer

    def __call__(self, input: Tensor) -> Tensor:
        return linear(input, self.layer.weight, self.layer.bias)


class FrozenProducts:
    """While active, frozen weights on the CPU multiply in their packed forms.

    That holds for the ``nn.Linear`` layers of ``model``, whose ``forward`` is replaced meanwhile (a
    mode of PyTorch's would cost every function of a step some Python), and for :func:`linear`, in
    this thread. Weights that get gradients in a pass, those in ``ignored``, compiled code, a
    ``forward`` that somebody else replaced, and what PyTorch has an error for are left alone. There
    are no second derivatives. Packed weights stay until they are forgotten, see
    :class:`packing.PackCache`. A copy of the model made meanwhile keeps the replacements.
    """

    def __init__(self, model: nn.Module, ignored: Iterable[Tensor] = ()) -> None:
        left = {id(weight) for weight in ignored}
        self.layers = [
            (layer, Forward(layer))  # made once: compiled code would notice new ones
            for layer in model.modules()
            if type(layer) is nn.Linear and id(layer.weight) not in left
        ]
        self.entered: list[tuple[bool, list[tuple[nn.Linear, Forward]]]] = []

    def __enter__(self) -> None:
        free = [pair for pair in self.layers if "forward" not in vars(pair[0])]
        self.entered.append((_local.packed, free))
        _local.packed = True
        for layer, forward in free:
            vars(layer)["forward"] = forward

    def __exit__(self, *_: Any) -> None:
        _local.packed, replaced = self.entered.pop()
        for layer, forward in replaced:
            if vars(layer).get("forward") is forward:
                del vars(layer)["forward"]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``, with a packed weight inside :class:`FrozenProducts`."""
    if torch.compiler.is_compiling() or not _local.packed:
        return F.linear(x, weight, bias)
    dtype = _product_dtype(x, weight, bias)
    packed = None if dtype is None else prepack.linear(weight, bias, dtype)
    if dtype is None or packed is None:
        return F.linear(x, weight, bias)
    rows = x.to(dtype).reshape(-1, weight.shape[1])
    if rows.requires_grad and torch.is_grad_enabled():
        y = _Product.apply(rows, weight, packed)
    else:
        y = packed(rows)
    # A view made in the Function itself would refuse in-place operations on it.
    return y.view(*x.shape[:-1], weight.shape[0])


def _product_dtype(x: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype | None:
    """What the product runs in; None: it is PyTorch's."""
    trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    if trains and torch.is_grad_enabled():
        return None
    if type(weight) is not nn.Parameter or weight.numel() < LEAST:
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
    return dtype if prepack.half_products(dtype) else None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, packed: prepack.PackedLinear) -> Tensor:
        ctx.save_for_backward(weight)  # notices writes in between
        return packed(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        transposed = prepack.transposed(weight, dy.dtype)
        dx = dy @ weight.to(dy.dtype) if transposed is None else transposed(dy)
        return dx, None, None
