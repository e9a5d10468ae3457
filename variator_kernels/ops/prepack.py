"""Weights in the layout that products read fast: packed once, again when the weight changes."""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import extension


class _Entry(NamedTuple):
    sources: tuple[weakref.ref, ...]
    state: tuple
    forms: dict[Hashable, Any]


class PackCache:
    """Packed forms by source tensors; an entry lives as long as all of them.

    A source counts as unchanged while its address, dtype, shape and version counter are the same
    and its memory reads the same, of more than 16 KiB a sample: writes through ``.data`` do not
    count up versions.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[int, ...], _Entry] = {}

    def get(self, sources: tuple[Tensor, ...], kind: Hashable, make: Callable[[], Any]) -> Any:
        """The packed form ``kind`` of ``sources``, from ``make()`` if there is none yet.

        What ``make`` returns must not hold a source itself, or it would live for ever.
        """
        if any(source.is_inference() for source in sources):
            return make()  # an inference tensor counts no versions
        key = tuple(map(id, sources))
        state = _state(sources)
        entry = self._entries.get(key)
        if entry is None or entry.state != state or not _alive(entry, sources):
            forget = functools.partial(self._forget, key)
            entry = _Entry(tuple(weakref.ref(source, forget) for source in sources), state, {})
            self._entries[key] = entry
        if kind not in entry.forms:
            entry.forms[kind] = make()
        return entry.forms[kind]

    def forget(self, sources: Iterable[Tensor]) -> None:
        """Free what is made of any of ``sources``; it is made again when it is asked for."""
        gone = set(map(id, sources))
        for key in [key for key in list(self._entries) if gone.intersection(key)]:
            self._entries.pop(key, None)

    def nbytes(self, sources: Iterable[Tensor]) -> int:
        """Memory of what is made of each of ``sources`` alone: a weight's packed forms."""
        entries = (self._entries.get((id(source),)) for source in sources)
        forms = [form for entry in entries if entry for form in entry.forms.values()]
        return sum(t.numel() * t.element_size() for t in forms if isinstance(t, Tensor))

    def _forget(self, key: tuple[int, ...], _: weakref.ref) -> None:
        self._entries.pop(key, None)


def _alive(entry: _Entry, sources: tuple[Tensor, ...]) -> bool:
    return all(ref() is source for ref, source in zip(entry.sources, sources, strict=True))


def _state(sources: tuple[Tensor, ...]) -> tuple:
    read = [(t.data_ptr(), t.nbytes) for t in sources if t.is_contiguous()]
    sample = extension.load().fingerprint(read)
    return sample, [(t.data_ptr(), t.dtype, t.shape, t._version) for t in sources]


cache = PackCache()


def _emulated() -> frozenset[torch.dtype]:
    """The 16-bit dtypes in which oneDNN has no product of its own on this processor.

    PyTorch's check follows ``ONEDNN_MAX_CPU_ISA``, but is content with AVX-512. Without the bf16
    instructions oneDNN widens there on the way, and takes four times as long as in fp32.
    """
    if not torch.backends.mkldnn.is_available():
        return frozenset()
    bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if torch.cpu._is_avx512_supported():
        limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA", "")
        allowed = limit.strip().upper() not in ("AVX512_CORE", "AVX512_CORE_VNNI")
        bf16 = bf16 and allowed and torch.cpu._is_avx512_bf16_supported()
    fp16 = torch.ops.mkldnn._is_mkldnn_fp16_supported()
    native = {torch.bfloat16: bf16, torch.float16: fp16}
    return frozenset(dtype for dtype, has in native.items() if not has)


EMULATED = _emulated()


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the CPU multiplies what is stored in ``dtype``: its own, or fp32.

    The one rule for inference, training and autocast: fp32 where the processor has no product in
    ``dtype``. What is stored, and the result, keep their dtype.
    """
    return torch.float32 if dtype in EMULATED else dtype


class PackedLinear(NamedTuple):
    """``x · weightᵀ + bias`` with the weight packed for oneDNN; no autograd.

    Input and result have the dtype it was packed in.
    """

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor, activation: str = "none") -> Tensor:
        """``activation(x · weightᵀ + bias)`` for ``x [rows, in]``; ``"none"`` or one of
        :data:`~variator_kernels.ops.feed_forward.FFN_ACTIVATIONS`."""
        op, algorithm = _POST_OPS[activation]
        linear = torch.ops.mkldnn._linear_pointwise
        return linear(x, self.weight, self.bias, op, [], algorithm)

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """``(x · weightᵀ + bias) * other``, the gate of a gated FFN, in one product."""
        linear = torch.ops.mkldnn._linear_pointwise.binary
        return linear(x, other, self.weight, self.bias, "mul")


_POST_OPS = {
    "none": ("none", ""),
    "relu": ("relu", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "silu": ("swish", ""),
}


def linear(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None
) -> PackedLinear | None:
    """The packed form of ``weight [out, in]`` and ``bias``, or None where oneDNN cannot take it.

    Not fp64, and not NaN or infinity: oneDNN's activations would hide what comes of them.
    ``dtype``: of the product; by default :func:`product_dtype` of the weight.
    """
    dtype = product_dtype(weight.dtype) if dtype is None else dtype
    packed = _packed(weight, "linear", dtype)
    if packed is None or bias is None:
        return None if packed is None else PackedLinear(packed, None)

    def convert() -> Tensor | None:
        return bias.detach().to(dtype) if bias.isfinite().all() else None

    converted = cache.get((bias,), ("bias", dtype), convert)
    return None if converted is None else PackedLinear(packed, converted)


def transposed(weight: Tensor, dtype: torch.dtype) -> PackedLinear | None:
    """The product with ``weight`` itself, ``x [rows, out]`` to ``[rows, in]``: a gradient's."""
    packed = _packed(weight, "transposed", dtype)
    return None if packed is None else PackedLinear(packed, None)


def _packed(weight: Tensor, kind: str, dtype: torch.dtype) -> Tensor | None:
    if weight.dtype == torch.float64 or not torch.backends.mkldnn.is_available():
        return None

    def pack() -> Tensor | None:
        wide = weight.detach().to(dtype)
        wide = (wide.t() if kind == "transposed" else wide).contiguous()
        return torch.ops.mkldnn._reorder_linear_weight(wide) if wide.isfinite().all() else None

    return cache.get((weight,), (kind, dtype), pack)


def instruction_set() -> str:
    """The kernels' instruction set in use. Another thread may change it at any time, and panels are
    made for one set: an op asks once, packs for the answer, and runs the kernels of the answer."""
    return extension.load().active_isa()
