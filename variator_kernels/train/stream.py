"""The order of training rows: fixed by the seed and the position alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

MEGABATCH = 50
"""Steps' worth of rows that are sorted by length together."""


class Stream(Dataset):
    """``rows`` over and over, in a new order each pass, ``length`` rows in all.

    Position p of the stream is the same row in every process, on any number of devices and after
    any number of restarts: read it from front to back. Rows with a ``draw(row, turn)`` method get
    the number of the pass too, for noise that is new each time and still repeatable.

    Args:
        rows: a map-style dataset of dicts with ``input_ids``.
        length: positions of the stream.
        batch: rows of one step over all devices. With ``group``, rows of similar length share one.
    """

    def __init__(self, rows: Any, length: int, batch: int, seed: int, group: bool = True) -> None:
        self.rows = rows
        self.length = length
        self.batch = batch
        self.seed = seed
        self.sizes = [len(rows[i]["input_ids"]) for i in range(len(rows))] if group else None
        self._turn = -1
        self._order: Sequence[int] = ()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, position: int) -> Any:
        turn, offset = divmod(position, len(self.rows))
        if turn != self._turn:
            self._turn, self._order = turn, self.order(turn)
        row = self._order[offset]
        draw = getattr(self.rows, "draw", None)
        return self.rows[row] if draw is None else draw(row, turn)

    def order(self, turn: int) -> list[int]:
        """The rows of one pass.

        Not ``transformers``' grouping: it leaves neighbouring steps sorted by length, and ratios
        are dealt to neighbouring steps too, so that some would see long rows alone.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + turn)
        order = torch.randperm(len(self.rows), generator=generator).tolist()
        if self.sizes is None:
            return order
        sizes, mega = self.sizes, MEGABATCH * self.batch
        # The first rows complete the step that the pass before has begun.
        begun = -turn * len(order) % self.batch
        head, order = order[:begun], order[begun:]
        for start in range(0, len(order), mega):
            order[start : start + mega] = sorted(
                order[start : start + mega], key=lambda row: sizes[row]
            )
        whole = len(order) // self.batch
        batches = [order[i * self.batch : (i + 1) * self.batch] for i in range(whole)]
        shuffled = torch.randperm(whole, generator=generator).tolist()
        return [*head, *(row for i in shuffled for row in batches[i]), *order[whole * self.batch :]]
