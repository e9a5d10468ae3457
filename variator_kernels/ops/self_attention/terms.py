"""The additive terms of a model's scores: what a query and a key add to ``scale · q·k``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Table(NamedTuple):
    """T5's terms of the distance: ``weight [buckets, H]``, and where the last bucket begins."""

    weight: Tensor
    max_distance: int = 128


class BlockTable(NamedTuple):
    """Terms of global keys, of the distance between a query's block of tokens and theirs."""

    table: Table
    size: int
    """Tokens of a block."""


class PlaceTable(NamedTuple):
    """A table of T5's kind over places that are not columns (LayoutLMv3: edges of boxes)."""

    table: Table
    places: Tensor
    """Of tokens, whole numbers ``[B or 1, n]``."""


class Distances(NamedTuple):
    """What terms of content and distance read (DeBERTa): one vector a distance."""

    vectors: Tensor
    """``[2 · span, d]``: of distances query - key, from -span on; beyond: the first or the last."""
    buckets: int = 0
    """Half of it exact, the rest logarithmic; 0: each distance is its own."""
    max_distance: int = 0
    """Where the last bucket begins."""

    def columns(self, distance: Tensor) -> Tensor:
        """Rows of :attr:`vectors` for integer ``distance`` (key - query)."""
        span = self.vectors.shape[0] // 2
        found = -distance
        if self.buckets > 0 and self.max_distance > 0:
            found = log_buckets(found, self.buckets, self.max_distance)
        return (found + span).clamp(0, 2 * span - 1)


class Terms(NamedTuple):
    """All of one sublayer's."""

    table: Table | None = None
    window: tuple[int, int] | None = None
    """A token is seen from so many before to so many behind a query; None: from everywhere."""
    places: tuple[PlaceTable, ...] = ()
    distances: Distances | None = None
    blocks: BlockTable | None = None

    @property
    def nothing(self) -> bool:
        alone = self.table is None and self.window is None and self.blocks is None
        return alone and not self.of_pairs

    @property
    def of_pairs(self) -> bool:
        """Whether there are terms that no function of one distance gives."""
        return bool(self.places) or self.distances is not None

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """That may ask for a gradient."""
        found = [] if self.table is None else [self.table.weight]
        found += [] if self.blocks is None else [self.blocks.table.weight]
        found += [place.table.weight for place in self.places]
        found += [] if self.distances is None else [self.distances.vectors]
        return tuple(found)

    def detached(self) -> Terms:
        """The same without gradients."""
        table, _, places, distances, blocks = self
        if table is not None:
            table = table._replace(weight=table.weight.detach())
        places = tuple(
            p._replace(table=p.table._replace(weight=p.table.weight.detach())) for p in places
        )
        if distances is not None:
            distances = distances._replace(vectors=distances.vectors.detach())
        if blocks is not None:
            weight = blocks.table.weight.detach()
            blocks = blocks._replace(table=blocks.table._replace(weight=weight))
        return self._replace(table=table, places=places, distances=distances, blocks=blocks)


def log_buckets(distance: Tensor, buckets: int, most: int) -> Tensor:
    """DeBERTa-v2's bucket of each integer ``distance``, as ``transformers`` computes it: in fp32,
    whose rounding decides at the edges."""
    middle = buckets // 2
    size = distance.abs()
    ratio = torch.log(size.clamp_min(middle) / middle) / torch.log(
        torch.tensor((most - 1) / middle, device=distance.device)
    )
    far = torch.ceil(ratio * (middle - 1)) + middle
    return torch.where(size <= middle, distance, (far * distance.sign()).long())
