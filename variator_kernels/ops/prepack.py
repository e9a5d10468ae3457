"""Products with weights in the layout that the CPU reads fast."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import environment, extension
from .packed import cache
from .row_blocks import SIZES, blocks

WORTH_READING = 128
"""Rows from which a packed product gains more than it takes to read the whole weight before."""


def _has_bf16() -> bool:
    """Whether oneDNN multiplies bf16 by instructions of the processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    has = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if has and torch.cpu._is_avx512_supported():
        return environment.onednn_allows("bf16") and torch.cpu._is_avx512_bf16_supported()
    return bool(has)


def _emulated() -> frozenset[torch.dtype]:
    """The 16-bit dtypes in which oneDNN has no product on this processor that pays.

    PyTorch's check follows ``ONEDNN_MAX_CPU_ISA``, but is content with AVX-512. Without the bf16
    instructions oneDNN widens there on the way, and takes four times as long as in fp32. Intel's
    instruction for pairs, where there are no tiles, has half the throughput of two in fp32: 86
    GFLOP/s on a core of Sapphire Rapids that made 155 in fp32.
    """
    if not torch.backends.mkldnn.is_available():
        return frozenset()
    bf16 = _has_bf16()
    if torch.cpu._is_avx512_supported():
        tiles = torch.cpu._is_amx_tile_supported() and environment.onednn_allows("amx")
        bf16 = bf16 and (tiles or not _slow_pairs())
    fp16 = torch.ops.mkldnn._is_mkldnn_fp16_supported()
    native = {torch.bfloat16: bf16, torch.float16: fp16}
    return frozenset(dtype for dtype, has in native.items() if not has)


def _slow_pairs() -> bool:
    """Whether the kernels prefer two products in fp32 to one of a pair in bf16 (dispatch.cpp)."""
    kernels = extension.load()
    sets = kernels.available_isas() if kernels else []
    return "avx512_bf16" in sets and sets.index("avx512_bf16") < sets.index("avx512")


EMULATED = _emulated()
NARROW_ROWS = 8 if _has_bf16() and torch.bfloat16 in EMULATED else 0
"""So few vectors are bound by the weight's bytes, of which bf16 has half: on that Sapphire Rapids a
packed product made 19, 73 and 83 GFLOP/s of 1, 8 and 32 vectors in bf16, and 12, 68 and 124 in
fp32."""


def narrow(rows: int | None, dtype: torch.dtype) -> bool:
    """Whether so few vectors multiply in bf16 though more of them take fp32."""
    return rows is not None and rows <= NARROW_ROWS and dtype == torch.bfloat16


def product_dtype(dtype: torch.dtype, rows: int | None = None) -> torch.dtype:
    """The dtype in which the CPU multiplies ``rows`` vectors stored in ``dtype``: its own, or fp32.

    The one rule for inference, training and autocast: fp32 where the processor has no product in
    ``dtype`` that pays. What is stored, and the result, keep their dtype.
    """
    return torch.float32 if dtype in EMULATED and not narrow(rows, dtype) else dtype


def describe() -> str:
    """In which dtype bf16 multiplies here, and why, in words."""
    if torch.bfloat16 not in EMULATED:
        return "in bf16"
    if NARROW_ROWS:
        return f"in fp32 from {NARROW_ROWS + 1} vectors on: the processor's in bf16 are slower"
    return "in fp32: the processor has none in bf16"


