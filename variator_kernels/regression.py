"""Reduced-rank ridge regression from streamed moments."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

RIDGES = (1e-3, 1e-2, 1e-1)
"""Tried strengths, in units of each input's variance."""


class Moments:
    """Weighted first and second moments of pairs (z, t), summed in float64.

    Products are made in fp32, batch by batch: nothing of the number of samples is kept.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self.z = self.t = self.zz = self.zt = self.tt = torch.zeros((), dtype=torch.float64)

    def add(self, z: Tensor, t: Tensor, weight: Tensor) -> None:
        """``z [N, p]``, ``t [N, q]``, ``weight [N, 1]``."""
        wz = z * weight
        self.total += float(weight.double().sum())
        self.z = self.z.to(z.device) + wz.double().sum(0)
        self.t = self.t.to(z.device) + (t * weight).double().sum(0)
        self.zz = self.zz.to(z.device) + (wz.T @ z).double()
        self.zt = self.zt.to(z.device) + (wz.T @ t).double()
        self.tt = self.tt.to(z.device) + (t * weight * t).double().sum()

    def __add__(self, other: Moments) -> Moments:
        both = Moments()
        for name, value in vars(self).items():
            setattr(both, name, value + vars(other)[name])
        return both

    def centred(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Means of z and t; covariances of z, and of z with t."""
        mean_z, mean_t = self.z / self.total, self.t / self.total
        covariance = self.zz / self.total - torch.outer(mean_z, mean_z)
        return mean_z, mean_t, covariance, self.zt / self.total - torch.outer(mean_z, mean_t)


class Fit(NamedTuple):
    """``t ≈ left · right · (z - mean_in) + mean_out``; ``left [q, r]`` has orthonormal columns.

    ``deviation [r]`` is the standard deviation of ``right · z``, ``error`` the mean squared error
    on what was held out.
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
    errors = [_error(_solve(fitted, rank, ridge), held_out) for ridge in RIDGES]
    error, ridge = min(zip(errors, RIDGES, strict=True))
    return _solve(fitted + held_out, rank, ridge)._replace(error=error)


def _solve(moments: Moments, rank: int, ridge: float) -> Fit:
    mean_z, mean_t, covariance, cross = moments.centred()
    variance = covariance.diagonal()
    variance = variance.clamp_min(1e-9 * float(variance.mean()) + 1e-30)
    full = torch.linalg.solve(covariance + torch.diag(ridge * variance), cross)
    # The directions of the output that the fit explains most of.
    explained = full.T @ covariance @ full
    values, vectors = torch.linalg.eigh(explained)
    rank = min(rank, len(values))
    left = vectors[:, -rank:].flip(-1)
    return Fit(
        left.float(),
        (full @ left).T.float(),
        mean_z.float(),
        mean_t.float(),
        values[-rank:].flip(-1).clamp_min(0).sqrt().float(),
        float("nan"),
    )


def _error(fit: Fit, moments: Moments) -> float:
    """Mean squared error of ``fit`` on ``moments``."""
    weights = (fit.left @ fit.right).double()
    offset = fit.mean_out.double() - weights @ fit.mean_in.double()
    total = moments.total
    squared = (
        moments.tt / total
        + ((weights @ (moments.zz / total)) * weights).sum()
        - 2 * ((moments.zt / total).T * weights).sum()
        + 2 * offset @ (weights @ (moments.z / total) - moments.t / total)
        + offset @ offset
    )
    return float(squared)
