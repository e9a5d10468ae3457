"""Perplexity behind a compressed prompt, over that of the dense model on the same tokens."""

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import variator_kernels as vk

from .. import internals
from ..harness.results import Row
from . import setup
from .levels import UNTRAINED, Level
from .timing import Run

LAST = 64
"""Tokens of a sequence that are predicted; those before are the prompt."""
BATCH = 8


@torch.no_grad()
def losses(
    model: Any,
    sequences: Tensor,
    behind: Callable[[], AbstractContextManager] = nullcontext,
    step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Mean negative log-likelihood of the last tokens of each of ``sequences [N, n]``: ``[N]``.

    The prompt is one forward; the last tokens are another, under ``behind()``, which must do what
    single steps do.
    """
    found = []
    for some in sequences.split(BATCH):
        prompt, rest = some[:, :-LAST], some[:, -LAST:]
        out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        with behind():
            more = model(input_ids=rest[:, :-1], past_key_values=out.past_key_values)
        logits = torch.cat((out.logits, more.logits), 1).float()
        found.append(F.cross_entropy(logits.transpose(1, 2), rest, reduction="none").mean(1))
        step()
    return torch.cat(found).double()


def over(losses: Tensor, dense: Tensor) -> dict[str, float]:
    """The ratio of two perplexities, and its standard error over sequences, which are pairs."""
    difference = losses - dense
    ratio = difference.mean().exp().item()
    spread = difference.std().item() if len(difference) > 1 else 0.0
    values = {"perplexity": losses.mean().exp().item(), "over_dense": ratio}
    return values | {"error": ratio * spread / len(difference) ** 0.5}


def measure(kinds: dict[str, dict[Level, Run]], rows: dict[Level, Row], tokens: Tensor,
            args: argparse.Namespace, step: Any) -> None:  # fmt: skip
    """By plugins and length of a sequence, over the dense model's on the same sequences."""
    for length in args.contexts:
        sequences = tokens[: args.sequences * length].view(-1, length)
        dense = losses(kinds[UNTRAINED][Level()].model, sequences, step=step)
        for kind, runs in kinds.items():
            for level, run in runs.items():
                run.begin()
                found = dense
                if level.where:
                    behind = level.behind_prompt(run.model.config.num_hidden_layers)
                    found = losses(
                        run.model, sequences, partial(vk.use_ratio, run.model, behind), step
                    )
                mine = rows[level].setdefault("perplexity", {}).setdefault(kind, {})
                mine[str(length)] = over(found, dense)


def check_folders(folders: list[Path]) -> None:
    """``ValueError`` for folders of plugins that are not there, or have one name."""
    for folder in folders:
        if not (folder / "plugins.json").is_file():
            raise ValueError(f"plugins must be folders with plugins.json, got {folder}")
    names = [UNTRAINED, *(folder.name for folder in folders)]
    if len(set(names)) < len(names):
        raise ValueError(f"plugins must be folders of different names, got {names[1:]}")


def trained(dense: Any, folders: list[Path], wanted: list[Level]) -> dict[str, dict[Level, Run]]:
    """By folder, the levels that its plugins are for, perhaps under another window than theirs.

    Raises:
        ValueError: a folder is for none, or its plugins are another model's.
    """
    made: dict[str, dict[Level, Run]] = {}
    compressed = [level for level in wanted if level.where]
    for folder in folders:
        twins: dict[int | None, Any] = {}
        for level in compressed:
            if level.window not in twins:
                twins[level.window] = setup.with_plugins(dense, folder, level.window)
            run = Run(twins[level.window], level)
            try:
                run.begin()
            except ValueError:
                continue  # plugins of other ratios or placements
            if internals.runs_trained_plugins(run.model):
                made.setdefault(folder.name, {})[level] = run
        if folder.name not in made:
            raise ValueError(
                f"plugins {folder} are trained for none of {', '.join(map(str, compressed))}"
            )
    return made
