"""Distances and answers over a data set: sums of rows, and the means of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import losses
from .objective import Objective

Correct = Callable[[Any, Mapping[str, Any]], Tensor]
"""``correct(outputs, batch)``: ``[B]``, whether each row was answered right."""
DENSE = "dense"


def rows(
    objective: Objective,
    teacher: Any,
    students: Iterable[tuple[str, Any]],
    batch: Mapping[str, Any],
    correct: Correct | None,
) -> dict[str, Tensor]:
    """What :func:`metrics` adds up, ``[B]`` each: of every row 1, its tokens in both stacks and its
    labels; of the teacher, then of each student by its name, what it is measured by. Students may
    be made one by one."""
    masks = losses.masks(batch)
    found = {"rows": torch.ones(len(masks[0]), device=masks[0].device)}
    for i, mask in enumerate(masks):
        found[f"tokens{i}"] = mask.sum(-1).float()

    def measure(name: str, outputs: Any) -> None:
        if correct is not None:
            found[f"{name} accuracy"] = correct(outputs, batch).float()
        said = objective.likelihoods(outputs, teacher, batch)
        if said is not None:
            found["labels"] = (batch["labels"][:, 1:] != losses.IGNORED).sum(-1).float()
            found[f"{name} divergence"], found[f"{name} perplexity"] = said

    measure(DENSE, teacher)
    for name, student in students:
        pairs = zip(losses.stacks(student), losses.stacks(teacher), masks, strict=True)
        for i, (a, b, mask) in enumerate(pairs):
            found[f"{name} loss{i}"] = losses.squared_errors(a[-1], b[-1], mask)
        measure(name, student)
        if objective.pooler is not None:
            near = losses.cosines(objective.pooler, student, teacher, batch)
            found[f"{name} cosine"] = near
    return found


def metrics(sums: Mapping[str, float], names: Iterable[str], prefix: str) -> dict[str, float]:
    """Means over tokens, rows and labels: ``eval_dense_accuracy``, ``eval_k4_loss``,
    ``eval_k4_accuracy``, ``eval_k4_cosine``, ``eval_k4_divergence`` and so on; perplexities are e
    to the mean of what was added up."""
    found, losses_of = {}, []
    for name in (DENSE, *names):
        stacks = [i for i in range(2) if f"{name} loss{i}" in sums]
        if stacks:
            parts = (sums[f"{name} loss{i}"] / max(sums[f"tokens{i}"], 1) for i in stacks)
            losses_of.append(sum(parts))
            found[f"{prefix}_{name}_loss"] = losses_of[-1]
        for what, size in (("accuracy", "rows"), ("cosine", "rows"), ("divergence", "labels")):
            if (key := f"{name} {what}") in sums and not (name == DENSE and what == "divergence"):
                found[f"{prefix}_{name}_{what}"] = sums[key] / max(sums[size], 1)
        if (key := f"{name} perplexity") in sums and sums["labels"] > 0:
            mean = sums[key] / sums["labels"]
            found[f"{prefix}_{name}_perplexity"] = math.exp(min(mean, 700))
    found[f"{prefix}_loss"] = sum(losses_of) / len(losses_of)
    return found


def name_of(ratio: int | str) -> str:
    """Of a level, as it stands in the names of metrics."""
    return f"k{ratio}" if isinstance(ratio, int) else ratio