def result_dtype(x: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype | None:
    """The dtype of ``F.linear``'s result; None: PyTorch has the product to itself, or an error."""
    if not (x.is_cpu and weight.is_cpu and x.is_floating_point() and x.numel() > 0):
        return None
    fits = weight.dim() == 2 and x.dim() > 0 and x.shape[-1] == weight.shape[1]
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        return None
    doubles = weight.dtype == torch.float64 or (bias is not None and bias.dtype == torch.float64)
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64 and not doubles:
        return torch.get_autocast_dtype("cpu")
    same = x.dtype == weight.dtype and (bias is None or bias.dtype == x.dtype)
    return x.dtype if same else None


class PackedLinear(NamedTuple):
    """``x · weightᵀ + bias`` with the weight packed for oneDNN; no autograd.

    Input and result have the dtype it was packed in.
    """

    weight: Tensor
    bias: Tensor | None

    def __call__(
        self,
        x: Tensor,
        activation: str = "none",
        factor: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """``activation(x · weightᵀ + bias) [* factor] [+ residual]`` for ``x [rows, in]``;
        ``"none"`` or one of :data:`~variator_kernels.ops.feed_forward.FFN_ACTIVATIONS`. A factor,
        or a residual, comes without an activation, and not both.

        A product of its own if :mod:`row_blocks` knows that many rows, else one for each block.
        """
        rows = x.shape[0]
        if rows in SIZES or rows % SIZES[-1] == 0:
            if factor is not None:
                return self.times(x, factor)
            return self.block(x, activation) if residual is None else self.plus(x, residual)
        y = x.new_empty(rows, self.weight.shape[0])
        for first, count, size in blocks(rows):
            part = F.pad(x[first : first + count], (0, 0, 0, size - count))
            y[first : first + count] = self.block(part, activation)[:count]
        if factor is not None:
            y.mul_(factor)
        return y if residual is None else y.add_(residual)

    def block(self, x: Tensor, activation: str = "none") -> Tensor:
        """The same in one product, of a number of rows that :mod:`row_blocks` knows."""
        op, algorithm = _POST_OPS[activation]
        linear = torch.ops.mkldnn._linear_pointwise
        return linear(x, self.weight, self.bias, op, [], algorithm)

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """``(x · weightᵀ + bias) * other``, the gate of a gated FFN, in one product; of a number of
        rows that :mod:`row_blocks` knows."""
        linear = torch.ops.mkldnn._linear_pointwise.binary
        return linear(x, other, self.weight, self.bias, "mul")

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """``x · weightᵀ + bias + residual``, as :meth:`times`."""
        linear = torch.ops.mkldnn._linear_pointwise.binary
        return linear(x, residual.contiguous(), self.weight, self.bias, "add")


_POST_OPS = {
    "none": ("none", ""),
    "relu": ("relu", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "silu": ("swish", ""),
}


def linear(
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype | None = None,
    rows: int | None = None,
) -> PackedLinear | None:
    """The packed form of ``weight [out, in]`` and ``bias``, or None where oneDNN cannot take it.

    Not fp64, and not NaN or infinity: oneDNN's activations would hide what comes of them.
    ``dtype``: of the product; by default :func:`product_dtype` of the weight. ``rows``: of this
    product. None too if they are so few that looking whether the weight has changed would take
    longer than packing saves.
    """
    dtype = product_dtype(weight.dtype, rows) if dtype is None else dtype
    few = rows is not None and rows < WORTH_READING and dtype == weight.dtype
    if few and cache.reads_much(weight):
        return None
    packed = _packed(weight, "linear", dtype)
    if packed is None or bias is None:
        return None if packed is None else PackedLinear(packed, None)

    def convert(bias: Tensor) -> Tensor | None:
        return bias.to(dtype) if bias.isfinite().all() else None

    converted = cache.get((bias,), ("bias", dtype), convert)
    return None if converted is None else PackedLinear(packed, converted)


def transposed(weight: Tensor, dtype: torch.dtype) -> PackedLinear | None:
    """The product with ``weight`` itself, ``x [rows, out]`` to ``[rows, in]``: a gradient's."""
    packed = _packed(weight, "transposed", dtype)
    return None if packed is None else PackedLinear(packed, None)


def stacked(
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    dtype: torch.dtype,
    rows: int,
) -> PackedLinear | None:
    """:func:`linear` of matrices ``[out, in]`` one below the other, and a bias or None of each."""
    if len(weights) == 1:
        return linear(weights[0], biases[0], dtype, rows)
    few = rows < WORTH_READING and dtype == weights[0].dtype
    if few and any(map(cache.reads_much, weights)):
        return None
    if not torch.backends.mkldnn.is_available():
        return None

    def pack(*copies: Tensor) -> PackedLinear | None:
        weight, bias = stack(copies, len(weights), biases)
        wide, shift = weight.to(dtype), None if bias is None else bias.to(dtype)
        if not (wide.isfinite().all() and (shift is None or shift.isfinite().all())):
            return None
        return PackedLinear(torch.ops.mkldnn._reorder_linear_weight(wide), shift)

    absent = tuple(bias is None for bias in biases)
    sources = (*weights, *(bias for bias in biases if bias is not None))
    return cache.get(sources, ("stacked", len(weights), dtype, absent), pack)


def stack(
    copies: tuple[Tensor, ...], count: int, biases: tuple[Tensor | None, ...]
) -> tuple[Tensor, Tensor | None]:
    """One matrix of the first ``count`` copies, and one bias of the others, which are of those
    ``biases`` that are there: 0 for the rest; None if none is."""
    matrices, given = copies[:count], iter(copies[count:])
    if all(bias is None for bias in biases):
        return torch.cat(matrices), None
    parts = [
        matrix.new_zeros(matrix.shape[0]) if bias is None else next(given)
        for matrix, bias in zip(matrices, biases, strict=True)
    ]
    return torch.cat(matrices), torch.cat(parts)


def _packed(weight: Tensor, kind: str, dtype: torch.dtype) -> Tensor | None:
    if weight.dtype == torch.float64 or not torch.backends.mkldnn.is_available():
        return None

    def pack(weight: Tensor) -> Tensor | None:
        wide = weight.to(dtype)
        wide = (wide.t() if kind == "transposed" else wide).contiguous()
        return torch.ops.mkldnn._reorder_linear_weight(wide) if wide.isfinite().all() else None

    return cache.get((weight,), (kind, dtype), pack)


def instruction_set() -> str:
    """The kernels' instruction set in use. Another thread may change it at any time, and panels are
    made for one set: an op asks once, packs for the answer, and runs the kernels of the answer."""
    return extension.load().active_isa()
