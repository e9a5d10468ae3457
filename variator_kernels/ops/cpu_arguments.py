"""What every CPU kernel is told the same way: dtypes, groups, packed plugin weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks, extension
from .arguments import Norm, require
from .groups import max_groups

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
NORMS = {"none": 0, "rms": 1, "layer": 2}
ACTIVATIONS = {"identity": 0, "tanh": 1}


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, norms and softmax: fp32, or fp64 for fp64 storage."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_accumulator(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor``, detached and contiguous, in the accumulator dtype of storage ``dtype``."""
    return tensor.detach().to(accumulator(dtype)).contiguous()


def optional_accumulator(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """:func:`as_accumulator` of a tensor that may be missing."""
    return None if tensor is None else as_accumulator(tensor, dtype)


def folds(norm: Norm) -> bool:
    """Whether a norm only scales: then its weight can be part of the weights that follow, and its
    row's scale be applied to what they give."""
    return norm.name != "layer" and norm.bias is None


def folded(weight: Tensor, norm: Norm, dtype: torch.dtype) -> Tensor:
    """``weight [out, m*d]`` in the accumulator dtype, with the norm's weight in it if it folds."""
    wide = as_accumulator(weight, dtype)
    if norm.weight is None or not folds(norm):
        return wide
    d = norm.weight.shape[0]
    return (wide.view(wide.shape[0], wide.shape[1] // d, d) * norm.weight).view(wide.shape)


class Groups(NamedTuple):
    """The list of groups as the kernels read it; the tensors keep its memory alive."""

    start: Tensor
    length: Tensor
    mask: Tensor | None
    groups: int
    ratio: int

    def arguments(self, first: int = 0, count: int | None = None) -> tuple[int, int, int, int, int]:
        """Addresses and sizes of ``count`` groups from ``first`` on."""
        skip = first * 8
        count = self.groups if count is None else count
        return (
            self.start.data_ptr() + skip,
            self.length.data_ptr() + skip,
            address(self.mask),
            count,
            self.ratio,
        )


class Layout:
    """Rows, mask and offsets of one input, in the form the kernels take."""

    def __init__(self, x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
        self.x = x
        self.cu_seqlens = cu_seqlens
        self.mask = None
        self.offsets = None
        if cu_seqlens is not None:
            self.rows, self.n = cu_seqlens.shape[0] - 1, 0
            self.offsets = cu_seqlens.to(torch.int64).contiguous()
            checks.offsets(self.offsets, x.shape[0])
        else:
            self.rows, self.n = x.shape[:2]
            if mask is not None:
                checks.shape(mask, (self.rows, self.n), "mask")
                mask = mask if mask.dtype == torch.bool else mask != 0
                self.mask = mask.contiguous()

    def _batch(self) -> tuple[int, int, int, int]:
        return self.rows, self.n, address(self.mask), address(self.offsets)

    def groups(self, ratio: int, compact: bool) -> Groups:
        """All groups; ``compact`` leaves out those behind a row's last token."""
        per_row = 0 if compact or self.offsets is not None else max_groups(self.x, ratio)
        lister = extension.load().list_groups
        count = lister(*self._batch(), ratio, per_row, 0, 0)
        total = count
        if not compact and self.offsets is not None:
            total = max_groups(self.x, ratio, self.cu_seqlens)
        start = torch.zeros(total, dtype=torch.int64)
        length = torch.zeros(total, dtype=torch.int64)
        if count:
            lister(*self._batch(), ratio, per_row, start.data_ptr(), length.data_ptr())
        return Groups(start, length, self.mask, total, ratio)

    @property
    def covers_all(self) -> bool:
        """Whether every token lies in a group."""
        return self.mask is None and self.offsets is None

    def copy_padding(self, x: Tensor, y: Tensor) -> None:
        """Copies to ``y [tokens, d]`` the rows of ``x`` that no group holds; same dtype."""
        require(x.dtype == y.dtype, f"x is {x.dtype}, y is {y.dtype}")
        if self.offsets is not None:
            first, last = int(self.offsets[0]), int(self.offsets[-1])
            y[:first].copy_(x[:first])
            y[last:].copy_(x[last:])
        elif self.mask is not None:
            extension.load().copy_padding(
                self.rows,
                self.n,
                address(self.mask),
                x.data_ptr(),
                x.stride(0),
                y.data_ptr(),
                x.shape[1],
                x.element_size(),
            )


def pack(
    source: Tensor,
    *,
    inner: tuple[int, int],
    columns: tuple[int, int],
    matrices: tuple[int, int] = (1, 0),
    bf16: bool = False,
) -> Tensor:
    """Panels for the small products: ``(size, stride)`` of the inner dimension, the columns and the
    matrices of ``source``, which is contiguous in an accumulator dtype."""
    job = extension.load().Pack(source.dtype == torch.float64, bf16, *matrices, *inner, *columns)
    packed = torch.empty(job.bytes(), dtype=torch.uint8)
    job.run(source.data_ptr(), packed.data_ptr())
    return packed


def pack_merge(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """W_c ``[k, k*d]``, in the accumulator dtype, for the scores: as it is for a small k, else in
    panels by slot."""
    k = wide.shape[0]
    if k <= extension.load().direct_scores:
        return wide
    d = wide.shape[1] // k
    return pack(
        wide, inner=(d, 1), columns=(k, k * d), matrices=(k, d), bf16=dtype == torch.bfloat16
    )


def pack_columns(weight: Tensor, dtype: torch.dtype, bf16: bool) -> Tensor:
    """``weight [out, in]`` for ``a · weightᵀ``: inner dimension ``in``."""
    wide = as_accumulator(weight, dtype)
    out, inside = wide.shape
    return pack(
        wide, inner=(inside, 1), columns=(out, inside), bf16=bf16 and dtype == torch.bfloat16
    )


def pack_rows(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight [out, in]`` for ``a · weight``: inner dimension ``out``, never bf16 pairs."""
    wide = as_accumulator(weight, dtype)
    out, inside = wide.shape
    return pack(wide, inner=(out, inside), columns=(inside, 1))


def pack_merge_rows(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """W_c ``[k, k*d]`` for ``ds · W_c[:, slot]``: by slot, inner dimension k."""
    wide = as_accumulator(weight, dtype)
    k = wide.shape[0]
    d = wide.shape[1] // k
    return pack(wide, inner=(k, k * d), columns=(d, 1), matrices=(k, d))
