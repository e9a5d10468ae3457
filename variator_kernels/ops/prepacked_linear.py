"""``F.linear`` on the CPU in the dtype of :func:`prepack.product_dtype`, with packed weights.

PyTorch packs a weight anew in each call of ``F.linear``, and under autocast converts it too. The
base model's weights do not change while plugins train or are calibrated, so their packed forms
serve every step: in the teacher, in the student and, transposed, in the student's backward pass.
Where the processor lacks a dtype's product, frozen weights are packed in fp32 outside of that too.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import extension
from . import prepack, rows_linear
from .frozen_linear import LEAST, FrozenLinear, is_plain_class
from .transforms import is_plain, tracing, transformed


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
    ``forward`` that somebody else replaced, and what PyTorch has an error for are left alone.
    Packed weights stay until they are forgotten, see :class:`prepack.PackCache`. A copy of the
    model made meanwhile keeps the replacements.
    """

    def __init__(self, model: nn.Module, ignored: Iterable[Tensor] = ()) -> None:
        left = {id(weight) for weight in ignored}
        self.layers = [
            (layer, Forward(layer))  # made once: compiled code would notice new ones
            for layer in model.modules()
            if isinstance(layer, nn.Linear)
            and is_plain_class(type(layer))
            and id(layer.weight) not in left
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


def shares() -> bool:
    """Whether this thread is inside :class:`FrozenProducts`: its products use oneDNN's packed
    forms, and whoever takes them too needs no other."""
    return _local.packed


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``, shapes, dtypes and errors alike, with a fast product.

    Frozen weights are packed inside :class:`FrozenProducts`, and wherever the product runs in
    another dtype than ``F.linear``'s. Weights that get gradients are converted in each call.
    """
    plain = not transformed() and all(is_plain(t) for t in (x, weight, bias) if t is not None)
    packs = plain and _local.packed
    if not (packs or prepack.EMULATED):
        return F.linear(x, weight, bias)
    stored = prepack.result_dtype(x, weight, bias)
    if stored is None:
        return F.linear(x, weight, bias)
    dtype = prepack.product_dtype(stored)
    packs = packs or (plain and dtype != stored and extension.load() is not None)
    if packs and _stays(weight, bias):
        packed = prepack.linear(weight, bias, dtype)
        if packed is not None:
            rows = x.reshape(-1, weight.shape[1])
            if rows.requires_grad and torch.is_grad_enabled():
                y = _Product.apply(rows, weight, packed, stored, dtype, False)
            else:
                y = packed(rows.to(dtype)).to(stored)
            # A view made in the Function itself would refuse in-place operations on it.
            return y.view(*x.shape[:-1], weight.shape[0])
    return _converted(x, weight, bias, stored)


def packed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`linear` with a packed weight wherever nothing gets a gradient: for inference, where
    the caller knows that the weight serves many calls."""
    given = [t for t in (x, weight, bias) if t is not None]
    plain = not transformed() and all(map(is_plain, given))
    if not plain or (torch.is_grad_enabled() and any(t.requires_grad for t in given)):
        return linear(x, weight, bias)
    stored = prepack.result_dtype(x, weight, bias)
    if stored is None or weight.numel() < LEAST or extension.load() is None:
        return linear(x, weight, bias)
    rows = x.reshape(-1, weight.shape[1])
    dtype, isa = prepack.product_dtype(stored, rows.shape[0]), prepack.instruction_set()
    own = None
    if not shares() and stored == weight.dtype and rows_linear.takes_any(len(rows), stored, isa):
        own = rows_linear.stacked((weight,), (bias,), stored, isa)
    multiply = own or prepack.linear(weight, bias, dtype, rows.shape[0])
    if multiply is None:
        return linear(x, weight, bias)
    y = multiply(rows.to(dtype if own is None else stored)).to(stored)
    return y.view(*x.shape[:-1], weight.shape[0])


def _few() -> int:
    return 0 if torch.cpu._is_avx512_supported() else 4


FEW = _few()
"""So few vectors go faster through weights as they are than through packed ones. With AVX2 alone
``F.linear`` made 17, 35 and 51 GFLOP/s of 8, 16 and 32 vectors where packed weights made 30, 51 and
69 (Zen 3, T5-base's shapes). With AVX-512 (Zen 4, one core, 768 to 3072 numbers) it took 184, 304
and 810 us of 1, 8 and 32 vectors of bf16 where packed weights took 86, 193 and 691; in fp32 171,
706 and 2164 against 168, 380 and 1574. With AMX (384 to 1536 numbers, bf16) 435, 292 and 402 us
against 225, 127 and 304."""


class Linear(FrozenLinear):
    """Its weight is packed in inference: the same numbers but for their rounding."""

    def forward(self, input: Tensor) -> Tensor:
        few = not tracing() and input.numel() <= FEW * self.in_features
        if few or self.training or not self.has_plain_weight():
            return super().forward(input)
        return packed(input, self.weight, self.bias)


def unpacked(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`linear` that keeps nothing from call to call."""
    stored = prepack.result_dtype(x, weight, bias) if prepack.EMULATED else None
    if stored is None:
        return F.linear(x, weight, bias)
    return _converted(x, weight, bias, stored)


def _converted(x: Tensor, weight: Tensor, bias: Tensor | None, stored: torch.dtype) -> Tensor:
    """``F.linear`` by the product of another dtype, where that of ``stored`` is so slow that
    converting the weight in each call pays."""
    dtype = prepack.product_dtype(stored)
    if dtype == stored or not _repays(x, stored):
        return F.linear(x, weight, bias)
    with torch.autocast("cpu", enabled=False):
        wide_bias = None if bias is None else bias.to(dtype)
        return F.linear(x.to(dtype), weight.to(dtype), wide_bias).to(stored)


def _repays(x: Tensor, stored: torch.dtype) -> bool:
    """Whether the faster product of ``x [..., in]`` saves more than converting a weight costs."""
    if stored != torch.bfloat16 or not prepack.NARROW_ROWS:  # there is no product in it at all
        return True
    compiled = torch.compiler.is_compiling() or tracing()  # where sizes are not looked at
    return not compiled and x.numel() >= prepack.WORTH_READING * x.shape[-1]


def _stays(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a packed form would serve more calls than this one."""
    trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    if trains and torch.is_grad_enabled():
        return False
    return type(weight) is nn.Parameter and weight.numel() >= LEAST


class _Product(torch.autograd.Function):
    """A product with a frozen ``weight``, packed in ``dtype``; its gradient is the other one."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        packed: prepack.PackedLinear | None,
        stored: torch.dtype,
        dtype: torch.dtype,
        transposed: bool,
    ) -> Tensor:
        ctx.save_for_backward(weight)  # notices writes in between
        ctx.settings = rows.dtype, dtype, not transposed
        rows = rows.to(dtype)
        if packed is None:  # NaN or infinity came into the weight
            wide = weight.to(dtype)
            return (rows @ (wide if transposed else wide.t())).to(stored)
        return packed(rows).to(stored)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        stored, dtype, transposed = ctx.settings
        packed = (
            prepack.transposed(weight, dtype) if transposed else prepack.linear(weight, None, dtype)
        )
        dx = _Product.apply(dy, weight, packed, stored, dtype, transposed)
        return dx, None, None, None, None, None
