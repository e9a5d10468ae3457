"""Weights' gradients on the CUDA kernel csrc/cuda/kernels/weight_gradient.cuh."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import extension
from .arguments import NO_NORM, Norm
from .cuda_arguments import (
    address,
    dtype_code,
    groups_kernel,
    multiprocessors,
    norm_kernel,
    target,
)
from .gpu_arguments import GpuGroups


class Side(NamedTuple):
    """A factor of the sum: ``rows [tokens or groups, c]`` with unit stride; ``by_group`` says
    which."""

    rows: Tensor
    by_group: bool = False


class NormedRows(NamedTuple):
    """The norm of the right factor, and its rows' mean and rstd ``[groups, k, 2]``."""

    norm: Norm = NO_NORM
    moments: Tensor | None = None


AS_THEY_ARE = NormedRows()


def weight_gradient(
    left: Side,
    right: Side,
    groups: GpuGroups,
    *,
    slot: int = -1,
    ones: bool = False,
    normed: NormedRows = AS_THEY_ARE,
) -> Tensor:
    """``Σ left[m]ᵀ norm(right[m])`` over the slots m that hold a token: ``[left's columns, d]``.

    Args:
        left: fp32, contiguous.
        right: in a storage type.
        slot: only this slot of each group; -1: all of them.
        ones: adds a row, the sum of ``right`` itself.
        normed: what ``right`` goes through first.
    """
    columns, d = left.rows.shape[1] + ones, right.rows.shape[1]
    cuda = extension.load("cuda")
    parts = cuda.weight_gradient_parts(groups.total, columns, d, multiprocessors(right.rows))
    out = right.rows.new_empty(parts, columns, d, dtype=torch.float32)
    cuda.weight_gradient(
        target(right.rows),
        dtype=dtype_code(right.rows.dtype),
        groups=groups_kernel(groups),
        slot=slot,
        left_by_group=left.by_group,
        right_by_group=right.by_group,
        left=left.rows.data_ptr(),
        left_stride=left.rows.shape[1],
        left_columns=columns,
        right=right.rows.data_ptr(),
        right_stride=right.rows.stride(0),
        d=d,
        norm=norm_kernel(normed.norm),
        moments=0 if normed.norm.name == "none" else address(normed.moments),
        parts=parts,
        out=out.data_ptr(),
        out_stride=d,
    )
    return out.sum(0)
