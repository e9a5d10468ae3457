"""adapter_decompress on the CUDA kernels (csrc/cuda/kernels/decompress*.cuh)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import extension
from ..arguments import check_decompress, flat, require
from ..cuda_arguments import (
    PHIS,
    address,
    aligned,
    as_vector,
    check_sizes,
    chunks,
    dtype_code,
    pad_columns,
    pad_rows,
    rows_of,
    spans_of,
    target,
    vector,
)
from ..cuda_sums import outer_sum
from ..gpu_arguments import Groups, decompress_output, groups


class Decompress:
    """One launch of the decompress kernel; keeps alive what it reads."""

    def __init__(
        self,
        u: Tensor,
        spans: Groups,
        activation: str,
        projected: Tensor,
        w1u: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
        residual: Tensor | None,
        y: Tensor,
    ) -> None:
        """``u [groups, d]``, ``projected [tokens, r]`` fp32; writes flat ``y [tokens, d]``."""
        dtype, d, r = y.dtype, y.shape[1], projected.shape[1]
        check_sizes(d, spans.ratio, r)
        w1u, w2 = pad_rows(w1u, dtype), pad_columns(w2, dtype)
        b1, b2 = as_vector(b1, dtype, chunks(r)), as_vector(b2, dtype)
        residual = None if residual is None else rows_of(residual)
        self.kept = (u, spans, projected, w1u, b1, w2, b2, residual)
        self.params: Any = extension.load("cuda").Decompress(
            dtype=dtype_code(dtype),
            groups=spans_of(spans),
            d=d,
            r=chunks(r),
            phi=PHIS[activation],
            u=u.data_ptr(),
            projected=projected.data_ptr(),
            projected_columns=r,
            w1u=w1u.data_ptr(),
            w1u_stride=w1u.stride(0),
            b1=vector(b1),
            w2=w2.data_ptr(),
            b2=vector(b2),
            residual=address(residual),
            residual_stride=0 if residual is None else residual.stride(0),
            y=y.data_ptr(),
        )

    def run(self, x: Tensor) -> None:
        """Launches on ``x``'s device and its current stream."""
        self.params.run(target(x))


def adapter_decompress(
    u: Tensor,
    projected: Tensor,
    w1u: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    ratio: int,
    activation: str,
) -> Tensor:
    spans, y = decompress_output(u, projected, w1u, b1, w2, b2, residual, mask, cu_seqlens, ratio)
    Decompress(
        aligned(flat(u)),
        spans,
        activation,
        aligned(flat(projected.float())),
        w1u,
        b1,
        w2,
        b2,
        None if residual is None else flat(residual.to(u.dtype)),
        flat(y),
    ).run(u)
    return y


def adapter_decompress_backward(
    dy: Tensor,
    u: Tensor,
    projected: Tensor,
    w1u: Tensor,
    b1: Tensor,
    w2: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    ratio: int,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    cuda, dtype = extension.load("cuda"), u.dtype
    r, d = w1u.shape
    spans = groups(projected, mask, cu_seqlens, ratio)
    check_decompress(u, projected, w1u, b1, w2, spans.total)
    check_sizes(d, ratio, r)
    require(dy.shape == (*projected.shape[:-1], d), f"dy is {list(dy.shape)}")
    u, dy = aligned(flat(u)), rows_of(flat(dy.to(dtype)))
    projected_rows = aligned(flat(projected.float()))
    rows, padded_b1 = pad_rows(w1u, dtype), as_vector(b1, dtype, chunks(r))
    w1u_transpose, w2_transpose = pad_columns(w1u.t(), dtype), aligned(pad_rows(w2.t(), dtype))
    du = torch.empty_like(u)
    d_projected = projected.new_empty(projected.shape, dtype=torch.float32)
    t = torch.empty_like(projected_rows)
    d_q = u.new_empty(spans.total, r, dtype=torch.float32)
    cuda.decompress_backward(
        target(u),
        dtype=dtype_code(dtype),
        groups=spans_of(spans),
        d=d,
        r=chunks(r),
        phi=PHIS[activation],
        u=u.data_ptr(),
        projected=projected_rows.data_ptr(),
        projected_columns=r,
        w1u=rows.data_ptr(),
        w1u_stride=rows.stride(0),
        w1u_transpose=w1u_transpose.data_ptr(),
        w2_transpose=w2_transpose.data_ptr(),
        b1=vector(padded_b1),
        dy=dy.data_ptr(),
        dy_stride=dy.stride(0),
        du=du.data_ptr(),
        d_projected=d_projected.data_ptr(),
        bottleneck=t.data_ptr(),
        d_q=d_q.data_ptr(),
    )
    d_w1u = outer_sum(d_q, u, spans, slot=0, left_by_group=True, right_by_group=True)
    d_w2, d_b2 = outer_sum(t, dy, spans, ones=True).split([r, 1])
    return du, d_projected, d_w1u, d_q.sum(0), d_w2.t().contiguous(), d_b2.view(d)
