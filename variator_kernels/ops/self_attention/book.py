"""What decides which keys stay whole, and what is known of a cache that was filled so.

A row's real tokens are counted; the first ``kept`` of them stay whole, and the *rank* of the others
counts from 0. The query of rank s sees the kept keys, the merged keys of the groups 0 .. G-1 with
G = min(max(0, s + 1 - window) // k, s // k), and the plain keys of the ranks kG .. s. So no query
sees anything of a token behind it, and a prompt may come whole, in chunks or token by token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROLLBACK = 64
"""As many tokens of the last forward can be taken back again."""


class Scheme(NamedTuple):
    """What a layer merges: ``ratio`` k, the ``window`` of plain keys (the query's own is one of
    them), the first tokens that are ``kept``."""

    ratio: int
    window: int
    kept: int

    def switch(self, group: Tensor) -> Tensor:
        """The rank of the first query that sees the merged key of ``group``, and no longer the
        plain ones."""
        return (group + 1) * self.ratio + max(0, self.window - 1)

    def count(self, rank: int) -> int:
        """:meth:`groups` of one number."""
        return min(max(0, rank + 1 - self.window), max(0, rank)) // self.ratio

    def slot(self, number: int, plain: int) -> int:
        """Where among a row's entries its token ``number`` lies, behind whose ring of ``plain``
        keys the kept ones do."""
        rank = number - self.kept
        return plain + number if rank < 0 else rank % plain

    def groups(self, rank: Tensor) -> Tensor:
        """How many merged keys the query of ``rank`` sees: G above; 0 for a kept one, below 0."""
        behind = (rank + 1 - self.window).clamp_min(0) // self.ratio
        return torch.minimum(behind, rank.clamp_min(0) // self.ratio)


class Book(NamedTuple):
    """What is known of a cache: of its rows ``[B]``, the same for all layers of one scheme.

    A plain key lies in slot ``rank % plain`` of its ring, the input of an unfinished group in slot
    ``rank % recent``.
    """

    columns: int
    """Tokens of a row that went in, padding too."""
    seen: Tensor
    """int64 ``[B]``: of these the real ones."""
    every: int | None
    """The same of all rows, as long as none had padding."""
    oldest: Tensor
    """int64 ``[B]``: the lowest rank whose plain key is still there."""
    oldest_recent: Tensor
    """int64 ``[B]``: the same of inputs."""
    positions: Tensor
    """float64 ``[B, recent]``: the model's positions of recent tokens."""
    plain: int
    recent: int
    shown: Tensor | None
    """bool ``[B, columns]``: which of the columns held a token; None: all."""
    full: int
    """So many last columns hold a token in every row."""

    @staticmethod
    def empty(rows: int, device: torch.device) -> Book:
        """Of a cache that nothing went into."""
        zeros = torch.zeros(rows, dtype=torch.int64, device=device)
        nowhere = zeros.new_zeros((rows, 0), dtype=torch.float64)
        return Book(0, zeros, 0, zeros, zeros, nowhere, 0, 0, None, 0)

    def of_rows(self, index: Tensor) -> Book:
        """Of rows that were picked, or repeated."""
        index = index.to(self.seen.device)
        return self._replace(
            seen=self.seen[index],
            oldest=self.oldest[index],
            oldest_recent=self.oldest_recent[index],
            positions=self.positions[index],
            shown=None if self.shown is None else self.shown[index],
        )

    def cropped(self, columns: int, scheme: Scheme) -> Book:
        """Without the last ``columns``.

        Raises:
            ValueError: what the queries in their place would need is gone, or some were padding.
        """
        if columns > self.columns:
            raise ValueError(f"crop must take back at most {self.columns} tokens, got {columns}")
        if columns > self.full:
            raise ValueError(
                f"crop cannot take back {columns} tokens, of which some rows have padding: only "
                f"the last {self.full} are whole"
            )
        seen = self.seen - columns
        rank = (seen - scheme.kept).clamp_min(0)
        unfinished = rank % scheme.ratio
        gone = (unfinished > 0) & (self.oldest_recent > rank - unfinished)
        gone |= self.oldest > scheme.groups(rank) * scheme.ratio
        if columns and bool(gone.any()):
            raise ValueError(
                f"crop cannot take back {columns} tokens: the plain keys and inputs that were "
                "merged are gone, except for what the last forward brought (its last "
                f"{ROLLBACK} tokens; an assistant drafts its tokens one by one, so its own keys "
                "cannot be merged)"
            )
        every = None if self.every is None else self.every - columns
        shown = None if self.shown is None else self.shown[:, : self.columns - columns]
        return self._replace(
            columns=self.columns - columns,
            seen=seen,
            every=every,
            shown=shown,
            full=self.full - columns,
        )
