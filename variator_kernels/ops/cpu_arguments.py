"""What every CPU kernel is told the same way: dtypes, groups, norms, prepacked plugin weights."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import extension
from .arguments import NO_NORM, AdapterWeights, MergeWeights, Norm
from .library import accumulator


@functools.cache
def dtype_code(dtype: torch.dtype) -> int:
    """The kernels' number for a storage type."""
    return extension.enum_value("cpu", "dtypes", str(dtype).removeprefix("torch."))


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


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


def wide_norm(norm: Norm, dtype: torch.dtype) -> Norm:
    """A norm whose vectors are in the accumulator dtype."""
    if norm is NO_NORM:
        return norm
    weight, bias = (optional_accumulator(v, dtype) for v in (norm.weight, norm.bias))
    return norm._replace(weight=weight, bias=bias)


def norm_kernel(norm: Norm) -> Any:
    """The result of :func:`wide_norm` as the kernels read it."""
    return _no_norm() if norm is NO_NORM else _norm_kernel(norm)


@functools.cache
def _no_norm() -> Any:
    return _norm_kernel(NO_NORM)


def _norm_kernel(norm: Norm) -> Any:
    return extension.load().Norm(
        kind=extension.enum_value("cpu", "norms", norm.name),
        weight=address(norm.weight),
        bias=address(norm.bias),
        eps=norm.eps,
        folded=folds(norm),
    )


def pack(
    source: Tensor,
    isa: str,
    *,
    inner: tuple[int, int],
    columns: tuple[int, int],
    matrices: tuple[int, int] = (1, 0),
    bf16: bool = False,
) -> Tensor:
    """Panels for the small products: ``(size, stride)`` of the inner dimension, the columns and the
    matrices of ``source``, which is contiguous in an accumulator dtype.

    The layout is that of the instruction set ``isa``, whose kernels alone can read it.
    """
    code = dtype_code(source.dtype)
    job = extension.load().Pack(isa, code, bf16, *matrices, *inner, *columns)
    packed = torch.empty(job.bytes(), dtype=torch.uint8)
    job.run(source.data_ptr(), packed.data_ptr())
    return packed


def pack_merge(wide: Tensor, dtype: torch.dtype, isa: str) -> Tensor:
    """W_c ``[k, k*d]``, in the accumulator dtype, for the scores: as it is for a small k, else in
    panels by slot."""
    k = wide.shape[0]
    if k <= extension.load().direct_scores:
        return wide
    d = wide.shape[1] // k
    bf16 = dtype == torch.bfloat16
    return pack(wide, isa, inner=(d, 1), columns=(k, k * d), matrices=(k, d), bf16=bf16)


def pack_columns(weight: Tensor, dtype: torch.dtype, isa: str, *, bf16: bool) -> Tensor:
    """``weight [out, in]`` for ``a · weightᵀ``: inner dimension ``in``."""
    wide = as_accumulator(weight, dtype)
    out, inside = wide.shape
    bf16 = bf16 and dtype == torch.bfloat16
    return pack(wide, isa, inner=(inside, 1), columns=(out, inside), bf16=bf16)


def pack_rows(weight: Tensor, dtype: torch.dtype, isa: str) -> Tensor:
    """``weight [out, in]`` for ``a · weight``: inner dimension ``out``, never bf16 pairs."""
    wide = as_accumulator(weight, dtype)
    out, inside = wide.shape
    return pack(wide, isa, inner=(out, inside), columns=(inside, 1))


def pack_merge_rows(weight: Tensor, dtype: torch.dtype, isa: str) -> Tensor:
    """W_c ``[k, k*d]`` for ``ds · W_c[:, slot]``: by slot, inner dimension k."""
    wide = as_accumulator(weight, dtype)
    k = wide.shape[0]
    d = wide.shape[1] // k
    return pack(wide, isa, inner=(k, k * d), columns=(d, 1), matrices=(k, d))


class PrepackedMerge(NamedTuple):
    """W_c, b_c and W_1h as the merge of one instruction set reads them, the norm folded in if it
    folds."""

    isa: str
    weight: Tensor
    bias: Tensor
    projection: Tensor | None
    bottleneck: int
    norm: Norm
    norm_kernel: Any


def prepack_merge(merge: MergeWeights, norm: Norm, dtype: torch.dtype, isa: str) -> PrepackedMerge:
    """For inputs of storage ``dtype`` and the kernels of ``isa``."""
    wide, projection = wide_norm(norm, dtype), None
    if merge.projection is not None:
        projection = pack_columns(folded(merge.projection, wide, dtype), dtype, isa, bf16=True)
    return PrepackedMerge(
        isa,
        pack_merge(folded(merge.weight, wide, dtype), dtype, isa),
        as_accumulator(merge.bias, dtype),
        projection,
        merge.bottleneck,
        wide,
        norm_kernel(wide),
    )


class PrepackedAdapter(NamedTuple):
    """The adapter's weights as the decompress of one instruction set reads them."""

    isa: str
    w1u: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    phi: int


def prepack_adapter(adapter: AdapterWeights, dtype: torch.dtype, isa: str) -> PrepackedAdapter:
    """For outputs of storage ``dtype`` and the kernels of ``isa``."""
    return PrepackedAdapter(
        isa,
        pack_columns(adapter.w1u, dtype, isa, bf16=True),
        as_accumulator(adapter.b1, dtype),
        pack_columns(adapter.w2, dtype, isa, bf16=True),
        as_accumulator(adapter.b2, dtype),
        extension.enum_value("cpu", "adapter_activations", adapter.activation),
    )
