"""Weights' gradients on the CUDA kernel csrc/cuda/kernels/weight_gradient.cuh."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import extension
from .arguments import NO_NORM, Norm
from .cuda_arguments import (
    address,
    dtype_code,
    multiprocessors,
    norm_as_read,
    spans_of,
    target,
)
from .gpu_arguments import Groups


def outer_sum(
    left: Tensor,
    right: Tensor,
    spans: Groups,
    *,
    slot: int = -1,
    left_by_group: bool = False,
    right_by_group: bool = False,
    ones: bool = False,
    norm: Norm = NO_NORM,
    moments: Tensor | None = None,
) -> Tensor:
    """``Σ left[m]ᵀ norm(right[m])`` over the slots m that hold a token: ``[left's columns, d]``.

    Args:
        left: fp32 ``[tokens or groups, c]``, contiguous; ``left_by_group`` says which.
        right: ``[tokens or groups, d]`` in a storage type, rows of unit stride.
        slot: only this slot of each group; -1: all of them.
        ones: adds a row, the sum of ``right`` itself.
        norm, moments: the norm of ``right`` and the rows' mean and scale ``[groups, k, 2]``.
    """
    columns, d = left.shape[1] + ones, right.shape[1]
    cuda = extension.load("cuda")
    parts = cuda.weight_gradient_parts(spans.total, columns, d, multiprocessors(right))
    out = right.new_empty(parts, columns, d, dtype=torch.float32)
    cuda.weight_gradient(
        target(right),
        dtype=dtype_code(right.dtype),
        groups=spans_of(spans),
        slot=slot,
        left_by_group=left_by_group,
        right_by_group=right_by_group,
        left=left.data_ptr(),
        left_stride=left.shape[1],
        left_columns=columns,
        right=right.data_ptr(),
        right_stride=right.stride(0),
        d=d,
        norm=norm_as_read(norm),
        moments=0 if norm.name == "none" else address(moments),
        parts=parts,
        out=out.data_ptr(),
        out_stride=d,
    )
    return out.sum(0)
