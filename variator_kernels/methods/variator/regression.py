"""Reduced-rank ridge regression from streamed moments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

RIDGES = (1e-2, 3e-2, 1e-1)
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

    def __add__(self, other: Moments) -> Moments:
        """Of both, which have the same origin."""
        both = Moments(self.origin_z, self.origin_t)
        for name in ("total", "z", "t", "zz", "zt", "tt"):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        return both

    def centred(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Means of z and t, from the origin; covariances of z, and of z with t."""
        mean_z, mean_t = self.z / self.total, self.t / self.total
        covariance = self.zz / self.total - torch.outer(mean_z, mean_z)
        return mean_z, mean_t, covariance, self.zt / self.total - torch.outer(mean_z, mean_t)


class Fit(NamedTuple):
    """``t ≈ left · right · (z - mean_in) + mean_out``; ``left [q, r]`` has orthonormal columns.

    ``deviation [r]`` is the standard deviation of ``right · z``. ``error`` is the mean squared
    error, on what was held out, of the map that the rank does not limit.
    """

    left: Tensor
    right: Tensor
    mean_in: Tensor
    mean_out: Tensor
    deviation: Tensor
    error: float

    def predict(self, z: Tensor) -> Tensor:
        """``[N, p]`` to ``[N, q]``."""
        return (z - self.mean_in) @ self.right.T @ self.left.T + self.mean_out


def reduced_rank(fitted: Moments, held_out: Moments, rank: int) -> Fit:
    """The best linear map of at most ``rank``, its ridge chosen on ``held_out``, from both.

    Returns:
        The fit in fp32.
    """
    errors = [_error(fitted, _solve(fitted, ridge), held_out) for ridge in RIDGES]
    error, ridge = min(zip(errors, RIDGES, strict=True))
    both = fitted + held_out
    mean_in, mean_out, covariance, _ = both.centred()
    full = _solve(both, ridge)
    # The directions of the output that the fit explains most of.
    values, vectors = torch.linalg.eigh(full.T @ covariance @ full)
    rank = min(rank, len(values))
    left = vectors[:, -rank:].flip(-1)
    deviation = values[-rank:].flip(-1).clamp_min(0).sqrt()
    return Fit(
        left.float(),
        (full @ left).T.float(),
        (both.origin_z + mean_in).float(),
        (both.origin_t + mean_out).float(),
        deviation.float(),
        error,
    )


def _solve(moments: Moments, ridge: float) -> Tensor:
    """``[p, q]``: ridge regression of t on z."""
    _, _, covariance, cross = moments.centred()
    variance = covariance.diagonal()
    variance = variance.clamp_min(1e-9 * float(variance.mean()) + 1e-30)
    factor = torch.linalg.cholesky(covariance + torch.diag((ridge + 1e-7) * variance))
    return torch.cholesky_solve(cross, factor)


def _error(fitted: Moments, full: Tensor, held_out: Moments) -> float:
    """Mean squared error, on ``held_out``, of a map whose means are those of ``fitted``."""
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
