"""The keys and values that a decoder keeps of one layer: merged, kept and plain ones."""

from __future__ import annotations

import torch
from torch import Tensor

from .book import Book, Scheme
from .steps import Step

GROWTH = 4
"""Merged keys that there is room for beyond those that there are."""


class MergedKeys:
    """Of one layer: ``entries [B, 2, H_kv, entries, head_size]`` are ``merged_keys`` and
    ``merged_values``, which nobody can take for those of tokens.

    Entries are a ring of plain keys (slot = rank modulo its size), the kept tokens, and the merged
    keys in order, with some room behind. ``recent [B, ., d]`` has the inputs of the group that is
    not complete yet. What lies where is in ``book``.
    """

    scheme: Scheme
    book: Book
    entries: Tensor
    recent: Tensor

    @property
    def merged_keys(self) -> Tensor:
        """``[B, H_kv, entries, head_size]``."""
        return self.entries[:, 0]

    @property
    def merged_values(self) -> Tensor:
        return self.entries[:, 1]

    def before(self, rows: int, device: torch.device) -> Book:
        """What went in before a forward of ``rows``.

        Raises:
            ValueError: other rows did.
        """
        if not self.book.columns:
            return Book.empty(rows, device)
        if len(self.book.seen) != rows:
            raise ValueError(
                f"past_key_values must be of {rows} rows, as the input, got {len(self.book.seen)}"
            )
        return self.book

    def leave_inference(self) -> None:
        """What inference mode wrote is copied outside of it, where it could not be written to."""
        if torch.compiler.is_compiling():  # attention itself runs outside of a graph, and asks then
            return
        entries: Tensor | None = self.entries
        if entries is None or not entries.is_inference() or torch.is_inference_mode_enabled():
            return
        self.entries, self.recent = entries.clone(), self.recent.clone()

    @property
    def room(self) -> int:
        """For so many merged keys."""
        return self.entries.shape[3] - self.book.plain - self.scheme.kept

    def counts(self) -> dict[str, list[int]]:
        """Of each row, for the next query's predecessor s: its ``visible`` entries, and the merged
        ones that are still ``hidden`` by the window."""
        rank = self.book.seen - self.scheme.kept - 1
        groups = self.scheme.groups(rank)
        complete = (rank + 1).clamp_min(0) // self.scheme.ratio
        kept = self.book.seen.clamp_max(self.scheme.kept)
        plain = (rank + 1).clamp_min(0) - groups * self.scheme.ratio
        return {
            "visible": (kept + groups + plain).tolist(),
            "hidden": (complete - groups).tolist(),
            "unfinished": ((rank + 1).clamp_min(0) % self.scheme.ratio).tolist(),
        }

    def append_single(self, step: Step, k: Tensor, v: Tensor) -> None:
        """One plain key and value a row, ``[B, 1, H_kv, head_size]``, in place."""
        both, before = torch.cat((k, v), 1), step.past.every
        if before is not None:
            self.entries.select(3, self.scheme.slot(before, step.plain)).copy_(both)
            return
        rows = torch.arange(step.rows, device=k.device)
        ranks = step.past.seen - self.scheme.kept
        slots = torch.where(ranks < 0, step.plain + step.past.seen, ranks % step.plain)
        self.entries[rows, :, :, slots] = both

    def remember_single(self, step: Step, h: Tensor) -> None:
        """The input ``[B, 1, d]`` that a group is made of later."""
        before = step.past.every
        if before is not None:
            self.recent.narrow(1, (before - self.scheme.kept) % step.recent, 1).copy_(h)
        else:
            rows = torch.arange(step.rows, device=h.device)
            self.recent[rows, (step.past.seen - self.scheme.kept) % step.recent] = h[:, 0]

    def append_merged(self, step: Step, rows: Tensor | None, k: Tensor, v: Tensor) -> None:
        """The one group that ``rows`` (None: all, at the same place) completed."""
        behind = step.plain + self.scheme.kept
        if step.held_groups >= self.room:
            self.grow()
        both = torch.cat((k, v), 1)
        if rows is None:
            assert step.every is not None
            at = behind + (step.every - self.scheme.kept) // self.scheme.ratio - 1
            self.entries.select(3, at).copy_(both)
        else:
            self.entries[rows, :, :, behind + step.first_group[rows]] = both

    def grow(self) -> None:
        """Room for some more merged keys."""
        shape = (*self.entries.shape[:3], GROWTH, self.entries.shape[4])
        self.entries = torch.cat((self.entries, self.entries.new_zeros(shape)), 3)

    def rebuild(
        self, step: Step, h: Tensor, k: Tensor, v: Tensor, k_m: Tensor, v_m: Tensor
    ) -> None:
        """All of it anew, from what there was and what came: ``k``, ``v [B, n, H_kv, head_size]``,
        and the same of the merged ones."""
        old = bool(step.past.columns)
        recent = torch.cat((self.recent, h), 1) if old else h
        self.recent = _picked(recent, step.recent_from)
        room = step.held_groups + step.groups + GROWTH
        number = torch.arange(room, device=h.device).expand(step.rows, -1)
        fresh = number - step.first_group[:, None]
        merged = torch.where(fresh < 0, number, fresh + (self.room if old else 0))
        made = []
        for which, plain, groups in ((0, k, k_m), (1, v, v_m)):
            kept = plain
            if old:
                held = self.entries[:, which].transpose(1, 2)
                ring, whole, there = held.split((step.past.plain, self.scheme.kept, self.room), 1)
                groups = torch.cat((there, groups), 1)
                kept, plain = torch.cat((whole, plain), 1), torch.cat((ring, plain), 1)
            if groups.shape[1] == 0:
                groups = k.new_zeros(step.rows, 1, *k.shape[2:])
            parts = (
                _picked(plain, step.plain_from),
                _picked(kept, step.kept_from),
                _picked(groups, merged.clamp(0, groups.shape[1] - 1)),
            )
            made.append(torch.cat(parts, 1).transpose(1, 2))
        self.entries = torch.stack(made, 1)


def _picked(tokens: Tensor, index: Tensor) -> Tensor:
    """``tokens [B, m, ...]`` at ``index [B, .]``."""
    rows = torch.arange(tokens.shape[0], device=tokens.device)[:, None]
    return tokens[rows, index]
