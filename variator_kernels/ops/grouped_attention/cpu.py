"""grouped_attention on the CPU: the kernels of csrc/cpu/attention.h and attention_backward.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import extension
from .. import prepack
from ..arguments import require
from ..cpu_arguments import address, as_accumulator, dtype_code
from ..library import accumulator
from .kernel_checks import check
from .op import Attention
from .reference import Visible
from .relative import DistanceBias

PATH = "automatic"
"""What the kernel does with keys: ``"packed"`` for many queries, ``"direct"``, where they lie, for
few; it chooses by sizes."""


def _unit_inner(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """A tensor of unit inner stride, its address, and its strides of row, token and head."""
    *strides, inner = tensor.stride()
    if inner != 1 and tensor.shape[-1] > 1:
        tensor = tensor.detach().contiguous()
        strides = list(tensor.stride()[:3])
    return tensor, (tensor.data_ptr(), *strides)


def _bound(bound: Tensor | None) -> Tensor | None:
    """int32: no tensor has more queries."""
    if bound is None or (bound.dtype == torch.int32 and bound.is_contiguous()):
        return bound
    return bound.clamp(-(2**31), 2**31 - 1).to(torch.int32).contiguous()


def _check(call: Attention) -> None:
    check(call)
    require(call.queries.is_cpu, "everything is on the CPU")
    require(call.queries.shape[1] < 2**24, "queries count in fp32: less than 2^24 of them")


_NO_TERMS = (0,) * 7


def _terms(relative: DistanceBias | None, dtype: torch.dtype) -> tuple[tuple[int, ...], list]:
    if relative is None:
        return _NO_TERMS, []
    values = as_accumulator(relative.values, dtype)
    positions = [t.to(torch.float64).contiguous() for t in (relative.queries, relative.keys)]
    pattern = relative.pattern
    pattern = None if pattern is None else pattern.to(torch.int64).contiguous()
    given = (values.shape[1], values.shape[2], relative.origin)
    addresses = [*(t.data_ptr() for t in positions), address(pattern)]
    return (values.data_ptr(), *given, *addresses), [values, *positions, pattern]


def _inputs(call: Attention) -> tuple[Any, tuple[Tensor | None, ...]]:
    """What both kernels read, and the tensors that keep its memory alive."""
    _check(call)
    queries, keys, values, visible, relative, scale = call
    q, query_rows = _unit_inner(queries)
    k, key_rows = _unit_inner(keys)
    v, value_rows = _unit_inner(values)
    rows, n, heads, d = q.shape
    sizes = (rows, n, k.shape[1], heads, k.shape[2], d)
    where = query_rows, key_rows, value_rows
    inputs, kept = given(sizes, q.dtype, visible, relative, scale, where)
    return inputs, (q, k, v, *kept)


def given(
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    visible: Visible,
    relative: DistanceBias | None,
    scale: float,
    where: tuple[tuple[int, ...], ...] = ((0,) * 4,) * 3,
) -> tuple[Any, tuple[Tensor | None, ...]]:
    """What was checked, for ``sizes``: rows, queries, keys, heads of both, and their size.
    ``where``: addresses and strides of queries, keys and values, where somebody knows."""
    bias = visible.bias
    if bias is not None and not (bias.dtype == accumulator(dtype) and bias.is_contiguous()):
        bias = as_accumulator(bias, dtype)
    first, last = _bound(visible.first), _bound(visible.last)
    terms, kept = _terms(relative, dtype)
    inputs = extension.load().AttentionInputs(
        dtype=dtype_code(dtype),
        threads=torch.get_num_threads(),
        sizes=sizes,
        q=where[0],
        k=where[1],
        v=where[2],
        scale=scale,
        bias=address(bias),
        first=address(first),
        last=address(last),
        terms=terms,
    )
    return inputs, (bias, first, last, *kept)


def grouped_attention(call: Attention) -> Tensor:
    inputs, kept = _inputs(call)
    out = torch.empty_like(call.queries, memory_format=torch.contiguous_format)
    kernel = extension.load().Attention(
        isa=prepack.instruction_set(),
        inputs=inputs,
        path=extension.enum_value("cpu", "attention_paths", PATH),
        out=out.data_ptr(),
    )
    kernel.run()
    del kept  # until here the kernel read them
    return out


def of_memory(
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    queries: tuple[int, ...],
    keys: tuple[int, ...],
    values: tuple[int, ...],
    bias: Tensor,
    scale: float,
) -> Tensor:
    """Of what lies where the caller says, and was checked: ``[rows, queries, heads, size]``.

    ``sizes`` are as in :func:`given`; the others are addresses, and strides of row, token and head.
    ``bias``: contiguous, in the accumulator dtype.
    """
    cpu = extension.load()
    out = torch.empty((*sizes[:2], sizes[3], sizes[5]), dtype=dtype)
    inputs = cpu.AttentionInputs(
        dtype=dtype_code(dtype),
        threads=torch.get_num_threads(),
        sizes=sizes,
        q=queries,
        k=keys,
        v=values,
        scale=scale,
        bias=bias.data_ptr(),
        first=0,
        last=0,
        terms=_NO_TERMS,
    )
    path = extension.enum_value("cpu", "attention_paths", PATH)
    cpu.Attention(isa=prepack.instruction_set(), inputs=inputs, path=path, out=out.data_ptr()).run()
    return out


def grouped_attention_backward(
    d_out: Tensor, call: Attention, d_bias: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, keys, values, and of ``bias [B, G]``: 0 where none is given, or
    ``d_bias`` does not ask for it."""
    inputs, kept = _inputs(call)
    require(d_out.shape == call.queries.shape, f"d_out is {list(d_out.shape)}")
    require(d_out.is_cpu and d_out.dtype == call.queries.dtype, "d_out is as the queries are")
    d_out, rows = _unit_inner(d_out)
    d_q, d_k, d_v = (torch.empty(t.shape, dtype=t.dtype) for t in call[:3])
    biased = d_bias and call.visible.bias is not None
    of_bias = (torch.empty if biased else torch.zeros)(
        call.keys.shape[:2], dtype=accumulator(d_q.dtype)
    )
    kernel = extension.load().AttentionBackward(
        isa=prepack.instruction_set(),
        inputs=inputs,
        d_out=rows,
        d_q=d_q.data_ptr(),
        d_k=d_k.data_ptr(),
        d_v=d_v.data_ptr(),
        d_bias=of_bias.data_ptr() if biased else 0,
    )
    kernel.run()
    del kept
    return d_q, d_k, d_v, of_bias
