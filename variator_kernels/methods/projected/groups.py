"""What of a projected model is trained at which rate."""

from __future__ import annotations

from typing import Any

from torch import nn

from .composition import addition_of, composed, composition_of

RATE = 1 / 30
"""Of P, as a part of that of A: with one rate for both the method loses to hard pruning."""


def projections(model: nn.Module) -> list[nn.Parameter]:
    """Every P, once."""
    parts = [composition_of(module) for _, module in composed(model)]
    return [p for part in parts for p in (part.p_in, part.p_out) if p is not None]


def additions(model: nn.Module) -> list[nn.Parameter]:
    """Every A, once."""
    return [addition_of(module) for _, module in composed(model)]


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    projection_rate: float = RATE,
    weight_decay: float = 0.0,
    projection_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """For an optimizer: A at ``learning_rate`` and P at ``projection_rate`` times it, each with its
    decay; and all else (norms, biases, matrices that keep their size), without decay for vectors.
    """
    p, a = projections(model), additions(model)
    known = {id(parameter) for parameter in (*p, *a)}
    rest = [q for q in model.parameters() if q.requires_grad and id(q) not in known]
    matrices = [q for q in rest if q.dim() > 1]
    vectors = [q for q in rest if q.dim() <= 1]
    found = [
        {"params": p, "lr": learning_rate * projection_rate, "weight_decay": projection_decay},
        {"params": [*a, *matrices], "lr": learning_rate, "weight_decay": weight_decay},
        {"params": vectors, "lr": learning_rate, "weight_decay": 0.0},
    ]
    return [group for group in found if group["params"]]
