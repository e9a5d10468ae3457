"""How a share of the parameters is divided between hidden and FFN size: several ways are tried."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ...sites.residual import Layout
from . import calibration_data as data
from .calibration_data import Batch
from .sizes import Sizes, splits

TRIES = 6
"""Most ways that are tried, from the widest stream down,"""
ENOUGH = 2
"""until so many in a row are worse than the best."""
TOKENS = 4096
"""That a try is fitted to; a quarter as many tell how near it comes."""
LOG = logging.getLogger(__name__)
Start = Callable[[Sizes, bool, list[Batch]], Any]


def searched(
    model: Any, layout: Layout, share: float, untied: list[bool], batches: list[Batch],
    start: Start, alike: tuple[Sizes, bool],
) -> tuple[Sizes, bool]:  # fmt: skip
    """The sizes, and whether the head is a matrix of its own, whose start is nearest the original.

    Nearest is the least divergence from the original's distributions over tokens, on batches that
    the tries do not see; with one batch alone, on that one.

    Args:
        untied: what may be tried of the head.
        start: a small model of these sizes, fitted to batches.
        alike: both widths made smaller alike: the answer where there are no two ways.
    """
    ways = {own: splits(model, layout, share, own, TRIES) for own in untied}
    if sum(map(len, ways.values())) < 2:
        return alike
    fitted, held_out = _divided(batches)
    errors: dict[tuple[Sizes, bool], float] = {}
    for own, some in ways.items():
        worse, best = 0, math.inf
        for sizes in some:
            error = _divergence(model, start(sizes, own, fitted), layout, held_out)
            LOG.info("hidden size %d, FFN size %d%s: %.4g from the original", *sizes,
                     ", a head of its own" if own and len(untied) > 1 else "", error)  # fmt: skip
            errors[sizes, own] = error
            worse, best = (0, error) if error < best else (worse + 1, best)
            if worse == ENOUGH:
                break
    return min(errors, key=lambda way: errors[way])


def _divided(batches: list[Batch]) -> tuple[list[Batch], list[Batch]]:
    """What tries are fitted to and judged by: rows of the first batches, and of the last."""
    held_out = list(_some(reversed(batches), TOKENS // 4)) if len(batches) > 1 else batches
    rest = batches[: max(1, len(batches) - len(held_out))]
    return list(_some(rest, TOKENS)), held_out


def _some(batches: Any, most: int) -> Iterator[Batch]:
    """The first batches with that many tokens together, at least one, the last one cut to rows."""
    left = most
    for batch in batches:
        if left <= 0:
            return
        rows, length = batch["input_ids"].shape
        kept = min(rows, -(-left // length))
        left -= kept * length
        yield {k: v[:kept] if _has_rows(v, rows) else v for k, v in batch.items()}


def _has_rows(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 1 and len(value) == rows


def _divergence(model: Any, small: Any, layout: Layout, batches: list[Batch]) -> float:
    """Mean over tokens, in nats; for models without a head, the relative squared error of what
    they give."""
    total, count = 0.0, 0
    for batch in batches:
        given = data.arguments(model, layout, batch)
        mask = data.masks(layout, given)[-1]
        ours, theirs = (_given(part(**given)) for part in (small, model))
        if ours.dim() > 2:
            ours, theirs = (o.flatten(0, 1) if mask is None else o[mask] for o in (ours, theirs))
        count += len(ours)
        if layout.head:
            ours, theirs = (part.float().log_softmax(-1) for part in (ours, theirs))
            total += F.kl_div(ours, theirs, reduction="sum", log_target=True).item()
        else:
            unit = theirs.double().square().mean(0).sum()
            total += ((ours.double() - theirs).square().sum() / unit).item()
    return total / count if math.isfinite(total) else math.inf


def _given(out: Any) -> Tensor:
    found: Tensor = out.logits if "logits" in out else out[0]
    return found
