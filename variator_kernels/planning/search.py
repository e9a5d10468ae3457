"""Choosing by predictions, then by what is measured."""

from __future__ import annotations

import math
from collections.abc import Callable

from .losses import Losses
from .options import Choice, Goal, Predictions

TRIES = 12
"""Moves that are measured without success before the search ends."""
MOST = 200
"""Choices that are measured beside the starts."""
Key = Callable[[Choice], tuple[float, float]]


def search(
    predictions: Predictions, losses: Losses, goal: Goal, uniform: list[Choice]
) -> Choice | None:
    """The best choice by measured loss and predicted cost; None: nothing that was measured fits.

    Predictions mislead where many sites are compressed, so all that they propose is measured.
    ``uniform`` are measured too, and so is every option alone: nothing worse than the best of them
    that fits is returned.
    """

    def key(choice: Choice) -> tuple[float, float]:
        return goal.order(predictions.cost(choice), lambda: losses.of(choice))

    for start in (*uniform, *_proposed(predictions, losses, goal, uniform)):
        key(start)
    best = min(losses.known, key=key)
    if key(best)[0] == math.inf:
        return None
    begun = len(losses.known)
    while len(losses.known) < begun + MOST:
        better = _better(predictions, losses, goal, best, key)
        if better is None:
            break
        best = better
    return best


def _better(
    predictions: Predictions, losses: Losses, goal: Goal, best: Choice, key: Key
) -> Choice | None:
    """The first choice near ``best`` that is measured to be better."""
    scale = _scale(predictions, losses, best)
    goals = [goal]
    if goal.loss < math.inf:
        # Predictions may hold back what would fit: then whatever is cheaper, the least loss first.
        goals.append(Goal(cost=predictions.cost(best) * (1 - 1e-6)))
    for wanted in goals:
        left = TRIES
        for choice in predictions.moves(best, wanted, scale):
            if wanted.loss < math.inf and predictions.cost(choice) >= predictions.cost(best):
                break
            if choice not in losses.known:
                if not left:
                    break
                left -= 1
            if key(choice) < key(best):
                return choice
    return None


def _proposed(
    predictions: Predictions, losses: Losses, goal: Goal, uniform: list[Choice]
) -> list[Choice]:
    """What is best by predictions, from several beginnings."""
    path = predictions.path()
    if goal.loss < math.inf:
        # As far down as the measured loss stays within its bound.
        low, high = 0, len(path)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if losses.of(path[middle]) <= goal.loss else (low, middle)
        scale = _scale(predictions, losses, path[low])
        return [path[low], predictions.descend(path[low], goal, scale)]
    return [
        predictions.descend(choice, goal)
        for choice in (*path, *uniform)
        if goal.fits(predictions.cost(choice), predictions.loss(choice))
    ]


def _scale(predictions: Predictions, losses: Losses, choice: Choice) -> float:
    """The measured loss over the predicted one."""
    predicted = predictions.loss(choice)
    return losses.of(choice) / predicted if predicted else 1.0
