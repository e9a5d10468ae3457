"""What levels cost, over the dense encoder: counted in multiply-adds, or measured in time."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from .. import flops
from ..methods.variator.calibration.inputs import Chunk
from ..methods.variator.calibration.streams import Blocks, Store
from ..runtime.kept import are_among
from ..runtime.level import Level
from ..runtime.state import State
from .options import Choice, Options

ROUNDS = 7
BATCHES = 8
"""That are timed, the smallest and the largest among them."""
Key = TypeVar("Key", bound=Hashable)


class Costs(Protocol):
    """What levels cost, over the dense one."""

    def visit(self, layer: int, stream: Store | None) -> None:
        """Measure the options at a layer; ``stream`` has what the dense model has in front."""
        ...

    def of(self, choices: Iterable[Choice]) -> dict[Choice, float]:
        """The whole encoder's."""
        ...

    def options(self) -> np.ndarray:
        """What each option alone adds to the dense cost, ``[options]``."""
        ...


class MultiplyAdds:
    """By :func:`flops.count`, over all batches. They add up over sites, so each option is counted
    once."""

    def __init__(
        self, model: nn.Module, state: State, chunks: list[Chunk], options: Options
    ) -> None:
        self.model, self.choices = model, options
        self.rows = [_rows(chunk, state.kept.ids) for chunk in chunks]
        self.dense = self._total(options.dense)
        self.added = [
            self._total(options.alone(option)) - self.dense if k > 1 else 0
            for option, (_, k) in enumerate(options.every)
        ]

    def visit(self, layer: int, stream: Store | None) -> None:
        """There is nothing to measure."""

    def of(self, choices: Iterable[Choice]) -> dict[Choice, float]:
        return {
            choice: (self.dense + sum(self.added[option] for option in choice)) / self.dense
            for choice in choices
        }

    def options(self) -> np.ndarray:
        return np.array(self.added) / self.dense

    def _total(self, choice: Choice) -> int:
        level = self.choices.level(choice)
        counts = (
            flops.count(self.model, length=lengths, ratio=level, kept=kept)
            for lengths, kept in self.rows
        )
        return sum(count.multiply_adds.total for count in counts)


def _rows(chunk: Chunk, ids: tuple[int, ...]) -> tuple[list[int], Tensor | None]:
    """The lengths of its rows, and where tokens of these ids stand among a row's real ones."""
    lengths = chunk.mask.sum(1).tolist()
    if not ids or "input_ids" not in chunk.inputs:
        return lengths, None
    found = are_among(chunk.inputs["input_ids"], ids)
    kept = torch.zeros(len(lengths), max(lengths), dtype=torch.bool)
    for row, (n, here, real) in enumerate(zip(lengths, found, chunk.mask, strict=True)):
        kept[row, :n] = here[real]
    return lengths, kept


class Seconds:
    """Measured: arms interleaved, medians. Some of the batches stand for all."""

    def __init__(self, blocks: Blocks, chunks: list[Chunk], options: Options) -> None:
        self.blocks, self.choices = blocks, options
        by_size = sorted(range(len(chunks)), key=lambda i: chunks[i].mask.numel())
        self.chunks = {by_size[i]: chunks[by_size[i]] for i in spread(len(chunks))}
        self.added = np.zeros(len(options.every))
        self.dense = _medians({(): lambda: self._run(1)}, self._settle)[()]

    def visit(self, layer: int, stream: Store | None) -> None:
        # A shared module runs in several layers: it is timed in each.
        choices = self.choices
        there = [
            option
            for option, (module, k) in enumerate(choices.every)
            if k > 1 and layer in choices.layers[module]
        ]
        levels: dict[int | None, Any] = {None: 1}
        levels |= {option: choices.level(choices.alone(option)) for option in there}

        hidden = {i: stream[i] for i in self.chunks} if stream else {}

        def one(level: Any) -> Callable[[], None]:
            return lambda: self._run(level, layer, layer + 1, hidden)

        found = _medians({key: one(level) for key, level in levels.items()}, self._settle)
        for option in there:
            self.added[option] += found[option] - found[None]

    def of(self, choices: Iterable[Choice]) -> dict[Choice, float]:
        def one(level: Level) -> Callable[[], None]:
            return lambda: self._run(level)

        wanted = dict.fromkeys((self.choices.dense, *choices))
        calls = {choice: one(self.choices.level(choice)) for choice in wanted}
        found = _medians(calls, self._settle)
        return {choice: found[choice] / found[self.choices.dense] for choice in wanted}

    def options(self) -> np.ndarray:
        """In proportion to the blocks' times, with the sum that the cheapest choice has in the
        whole encoder: there groups are made once a forward, not once a block."""
        added = self.added / self.dense
        cheapest = self.choices.least(added)
        together, predicted = self.of([cheapest])[cheapest] - 1, added[list(cheapest)].sum()
        return added * (together / predicted) if together < 0 and predicted < 0 else added

    def _run(
        self,
        level: Any,
        begin: int = 0,
        end: int | None = None,
        hidden: Mapping[int, Tensor] = MappingProxyType({}),
    ) -> None:
        for i, chunk in self.chunks.items():
            self.blocks.run(chunk.inputs, level, begin, end, hidden.get(i))

    def _settle(self) -> None:
        """What runs on a device is done."""
        if next(iter(self.chunks.values())).mask.is_cuda:
            torch.cuda.synchronize()


def spread(number: int) -> list[int]:
    """Up to :data:`BATCHES` of ``range(number)``, the first and the last among them."""
    count = min(BATCHES, number)
    return [i * (number - 1) // max(count - 1, 1) for i in range(count)]


def _medians(
    calls: Mapping[Key, Callable[[], None]], settle: Callable[[], None]
) -> dict[Key, float]:
    """Median seconds of each call, after one that is not timed; each once a round, in an order
    that changes: drift of the machine hits all alike."""
    for call in calls.values():
        call()
    seconds: dict[Key, list[float]] = {key: [] for key in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    for _ in range(ROUNDS):
        shuffle(order)
        for key in order:
            settle()
            start = time.perf_counter()
            calls[key]()
            settle()
            seconds[key].append(time.perf_counter() - start)
    return {key: statistics.median(found) for key, found in seconds.items()}
