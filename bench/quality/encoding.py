"""Measured time of ``SentenceTransformer.encode``, dense against k, for each kind of text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import variator_kernels as vk

from ..cases.models import fill
from ..harness.results import Row
from . import embedders, speed, text

ROWS = 32
"""Texts of one batch, as in ``encode``; texts of similar length share one."""


@torch.no_grad()
def measure(
    base: str, folders: list[Path], texts: dict[str, list[str]], ratios: tuple[int, ...],
    rounds: int,
) -> list[Row]:  # fmt: skip
    """A row a kind of text, what is kept, placements, and ratio: seconds of ``encode`` over
    all of its texts.

    ``folders``: of plugins; their values do not matter. A row whose hidden states are not right,
    against float64, has no time. The original runs as Hugging Face runs it.
    """
    models: dict[tuple[str, int, tuple[str, ...]], Any] = {}
    for folder in folders:
        model = embedders.load(base)
        vk.load_plugins(model, folder)
        fill(model, 0)
        models.setdefault(embedders.kept(model), model)
    made: list[Row] = []
    for kind, lines in texts.items():
        made += _measure(kind, lines, models, ratios, rounds)
    return made


def _measure(
    kind: str, lines: list[str], models: dict[Any, Any], ratios: tuple[int, ...], rounds: int
) -> list[Row]:  # fmt: skip
    def over_all(model: Any, k: int) -> Callable[[], Any]:
        def run() -> Any:
            with vk.use_ratio(model, k):
                return embedders.encode(model, lines)

        return run

    dense = next(iter(models.values()))
    inputs = batches(dense.tokenizer, lines, dense.max_seq_length)
    keys = [(kept, k) for kept in models for k in ratios]
    verdicts = {}
    for kept, k in keys:
        inner = models[kept][0].auto_model
        verdicts[kept, k] = speed.check(inner, inner, inputs[len(inputs) // 2], k)
    calls: dict[Any, Callable[[], Any]] = {"dense": over_all(dense, 1)}
    calls |= {(kept, k): over_all(models[kept], k) for kept, k in keys}
    times = speed.timed(calls, verdicts, "dense", rounds)
    made = []
    for kept, k in keys:
        row: Row = {"text": kind, "kept": kept[0], "bottleneck": kept[1], "k": k}
        row["placements"] = list(kept[2])
        row |= speed.cost(models[kept][0].auto_model, inputs, k)
        made.append(row | times[kept, k])
    return made


def batches(tokenizer: Any, lines: list[str], longest: int) -> list[dict[str, Any]]:
    """What ``encode`` feeds to the encoder: rows of similar length share a batch."""
    return text.tokenized(sorted(lines, key=len), tokenizer, longest, ROWS)
