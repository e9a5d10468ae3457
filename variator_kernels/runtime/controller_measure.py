"""How long a forward takes at each level, over rows and tokens: measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from .. import checks
from .controller_times import LevelTimes
from .levels import use_ratio
from .warming import Inputs, random_inputs, warm

ROWS, LENGTHS, REPEATS = (1, 4, 16, 32), (16, 32, 64, 128), 5
MOST_TOKENS = 2048
"""Of a cell that is measured by default."""


def measure(
    model: nn.Module,
    levels: Mapping[str, Any],
    rows: Sequence[int] = ROWS,
    lengths: Sequence[int] = LENGTHS,
    inputs: Inputs | None = None,
    repeats: int = REPEATS,
    clock: Callable[[], float] = time.perf_counter,
    most_tokens: int = MOST_TOKENS,
) -> LevelTimes:
    """Medians on this machine, in seconds.

    Levels take turns, so that drift of the machine hits all alike. Cells of more than
    ``most_tokens`` tokens are not run, but counted in proportion to the largest that is.

    Raises:
        ValueError: what :func:`warm` raises.
    """
    checks.integer(repeats, "repeats", 1)
    rows, lengths = sorted(set(rows)), sorted(set(lengths))
    if not rows or not lengths:
        raise ValueError("rows and lengths must each name at least one")
    table: dict[str, list[list[float]]] = {name: [] for name in levels}
    make = inputs or random_inputs(model)
    device = next(model.parameters()).device
    # A GPU's work has only begun when the call returns.
    on_gpu = device.type == "cuda"
    finish: Callable[[], Any] = partial(torch.cuda.synchronize, device) if on_gpu else lambda: None
    for b in rows:
        found: dict[str, list[float]] = {name: [] for name in levels}
        for n in lengths:
            if n > lengths[0] and b * n > most_tokens:
                for cells in found.values():
                    cells.append(cells[-1] * n / lengths[len(cells) - 1])
                continue
            warm(model, levels.values(), (n,), (b,), inputs)
            given = make(b, n)
            samples: dict[str, list[float]] = {name: [] for name in levels}
            for _ in range(repeats):
                for name, level in levels.items():
                    with torch.no_grad(), use_ratio(model, level):
                        finish()
                        start = clock()
                        model(**given)
                        finish()
                        samples[name].append(clock() - start)
            for name, cells in found.items():
                cells.append(statistics.median(samples[name]))
        for name, cells in found.items():
            table[name].append(cells)
    seconds = tuple(tuple(map(tuple, cells)) for cells in table.values())
    return LevelTimes(tuple(levels), tuple(rows), tuple(lengths), seconds)
