"""adapter_decompress on the CUDA kernels (csrc/cuda/kernels/decompress*.cuh)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import extension
from ..arguments import AdapterWeights, check_decompress, flat, require
from ..cuda_arguments import (
    address,
    aligned,
    aligned_rows,
    as_vector,
    check_sizes,
    chunks,
    code,
    dtype_code,
    groups_kernel,
    pad_columns,
    pad_rows,
    target,
    vector,
)
from ..cuda_weight_gradient import Left, weight_gradient
from ..gpu_arguments import (
    DecompressInputs,
    GpuGroups,
    decompress_output,
    flat_or_none,
    gpu_groups,
)
from ..groups import Groups


class Decompress:
    """One launch of the decompress kernel; keeps alive what it reads."""

    def __init__(
        self,
        inputs: DecompressInputs,
        groups: GpuGroups,
        adapter: AdapterWeights,
        y: Tensor,
    ) -> None:
        """Writes flat ``y [tokens, d]``."""
        u, projected, residual, _ = inputs
        dtype, d, r = y.dtype, y.shape[1], projected.shape[1]
        check_sizes(d, groups.ratio, r)
        w1u, w2 = pad_rows(adapter.w1u, dtype), pad_columns(adapter.w2, dtype)
        b1, b2 = as_vector(adapter.b1, dtype, chunks(r)), as_vector(adapter.b2, dtype)
        residual = None if residual is None else aligned_rows(residual)
        self.kept = (u, groups, projected, w1u, b1, w2, b2, residual)
        self.params: Any = extension.load("cuda").Decompress(
            dtype=dtype_code(dtype),
            groups=groups_kernel(groups),
            d=d,
            r=chunks(r),
            phi=code("adapter_activations", adapter.activation),
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
    adapter: AdapterWeights,
    residual: Tensor | None,
    groups: Groups,
) -> Tensor:
    launched, y = decompress_output(u, projected, adapter, residual, groups)
    residual = None if residual is None else residual.to(u.dtype)
    rows = aligned(flat(projected.float()))
    inputs = DecompressInputs(aligned(flat(u)), rows, flat_or_none(residual))
    Decompress(inputs, launched, adapter, flat(y)).run(u)
    return y


def adapter_decompress_backward(
    dy: Tensor, u: Tensor, projected: Tensor, adapter: AdapterWeights, groups: Groups
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    cuda, dtype = extension.load("cuda"), u.dtype
    r, d = adapter.w1u.shape
    check_decompress(u, projected, adapter, groups)
    launched = gpu_groups(groups, projected)
    check_sizes(d, groups.ratio, r)
    require(dy.shape == (*projected.shape[:-1], d), f"dy is {list(dy.shape)}")
    u, dy = aligned(flat(u)), aligned_rows(flat(dy.to(dtype)))
    projected_rows = aligned(flat(projected.float()))
    rows, padded_b1 = pad_rows(adapter.w1u, dtype), as_vector(adapter.b1, dtype, chunks(r))
    w1u_transpose = pad_columns(adapter.w1u.t(), dtype)
    w2_transpose = aligned(pad_rows(adapter.w2.t(), dtype))
    du = torch.empty_like(u)
    d_projected = projected.new_empty(projected.shape, dtype=torch.float32)
    t = torch.empty_like(projected_rows)
    d_q = u.new_empty(launched.total, r, dtype=torch.float32)
    cuda.decompress_backward(
        target(u),
        dtype=dtype_code(dtype),
        groups=groups_kernel(launched),
        d=d,
        r=chunks(r),
        phi=code("adapter_activations", adapter.activation),
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
    d_w1u = weight_gradient(Left(d_q), u, launched, by_group=True).rows
    sums = weight_gradient(Left(t, ones=True), dy, launched.adapted())
    d_w2, d_b2 = sums.rows.t().contiguous(), sums.ones.view(d)
    return du, d_projected, d_w1u, d_q.sum(0), d_w2, d_b2
