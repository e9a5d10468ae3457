"""Distillation loss and accuracy over a data set: sums of rows, and the means of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import losses

Correct = Callable[[Any, Mapping[str, Any]], Tensor]
"""``correct(outputs, batch)``: ``[B]``, whether each row was answered right."""


def rows(
    teacher: Any,
    students: Iterable[Any],
    batch: Mapping[str, Any],
    correct: Correct | None,
    embed: losses.Embed | None = None,
) -> Tensor:
    """What :func:`metrics` adds up, ``[B, ...]``: 1, tokens of both stacks, right (the teacher);
    then of each student the errors in both stacks, right, and the cosine of its embedding to the
    teacher's. Students may be made one by one."""
    masks = losses.masks(batch)
    none = torch.zeros(len(masks[0]), device=masks[0].device)

    def right(outputs: Any) -> Tensor:
        return none if correct is None else correct(outputs, batch).float()

    sizes = [mask.sum(-1).float() for mask in masks]
    columns = [none + 1, *sizes, *([none] * (2 - len(sizes))), right(teacher)]
    for student in students:
        pairs = zip(losses.stacks(student), losses.stacks(teacher), masks, strict=True)
        errors = [losses.squared_errors(a[-1], b[-1], mask) for a, b, mask in pairs]
        columns += [*errors, *([none] * (2 - len(errors))), right(student)]
        columns.append(none if embed is None else losses.cosines(embed, student, teacher, batch))
    return torch.stack(columns, -1)


def metrics(
    sums: Sequence[float],
    ratios: Sequence[int | str],
    prefix: str,
    accuracy: bool,
    cosine: bool = False,
) -> dict[str, float]:
    """Means over tokens and rows: ``eval_k4_loss``, ``eval_k4_accuracy``, ``eval_k4_cosine``."""
    count, encoder, decoder, dense = sums[:4]
    found = {}
    if accuracy:
        found[f"{prefix}_dense_accuracy"] = dense / count
    total = 0.0
    for i, ratio in enumerate(ratios):
        first, second, right, near = sums[4 + 4 * i : 8 + 4 * i]
        loss = first / max(encoder, 1) + second / max(decoder, 1)
        total += loss
        name = f"{prefix}_k{ratio}" if isinstance(ratio, int) else f"{prefix}_{ratio}"
        found[f"{name}_loss"] = loss
        if accuracy:
            found[f"{name}_accuracy"] = right / count
        if cosine:
            found[f"{name}_cosine"] = near / count
    found[f"{prefix}_loss"] = total / len(ratios)
    return found
