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


class Left(NamedTuple):
    """The left factor's columns, side by side; fp32, contiguous."""

    rows: Tensor | None = None
    """``[tokens or groups, r]``."""
    scores: Tensor | None = None
    """``[groups, k]``: a group's row is that of each of its tokens."""
    ones: bool = False


class NormedRows(NamedTuple):
    """The norm of the right factor, and its rows' mean and rstd ``[groups, k, 2]``."""

    norm: Norm = NO_NORM
    moments: Tensor | None = None


AS_THEY_ARE = NormedRows()


class Sums(NamedTuple):
    """In fp32: ``rows`` ``[r, d]``; ``scores`` ``[k (slot), k (score), d]``; ``ones`` ``[1, d]``.

    What the left factor does not have is empty.
    """

    rows: Tensor
    scores: Tensor
    ones: Tensor


def weight_gradient(
    left: Left,
    right: Tensor,
    groups: GpuGroups,
    *,
    by_group: bool = False,
    normed: NormedRows = AS_THEY_ARE,
) -> Sums:
    """``Σ left[m]ᵀ norm(right[m])`` over the tokens m that the groups merge, in one launch.

    Args:
        left: its rows belong to tokens, or to groups.
        right: ``[tokens or groups, d]`` in a storage type, unit stride.
        by_group: a group is one row of both.
        normed: what ``right`` goes through first.
    """
    rows, scores, ones = left
    r = 0 if rows is None else rows.shape[1]
    score_columns = 0 if scores is None else scores.shape[1]
    columns, d = r + score_columns + ones, right.shape[1]
    slots = 1 if by_group else groups.ratio
    cuda = extension.load("cuda")
    shares = cuda.gradient_shares(groups.total, columns, d, slots, multiprocessors(right))
    out = right.new_empty(shares, slots, columns, d, dtype=torch.float32)
    cuda.weight_gradient(
        target(right),
        dtype=dtype_code(right.dtype),
        groups=groups_kernel(groups),
        by_group=by_group,
        left=address(rows),
        left_columns=r,
        scores=address(scores),
        score_columns=score_columns,
        ones=ones,
        right=right.data_ptr(),
        right_stride=right.stride(0),
        d=d,
        norm=norm_kernel(normed.norm),
        moments=address(normed.moments),
        shares=shares,
        out=out.data_ptr(),
    )
    of_rows, of_scores, of_ones = out.split([r, score_columns, int(ones)], 2)
    return Sums(of_rows.sum((0, 1)), of_scores.sum(0), of_ones.sum((0, 1)))
