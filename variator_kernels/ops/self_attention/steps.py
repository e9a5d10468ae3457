"""A causal forward over merged keys, as data: which keys it makes, finds, sees and leaves."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ..groups import Groups
from .book import ROLLBACK, Book, Scheme

_BLOCK = 64
"""A ring of plain keys grows by so many slots."""


class Step:
    """One forward of ``n`` tokens a row on a cache that ``past`` describes."""

    def __init__(
        self,
        scheme: Scheme,
        past: Book,
        real: Tensor | None,
        positions: Tensor,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """``real``: bool ``[B, n]``, None without padding; ``positions [B or 1, n]``; ``dtype`` of
        biases."""
        self.dtype = dtype
        self.scheme, self.past = scheme, past
        self.real = real
        self.rows, self.n = len(past.seen), positions.shape[1]
        self.positions = positions.double().expand(self.rows, -1)
        self.counts = None if real is None else real.long().cumsum(1)
        self.every = None if past.every is None or real is not None else past.every + self.n
        ratio = scheme.ratio
        self.groups = self._made()
        """The most groups that a row completes now."""
        spare = min(self.n, ROLLBACK)
        self.plain, self.recent = scheme.window + ratio - 1 + spare, ratio - 1 + spare
        if self.plain > _BLOCK:  # a wide window needs no more room than there are tokens
            most = self.every if self.every is not None else self._most(self.seen)
            self.plain = min(self.plain, (most // _BLOCK + 1) * _BLOCK)

    @staticmethod
    def _last(counts: Tensor) -> Tensor:
        return counts[:, -1] if counts.shape[1] else counts.new_zeros(len(counts))

    @staticmethod
    def _most(numbers: Tensor) -> int:
        return int(numbers.max()) if len(numbers) else 0

    def _made(self) -> int:
        kept, ratio = self.scheme.kept, self.scheme.ratio
        if self.every is not None and self.past.every is not None:
            return max(0, self.every - kept) // ratio - max(0, self.past.every - kept) // ratio
        return self._most(self.end_group - self.first_group)

    @functools.cached_property
    def seen(self) -> Tensor:
        """``[B]``: real tokens of the rows, with those of this forward."""
        return self.past.seen + (self.n if self.counts is None else self._last(self.counts))

    @functools.cached_property
    def before(self) -> Tensor:
        """``[B]``: the rank of the next token."""
        return (self.past.seen - self.scheme.kept).clamp_min(0)

    @functools.cached_property
    def first_group(self) -> Tensor:
        """``[B]``: the first group that is not complete in the past."""
        return self.before // self.scheme.ratio

    @functools.cached_property
    def end_group(self) -> Tensor:
        """``[B]``: the first one that is not complete now."""
        return (self.seen - self.scheme.kept).clamp_min(0) // self.scheme.ratio

    @property
    def single(self) -> bool:
        """One token in each row: it can be written where it belongs."""
        past = self.past
        same = (past.plain, past.recent) == (self.plain, self.recent)
        return self.n == 1 and self.real is None and same and past.recent == self.scheme.ratio

    def column(self, number: Tensor) -> Tensor:
        """Where the row's real tokens ``number [B, m]``, counted from 0, stand among the ``n``: 0
        for those before, n for those that are yet to come."""
        at = number - self.past.seen[:, None]
        if self.counts is None:
            return at.clamp(0, self.n)
        return torch.searchsorted(self.counts, at + 1)

    @functools.cached_property
    def made(self) -> Tensor:
        """``[B, groups]``: the numbers of the groups that are completed; some rows have fewer."""
        return self.first_group[:, None] + torch.arange(self.groups, device=self.seen.device)

    @functools.cached_property
    def exists(self) -> Tensor:
        """bool ``[B, groups]``."""
        return self.made < self.end_group[:, None]

    @functools.cached_property
    def members(self) -> Tensor:
        """``[B, groups * k]``: the tokens of these groups, in the recent ones with the n behind."""
        offset = torch.arange(self.groups * self.scheme.ratio, device=self.seen.device)
        rank = self.first_group[:, None] * self.scheme.ratio + offset
        column = self.column(rank + self.scheme.kept).clamp_max(self.n - 1) + self.past.recent
        if self.past.recent == 0:
            return column
        return torch.where(rank < self.before[:, None], rank % self.past.recent, column)

    @functools.cached_property
    def in_place(self) -> Groups | None:
        """The groups in the n tokens themselves; None if some member is not among them, or the
        members of one do not stand side by side."""
        kept, ratio = self.scheme.kept, self.scheme.ratio
        before = self.past.every
        if before is not None:
            if max(0, before - kept) % ratio:
                return None
        elif bool((self.before % ratio > 0).any()):
            return None
        if self.real is not None and not _contiguous(self.real):
            return None
        begin = self.column(self.first_group[:, None] * ratio + kept)
        start = begin + ratio * torch.arange(self.groups, device=begin.device)
        row = torch.arange(self.rows, device=begin.device)[:, None] * self.n
        span = torch.where(self.exists, ratio, 0)
        return Groups(
            torch.where(self.exists, start, 0) + row, span, None, None, None, ratio, "listed"
        )

    @functools.cached_property
    def mean_positions(self) -> Tensor:
        """float64 ``[B, groups]``: of the groups' tokens."""
        every = torch.cat((self.past.positions, self.positions), 1)
        return every.gather(1, self.members).unflatten(1, (self.groups, -1)).mean(-1)

    # What the queries see. Keys are those of the cache, the n plain ones, the merged ones.

    @functools.cached_property
    def first(self) -> Tensor:
        """int64 ``[B, keys]``: the first column whose query sees a key."""
        new = torch.arange(self.n, device=self.seen.device).expand(self.rows, -1)
        merged = self.column(self.scheme.switch(self.made) + self.scheme.kept)
        return torch.cat((self._past_first, new, merged), 1)

    @functools.cached_property
    def last(self) -> Tensor:
        """int64 ``[B, keys]``: the first column behind that no longer does."""
        rank = self._ranks
        plain = self._until(rank)
        merged = plain.new_full((self.rows, self.groups), self.n)
        return torch.cat((self._past_last, plain, merged), 1)

    @functools.cached_property
    def bias(self) -> Tensor:
        """``[B, keys]``: the logarithm of the number of tokens; -inf where there is no key."""
        plain = torch.zeros(self.rows, self.n, dtype=self.dtype, device=self.seen.device)
        if self.real is not None:
            plain = plain.masked_fill(~self.real, -math.inf)
        log = math.log(self.scheme.ratio)
        merged = torch.full_like(self.made, log, dtype=self.dtype).masked_fill(
            ~self.exists, -math.inf
        )
        return torch.cat((self._past_bias, plain, merged), 1)

    @property
    def _ranks(self) -> Tensor:
        """Of the n tokens; negative for kept ones."""
        if self.counts is None:
            counts = torch.arange(1, self.n + 1, device=self.seen.device)[None]
        else:
            counts = self.counts
        return self.past.seen[:, None] + counts - 1 - self.scheme.kept

    def _until(self, rank: Tensor) -> Tensor:
        switch = self.column(self.scheme.switch(rank // self.scheme.ratio) + self.scheme.kept)
        return torch.where(rank < 0, self.n, switch)

    @functools.cached_property
    def _held(self) -> Tensor:
        """``[B, plain]``: the rank in each slot of the past ring; nothing below ``oldest`` or 0."""
        return in_slots(self.past.seen - self.scheme.kept - 1, self.past.plain)

    @functools.cached_property
    def held_groups(self) -> int:
        """The most merged keys that a row of the cache has."""
        if self.past.every is not None:
            return max(0, self.past.every - self.scheme.kept) // self.scheme.ratio
        return self._most(self.first_group)

    @property
    def _past_groups(self) -> Tensor:
        return torch.arange(self.held_groups, device=self.seen.device).expand(self.rows, -1)

    @property
    def _past_first(self) -> Tensor:
        if not self.past.columns:
            return self.seen.new_zeros(self.rows, 0)
        there = self.seen.new_zeros(self.rows, self.past.plain + self.scheme.kept)
        merged = self.column(self.scheme.switch(self._past_groups) + self.scheme.kept)
        return torch.cat((there, merged), 1)

    @property
    def _past_last(self) -> Tensor:
        if not self.past.columns:
            return self.seen.new_zeros(self.rows, 0)
        behind = self.seen.new_full((self.rows, self.scheme.kept + self.held_groups), self.n)
        return torch.cat((self._until(self._held), behind), 1)

    @property
    def _past_bias(self) -> Tensor:
        past = self.past
        if not past.columns:
            return torch.zeros(self.rows, 0, dtype=self.dtype, device=self.seen.device)
        plain = self._held >= past.oldest[:, None].clamp_min(0)
        kept = torch.arange(self.scheme.kept, device=self.seen.device) < past.seen[:, None]
        merged = self._past_groups < self.first_group[:, None]
        return _bias((plain, kept, merged), self.scheme.ratio, self.dtype)

    # What is left behind.

    @functools.cached_property
    def oldest(self) -> Tensor:
        return torch.maximum(self.past.oldest, self.seen - self.scheme.kept - self.plain)

    @functools.cached_property
    def book(self) -> Book:
        """What describes the cache afterwards."""
        full = self.n
        if self.real is not None:
            behind = self.real.all(0).flip(0)
            full = int(behind.long().cumprod(0).sum())
        return Book(
            self.past.columns + self.n,
            self.seen,
            self.every,
            self.oldest,
            torch.maximum(self.past.oldest_recent, self.seen - self.scheme.kept - self.recent),
            torch.cat((self.past.positions, self.positions), 1).gather(1, self.recent_from),
            self.plain,
            self.recent,
            self._shown,
            full + (self.past.full if full == self.n else 0),
        )

    @property
    def _shown(self) -> Tensor | None:
        past, real = self.past.shown, self.real
        if past is None and real is None:
            return None
        whole = torch.ones(1, 1, dtype=torch.bool, device=self.seen.device)
        parts = (past, self.past.columns), (real, self.n)
        return torch.cat([whole.expand(self.rows, n) if t is None else t for t, n in parts], 1)

    @functools.cached_property
    def recent_from(self) -> Tensor:
        """``[B, recent]``: the place of each recent token in the old ones with the n behind."""
        return self._ring_from(self.recent, self.past.recent)

    @functools.cached_property
    def plain_from(self) -> Tensor:
        """``[B, plain]``: the same of the plain keys."""
        return self._ring_from(self.plain, self.past.plain)

    def _ring_from(self, size: int, old: int) -> Tensor:
        rank = in_slots(self.seen - self.scheme.kept - 1, size)
        column = self.column(rank + self.scheme.kept).clamp(0, max(self.n - 1, 0)) + old
        return column if old == 0 else torch.where(rank < self.before[:, None], rank % old, column)

    @functools.cached_property
    def kept_from(self) -> Tensor:
        """``[B, kept]``: the same of the kept tokens."""
        number = torch.arange(self.scheme.kept, device=self.seen.device).expand(self.rows, -1)
        old = self.scheme.kept if self.past.columns else 0
        column = self.column(number).clamp_max(max(self.n - 1, 0)) + old
        return column if old == 0 else torch.where(number < self.past.seen[:, None], number, column)

    @functools.cached_property
    def visible(self) -> int:
        """How many entries from the first on the queries of a single step may see."""
        kept = self.scheme.kept
        if self.every is not None:
            return self.plain + kept + self.scheme.count(self.every - kept - 1)
        return self.plain + kept + self._most(self.scheme.groups(self.seen - kept - 1))

    @functools.cached_property
    def bias_after(self) -> Tensor:
        """``[B, visible]``: of the cache's entries, for the queries of a single step, which are
        among them."""
        rank = (self.seen - self.scheme.kept - 1)[:, None]
        groups = self.scheme.groups(rank)
        held = in_slots(rank[:, 0], self.plain)
        plain = held >= torch.maximum(self.oldest[:, None], groups * self.scheme.ratio)
        kept = torch.arange(self.scheme.kept, device=rank.device) < self.seen[:, None]
        merged = (
            torch.arange(self.visible - self.plain - self.scheme.kept, device=rank.device) < groups
        )
        return _bias((plain, kept, merged), self.scheme.ratio, self.dtype)


def in_slots(last: Tensor, size: int) -> Tensor:
    """``[B, size]``: the highest rank up to ``last [B]`` in each slot of a ring."""
    slot = torch.arange(size, device=last.device)
    return last[:, None] - (last[:, None] - slot) % max(size, 1)


def _bias(parts: tuple[Tensor, Tensor, Tensor], ratio: int, dtype: torch.dtype) -> Tensor:
    plain, kept, merged = parts
    there = torch.cat((plain, kept, merged), 1)
    bias = torch.zeros(there.shape, dtype=dtype, device=there.device)
    bias[:, there.shape[1] - merged.shape[1] :] = math.log(ratio)
    return bias.masked_fill(~there, -math.inf)


def _contiguous(real: Tensor) -> bool:
    """Whether no row has padding between its tokens."""
    begins = real[:, :1].long().sum(1) + (real[:, 1:] & ~real[:, :-1]).sum(1)
    return bool((begins <= 1).all())
