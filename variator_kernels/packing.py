"""Weights in the layout that products read fast: packed once, again when the weight changes."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from . import extension


class PackCache:
    """Packed forms by source tensor; an entry lives as long as its tensor.

    A source counts as unchanged while its address, dtype, shape and version counter are the same
    and a sample of its memory reads the same: writes through ``.data`` do not count up versions.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref, dict[Hashable, tuple[tuple, Any]]]] = {}

    def get(self, source: Tensor, kind: Hashable, make: Callable[[], Any]) -> Any:
        """The packed form ``kind`` of ``source``, from ``make()`` if there is none yet."""
        if source.is_inference():
            return make()  # an inference tensor counts no versions
        state = _state(source)
        key = id(source)
        entry = self._entries.get(key)
        if entry is None or entry[0]() is not source:
            entry = (weakref.ref(source, functools.partial(self._forget, key)), {})
            self._entries[key] = entry
        forms = entry[1]
        found = forms.get(kind)
        if found is None or found[0] != state:
            found = (state, make())
            for stale in [name for name, form in forms.items() if form[0] != state]:
                del forms[stale]
            forms[kind] = found
        return found[1]

    def _forget(self, key: int, _: weakref.ref) -> None:
        self._entries.pop(key, None)


def _state(source: Tensor) -> tuple:
    size = source.numel() * source.element_size()
    sample = extension.load().fingerprint(source.data_ptr(), size) if source.is_contiguous() else 0
    return source.data_ptr(), source.dtype, tuple(source.shape), source._version, sample


cache = PackCache()


@functools.cache
def half_products(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies ``dtype`` natively on this processor."""
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return dtype == torch.float32


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which products with a weight of ``dtype`` run: its own, or fp32."""
    return dtype if half_products(dtype) or dtype == torch.float64 else torch.float32


def packed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none"
) -> Tensor:
    """``activation(x · weightᵀ + bias)`` with the weight packed for oneDNN; no autograd.

    ``x [rows, in]``, ``weight [out, in]``; ``activation`` is ``"none"``, ``"relu"``, ``"gelu"``,
    ``"gelu_tanh"`` or ``"silu"``. The result has :func:`product_dtype` of the weight.
    """
    packed, bias = _packed(weight, bias)
    x = x.to(product_dtype(weight.dtype))
    op, algorithm = _POST_OPS[activation]
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, op, [], algorithm)


def packed_linear_times(x: Tensor, other: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``(x · weightᵀ + bias) * other``, the gate of a gated FFN, in one product."""
    packed, bias = _packed(weight, bias)
    x = x.to(product_dtype(weight.dtype))
    return torch.ops.mkldnn._linear_pointwise.binary(x, other, packed, bias, "mul")


_POST_OPS = {
    "none": ("none", ""),
    "relu": ("relu", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "silu": ("swish", ""),
}


def _packed(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    dtype = product_dtype(weight.dtype)
    reorder = torch.ops.mkldnn._reorder_linear_weight

    def make() -> Tensor:
        return reorder(weight.detach().to(dtype).contiguous())

    packed = cache.get(weight, "linear", make)
    return packed, None if bias is None else bias.detach().to(dtype)


def can_pack(weight: Tensor) -> bool:
    """Whether :func:`packed_linear` takes this weight.

    Not fp64, and not NaN or infinity: oneDNN's activations would hide what comes of them.
    """
    if weight.dtype == torch.float64 or not torch.backends.mkldnn.is_available():
        return False
    return cache.get(weight, "finite", lambda: bool(torch.isfinite(weight).all()))


def instruction_set() -> str:
    """The kernels' instruction set in use: panels are made for one of them."""
    return extension.load().active_isa()
