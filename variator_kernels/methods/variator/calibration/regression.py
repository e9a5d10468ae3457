"""Ridge regression from streamed moments, of full or of limited rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

RIDGES = (1.0, 3e-1, 1e-1, 3e-2, 3e-3)
"""Tried strengths, in units of each input's variance."""


class Moments:
    """Weighted first and second moments of pairs (z, t), added up in float64.

    Those of a batch are made in fp32: nothing of the number of samples is kept. They are of the
    distances from ``origin_z [p]`` and ``origin_t [q]``; near the means, squares keep their digits.
    """

    def __init__(self, origin_z: Tensor, origin_t: Tensor) -> None:
        self.origin_z, self.origin_t = origin_z, origin_t
        self.total = 0.0
        self.z = self.t = self.zz = self.zt = self.tt = torch.zeros((), dtype=torch.float64)

    def add(self, z: Tensor, t: Tensor, weight: Tensor) -> None:
        """``z [N, p]``, ``t [N, q]``, ``weight [N, 1]``."""
        z, t = z - self.origin_z, t - self.origin_t
        wz = z * weight
        self.total += float(weight.double().sum())
        self.z = self.z.to(z.device) + wz.sum(0).double()
        self.t = self.t.to(z.device) + (t * weight).sum(0).double()
        self.zz = self.zz.to(z.device) + (wz.T @ z).double()
        self.zt = self.zt.to(z.device) + (wz.T @ t).double()
        self.tt = self.tt.to(z.device) + (t * weight * t).double().sum()

    def centred(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Means of z and t, from the origin; covariances of z, and of z with t."""
        mean_z, mean_t = self.z / self.total, self.t / self.total
        covariance = self.zz / self.total - torch.outer(mean_z, mean_z)
        return mean_z, mean_t, covariance, self.zt / self.total - torch.outer(mean_z, mean_t)


class Line(NamedTuple):
    """``t ≈ weight · (z - mean_in) + mean_out``, ``weight [q, p]``; fp32."""

    weight: Tensor
    mean_in: Tensor
    mean_out: Tensor
    error: float
    """Mean squared error on what was held out."""

    def predict(self, z: Tensor) -> Tensor:
        """``[N, p]`` to ``[N, q]``."""
        return (z - self.mean_in) @ self.weight.T + self.mean_out


class Fit(NamedTuple):
    """``t ≈ left · right · (z - mean_in) + mean_out``; ``left [q, r]`` has orthonormal columns."""

    left: Tensor
    right: Tensor
    mean_in: Tensor
    deviation: Tensor
    """``[r]``: the standard deviation of ``right · z``."""


def regression(fitted: Moments, held_out: Moments, ridges: Sequence[float] = RIDGES) -> Line:
    """The best linear map of ``fitted``, of the ridges the one that ``held_out`` likes best."""
    full, error = _best(fitted, held_out, ridges)
    mean_in, mean_out, _, _ = fitted.centred()
    mean_in, mean_out = fitted.origin_z + mean_in, fitted.origin_t + mean_out
    return Line(full.T.float(), mean_in.float(), mean_out.float(), error)


def reduced_rank(
    fitted: Moments, held_out: Moments, rank: int, ridges: Sequence[float] = RIDGES
) -> Fit:
    """The same, of at most ``rank``."""
    full, _ = _best(fitted, held_out, ridges)
    mean_in, _, covariance, _ = fitted.centred()
    # The directions of the output that the fit explains most of.
    values, vectors = torch.linalg.eigh(full.T @ covariance @ full)
    left = vectors[:, -rank:].flip(-1)
    deviation = values[-rank:].flip(-1).clamp_min(0).sqrt()
    right = (full @ left).T
    mean = fitted.origin_z + mean_in
    return Fit(left.float(), right.float(), mean.float(), deviation.float())


def _best(fitted: Moments, held_out: Moments, ridges: Sequence[float]) -> tuple[Tensor, float]:
    """``[p, q]`` and its error on ``held_out``."""
    _, _, covariance, cross = fitted.centred()
    variance = covariance.diagonal()
    variance = variance.clamp_min(1e-9 * float(variance.mean()) + 1e-30)
    # Far from the origin, what an input varies by is lost in the rounding of its square.
    rounding = 1e-7 * torch.maximum(variance, fitted.zz.diagonal() / fitted.total)
    tried = []
    for ridge in ridges:
        factor = _factor(covariance + torch.diag(ridge * variance), rounding)
        full = torch.cholesky_solve(cross, factor)
        tried.append((full, _error(fitted, full, held_out)))
    return min(tried, key=lambda pair: pair[1])


def _factor(matrix: Tensor, rounding: Tensor) -> Tensor:
    """Cholesky's factor of a matrix whose diagonal is right up to some multiple of ``rounding``."""
    for times in (1.0, 10.0, 100.0):
        factor, failed = torch.linalg.cholesky_ex(matrix + torch.diag(times * rounding))
        if not failed:
            return factor
    return torch.linalg.cholesky(matrix + torch.diag(1000.0 * rounding))


def _error(fitted: Moments, full: Tensor, held_out: Moments) -> float:
    """Mean squared error, on ``held_out``, of a map whose means are those of ``fitted``."""
    if not held_out.total:
        return 0.0  # of several strengths the first: the strongest
    mean_z, mean_t, _, _ = fitted.centred()
    offset, total = mean_t - full.T @ mean_z, held_out.total
    squared = (
        held_out.tt / total
        + ((held_out.zz / total) @ full * full).sum()
        - 2 * (held_out.zt / total * full).sum()
        + 2 * offset @ (full.T @ (held_out.z / total) - held_out.t / total)
        + offset @ offset
    )
    return float(squared)
