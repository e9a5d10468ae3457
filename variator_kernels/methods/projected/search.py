"""How a share of the parameters is divided between hidden and FFN size: several ways are tried."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ...sites.residual import Layout
from . import calibration_data as data
from .calibration_data import IGNORED, Batch
from .sizes import Sizes, splits

TRIES = 6
"""Most ways that are tried, from the widest stream down,"""
ENOUGH = 2
"""until so many in a row are worse than the best."""
TOKENS = 4096
"""That a try is fitted to; at most a quarter as many tell how near it comes."""
ROWS = 256
"""Of logits that are compared at a time."""
LOG = logging.getLogger(__name__)
Start = Callable[[Sizes, bool, list[Batch]], Any]


def searched(
    model: Any, layout: Layout, share: float, heads: list[bool], batches: list[Batch],
    start: Start, alike: tuple[Sizes, bool],
) -> tuple[Sizes, bool]:  # fmt: skip
    """The sizes, and whether the head is a matrix of its own, whose start is nearest the original.

    Nearest is the least divergence from the original's distributions, on tokens that the tries do
    not see (unless there is one row alone).

    Args:
        heads: what may be tried of the head: whether it is a matrix of its own.
        start: a small model of these sizes, fitted to batches.
        alike: both widths made smaller alike; that hidden size is tried in any case.

    Raises:
        FloatingPointError: no way gave finite numbers.
    """
    ways = {own: splits(model, layout, share, own, TRIES) for own in heads}
    if alike[0].hidden not in {sizes.hidden for sizes in ways[alike[1]]}:
        ways[alike[1]] = sorted([*ways[alike[1]], alike[0]], reverse=True)
    if sum(map(len, ways.values())) < 2:
        return alike
    fitted, held_out = _divided(batches)
    errors: dict[tuple[Sizes, bool], float] = {}
    for own, some in ways.items():
        worse, best = 0, math.inf
        for sizes in some:
            error = _error(model, layout, held_out, partial(start, sizes, own, fitted))
            LOG.info("hidden size %d, FFN size %d%s: %.4g from the original", *sizes,
                     ", a head of its own" if own and len(heads) > 1 else "", error)  # fmt: skip
            errors[sizes, own] = error
            worse, best = (0, error) if error < best else (worse + 1, best)
            if worse == ENOUGH:
                break
    found = min(errors, key=lambda way: errors[way])
    if errors[found] == math.inf:
        raise FloatingPointError("the small models' outputs on batches are not finite")
    return found


def _divided(batches: list[Batch]) -> tuple[list[Batch], list[Batch]]:
    """What tries are fitted to, and what they are judged by: pieces from the beginning and the end,
    different ones if there are two."""
    pieces = [piece for batch in batches for piece in _pieces(batch)] or batches
    whole = sum(piece["input_ids"].numel() for piece in pieces)
    held_out = list(_first(reversed(pieces), min(TOKENS, whole) // 4))
    held_out = held_out[: max(1, len(pieces) - 1)]
    rest = pieces[: max(1, len(pieces) - len(held_out))]
    return list(_first(rest, TOKENS)), held_out


def _pieces(batch: Batch) -> Iterator[Batch]:
    """Rows of a batch, at most a quarter of :data:`TOKENS` if no row is longer. Those without a
    real token are left out."""
    ids = batch["input_ids"]
    rows, length = ids.shape[0], max(1, ids.numel() // max(1, ids.shape[0]))
    step = max(1, TOKENS // 4 // length)
    for begin in range(0, rows, step):
        some = {k: v[begin : begin + step] if _has_rows(k, v, rows) else v
                for k, v in batch.items()}  # fmt: skip
        masks = [some.get(name) for name in ("attention_mask", "decoder_attention_mask")]
        masks += [some["labels"] != IGNORED if isinstance(some.get("labels"), Tensor) else None]
        if all(bool((mask != 0).any()) for mask in masks if mask is not None):
            yield some


def _has_rows(name: str, value: Any, rows: int) -> bool:
    rowed = isinstance(value, Tensor) and value.dim() > 0 and len(value) == rows
    return rowed and name != "cache_position"


def _first(pieces: Iterable[Batch], tokens: int) -> Iterator[Batch]:
    """As many as have so many tokens together, at least one."""
    left = tokens
    for place, piece in enumerate(pieces):
        if place and left <= 0:
            return
        left -= piece["input_ids"].numel()
        yield piece


def _error(model: Any, layout: Layout, batches: list[Batch], start: Callable[[], Any]) -> float:
    """The mean divergence over tokens, in nats; infinite where numbers are not finite."""
    try:
        small = start()
    except FloatingPointError:
        return math.inf
    total, count = 0.0, 0
    for batch in batches:
        given = data.arguments(model, layout, batch) | {"return_dict": True}
        mask = data.masks(layout, given)[-1]
        ours, theirs = (part(**given).logits for part in (small, model))
        if ours.dim() > 2:
            ours, theirs = (o.flatten(0, 1) if mask is None else o[mask] for o in (ours, theirs))
        count += len(ours)
        for one, other in zip(ours.split(ROWS), theirs.split(ROWS), strict=True):
            total += _divergence(one.float(), other.float())
    return total / count if math.isfinite(total) else math.inf


def _divergence(ours: Tensor, theirs: Tensor) -> float:
    """Summed over rows. A single number is no distribution: its squared error."""
    if ours.shape[-1] == 1:
        return float((ours - theirs).square().sum())
    logs = ours.log_softmax(-1), theirs.log_softmax(-1)
    return float(F.kl_div(logs[0], logs[1], reduction="sum", log_target=True))
