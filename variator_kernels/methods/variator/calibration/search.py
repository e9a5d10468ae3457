"""The model's error at its end, and the step that a fitted plugin takes towards it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from ....runtime.level import Level
from ....runtime.site import Site
from ....runtime.state import State
from .inputs import Chunk
from .streams import Blocks, Store

STEPS = (1.0, 0.5, 0.25)
"""Tried shares of the fitted correction; the values before are tried too."""
Values = list[Tensor]


class Errors:
    """Relative squared errors of the last hidden state, on held-out sequences."""

    def __init__(self, blocks: Blocks, state: State, chunks: Mapping[int, Chunk]) -> None:
        self.blocks, self.chunks, self.state = blocks, chunks, state
        self.real = [chunk.mask.nonzero(as_tuple=True) for chunk in chunks.values()]
        self.dense = [self._last(chunk, 1, 0, None) for chunk in chunks.values()]
        self.dense = [x[real].float() for x, real in zip(self.dense, self.real, strict=True)]
        self.total = sum(float(x.double().square().sum()) for x in self.dense)

    def upto(self, level: Level, site: Site, stream: Store | None) -> float:
        """The sites up to this one compressed, on what ``stream`` has in front of its block."""
        before = [other for other in self.state.sites if _place(other) <= _place(site)]
        return self.of(self._part(level, before), site.layer, stream)

    def alone(self, level: Level, site: Site, dense: Store | None) -> float:
        """Only this site compressed."""
        return self.of(self._part(level, [site]), site.layer, dense)

    def _part(self, level: Level, sites: Iterable[Site]) -> Level:
        """These sites and those that share their modules compressed, the others dense."""
        state = self.state
        owners = {state.owners[state.sites.index(site)] for site in sites}
        pairs = zip(level.ratios, state.owners, strict=True)
        return Level(tuple(k if owner in owners else 1 for k, owner in pairs))

    def of(self, level: Any, begin: int = 0, stream: Store | None = None) -> float:
        """At this level, the blocks from ``begin`` on what ``stream`` holds of the ones before."""
        found = self.differences(level, begin, stream)
        return self.relative(sum(float(x.double().square().sum()) for x in found))

    def relative(self, squared: float) -> float:
        """An error from the sum of the squares of :meth:`differences`."""
        error = squared / self.total if self.total else 0.0
        return error if math.isfinite(error) else math.inf

    def differences(
        self, level: Any, begin: int = 0, stream: Store | None = None
    ) -> Iterator[Tensor]:
        """Of each chunk's tokens, from the dense model's: ``[tokens, d]``."""
        for (i, chunk), real, dense in zip(self.chunks.items(), self.real, self.dense, strict=True):
            x = self._last(chunk, level, begin, stream[i] if stream is not None else None)
            yield x[real].float() - dense

    def _last(self, chunk: Chunk, level: Any, begin: int, hidden: Tensor | None) -> Tensor:
        return self.blocks.run(chunk.inputs, level, begin, hidden=hidden)


def _place(site: Site) -> tuple[int, bool]:
    """In the order in which sites run."""
    return site.layer, site.placement == "ffn"


def values(plugin: Any) -> Values:
    return [parameter.detach().clone() for parameter in plugin.parameters()]


def put(plugin: Any, found: Sequence[Tensor]) -> None:
    for parameter, value in zip(plugin.parameters(), found, strict=True):
        parameter.copy_(value)


def search(
    plugin: Any, before: Values, errors: Callable[[], tuple[float, float]]
) -> tuple[float, float, float]:
    """Leaves in ``plugin`` the longest step from ``before`` to its values that harms nowhere.

    ``errors`` are those with the sites before compressed too, and with this site alone. Returns
    the second, before and after, and the step.
    """
    fitted = values(plugin)
    put(plugin, before)
    start = errors()
    for step in STEPS:
        put(plugin, fitted)
        if hasattr(plugin, "adapter"):
            plugin.adapter.w2.mul_(step)
            plugin.adapter.b2.mul_(step)
        else:
            put(plugin, [a.lerp(b, step) for a, b in zip(before, fitted, strict=True)])
        now = errors()
        if now[0] < start[0] and now[1] <= start[1]:
            return start[1], now[1], step
    put(plugin, before)
    return start[1], start[1], 0.0
