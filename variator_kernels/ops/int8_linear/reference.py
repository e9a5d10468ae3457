"""int8_linear in plain PyTorch: the definition of a product in int8."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..feed_forward import activate

LEAST = 1e-30
"""A row of no larger number counts as zeros: fp32 would divide by too little."""


class Levels(NamedTuple):
    """Whole numbers reach from 0 to ``rows`` in rows of x, from ``-weight`` to ``weight`` in rows
    of the weight."""

    rows: int = 255
    weight: int = 127


class Quantised(NamedTuple):
    """``numbers [rows, n]`` are whole; what 1 of them stands for is ``scales [rows]``, in fp32."""

    numbers: Tensor
    scales: Tensor


def quantise(rows: Tensor, levels: int) -> Quantised:
    """``rows [rows, n]`` rounded to whole multiples of the largest magnitude in each, over
    ``levels``; in fp32, so that kernels can find the same numbers.

    A row that holds NaN or infinity has the scale NaN, which makes everything of it NaN.
    """
    wide = rows.float()
    largest = wide.abs().amax(1)
    finite = largest.isfinite()
    counts = finite & (largest > LEAST)
    factor = torch.where(counts, levels / largest, 0)
    numbers = torch.where(counts[:, None], wide * factor[:, None], 0).round()
    scales = torch.where(counts, largest / levels, 0)
    return Quantised(numbers, torch.where(finite, scales, torch.nan))


class QuantisedRows(NamedTuple):
    """``numbers [rows, n]`` are whole; a value is ``scales · (numbers - zeros)``, both
    ``[rows, 1]``."""

    numbers: Tensor
    scales: Tensor
    zeros: Tensor


def quantise_rows(x: Tensor, levels: int) -> QuantisedRows:
    """``x [rows, n]`` to whole numbers of 0 to ``levels``, from the least to the largest value of a
    row, 0 among them: that stays exact. In fp32, so that kernels can find the same numbers.

    A row that holds NaN or infinity has the scale NaN, which makes everything of it NaN.
    """
    wide = x.float()
    below = (-wide).amax(1, keepdim=True).clamp_min(0)
    reach = wide.amax(1, keepdim=True).clamp_min(0) + below
    finite = reach.isfinite()
    counts = finite & (reach > LEAST)
    # Not levels / reach, which PyTorch makes a reciprocal and a product, each rounded.
    factor = torch.where(counts, torch.full_like(reach, levels) / reach, 0)
    zeros = (torch.where(counts, below, 0) * factor).round()
    numbers = torch.where(counts, wide * factor, 0).round().add_(zeros).clamp_(0, levels)
    scales = torch.where(counts, reach / levels, 0)
    return QuantisedRows(numbers, torch.where(finite, scales, torch.nan), zeros)


def int8_linear(
    x: Tensor,
    weight: Tensor | Quantised,
    bias: Tensor | None = None,
    *,
    levels: Levels,
    activation: str = "none",
    other: Tensor | None = None,
) -> Tensor:
    """``activation(x · weightᵀ + bias) [* other]`` in float64, of whole numbers: ``x [rows, in]``
    with a scale and a zero point a row, ``weight [out, in]`` with a scale an output channel, or
    as it is if it is quantised."""
    right = weight if isinstance(weight, Quantised) else quantise(weight, levels.weight)
    left = quantise_rows(x, levels.rows)
    y = (left.numbers - left.zeros).double() @ right.numbers.double().t()
    y = y * left.scales.double() * right.scales.double()
    y = y if bias is None else y + bias.double()
    y = y if activation == "none" else activate(y, activation)
    return y if other is None else y * other.double()
