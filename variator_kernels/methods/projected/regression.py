"""Least squares on as many tokens as there are: the pull to a prior is as strong as held-out tokens
want it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

RIDGES = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
"""That are tried: parts of the mean square of what is regressed on."""


class Moments:
    """Second moments of pairs ``y [T, out]``, ``x [T, in]``: what least squares needs.

    They are kept in two halves, of half the tokens of each pair, so that what is fitted to one can
    be judged by the other.
    """

    def __init__(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        self.xx: list[Any] = [0.0, 0.0]
        self.yx: list[Any] = [0.0, 0.0]
        count = 0
        for pair in pairs:
            middle = (len(pair[0]) + count % 2) // 2
            count += len(pair[0])
            for half, part in enumerate((slice(middle), slice(middle, None))):
                y, x = (values[part] for values in pair)
                self.xx[half] = self.xx[half] + x.mT @ x
                self.yx[half] = self.yx[half] + y.mT @ x
        if not all(bool(torch.isfinite(half).all()) for half in self.yx):
            raise FloatingPointError("the small model's hidden states on batches are not finite")

    def fitted(self, prior: Tensor, rescale: bool = True) -> Tensor:
        """``[out, in]``: M that brings ``M x`` nearest to y. The prior is what the ridge pulls to,
        times the best number with ``rescale``.

        Of :data:`RIDGES` the one is taken, from the largest down, up to which each half is said
        better and better by what is fitted to the other.
        """
        xx, yx = sum(self.xx), sum(self.yx)
        scale = (prior * yx).sum() / (prior * (prior @ xx)).sum().clamp_min(1e-30)
        prior = prior * scale if rescale else prior
        unit = xx.diagonal().mean().clamp_min(1e-30) / 2
        best, ridge = math.inf, RIDGES[-1]
        for smaller in reversed(RIDGES):
            error = self._held_out(prior, smaller * unit)
            if not error < best:
                break  # weaker pulls fit a half's own noise
            best, ridge = error, smaller
        return _solved(xx, yx, prior, ridge * unit)

    def _held_out(self, prior: Tensor, ridge: Tensor) -> float:
        """The squared error of each half by the other's fit, but for what no fit changes."""
        total = 0.0
        for fit, judge in ((0, 1), (1, 0)):
            found = _solved(self.xx[fit], self.yx[fit], prior, ridge)
            total += float((found * (found @ self.xx[judge] - 2 * self.yx[judge])).sum())
        return total


def _solved(xx: Tensor, yx: Tensor, prior: Tensor, ridge: Tensor) -> Tensor:
    system = xx + ridge * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
    right = (yx - prior @ xx).mT
    factor, failed = torch.linalg.cholesky_ex(system)
    if failed:  # so little ridge that rounding makes it indefinite
        return prior + torch.linalg.solve(system, right).mT
    return prior + torch.cholesky_solve(right, factor).mT
