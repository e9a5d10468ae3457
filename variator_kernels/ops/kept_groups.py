"""Groups around tokens that stay whole, in plain PyTorch: sizes are fixed, nothing is read back.

A row is cut into runs. Each kept token is a run of its own; what lies between two kept tokens, from
its first real token to its last, is one more, and is cut into groups of k as a whole row would be.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .groups import Keep


def with_rest(x: Tensor, ratio: int, mask: Tensor | None, keep: Keep) -> Keep:
    """``keep``, and the tokens at the end of a row of ``x [B, n, ...]`` that are too few for a
    group. A group in front of a kept token is as whole as any."""
    if keep.last or x.shape[1] == 0:
        return keep
    if mask is None and keep.mask is None:
        first = torch.sym_min(keep.first, x.shape[1])
        return keep._replace(last=(x.shape[1] - first) % ratio)
    real = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    rows = rows_of_batch(real, keep)
    lists = kept_lists(rows, ratio, x.shape[1])
    position = torch.arange(1, x.shape[1] + 1, device=x.device)
    end = torch.where(real, position, 0).amax(1, keepdim=True)
    short = (lists.span > 0) & (lists.span < ratio) & ~lists.kept
    short &= lists.start + lists.owned == end
    begin = torch.where(short, lists.start, x.shape[1]).amin(1, keepdim=True)
    rest = real & (position > begin)
    return keep._replace(mask=rest if keep.mask is None else rest | keep.mask)


class KeptLists(NamedTuple):
    """``[rows, count]`` each; as in :class:`~.groups.Groups`."""

    start: Tensor
    span: Tensor
    owned: Tensor
    kept: Tensor


class Rows(NamedTuple):
    """What is known of each position ``[rows, n]`` before it is cut."""

    real: Tensor
    """bool: there is a token."""
    kept: Tensor
    """bool: it is one that stays whole."""
    heads: Tensor | None = None
    """bool: here a sequence begins; None where each row is one."""


def rows_of_batch(real: Tensor, keep: Keep) -> Rows:
    """Of a bool mask ``[B, n]``."""
    rank = real.long().cumsum(-1)
    behind = rank[:, -1:] - rank if real.shape[1] else rank
    return Rows(real, _kept(real, rank - 1, behind, keep))


def rows_of_sequences(tokens: int, cu_seqlens: Tensor, keep: Keep) -> Rows:
    """Of varlen input: one row ``[1, T]``."""
    position = torch.arange(tokens, device=cu_seqlens.device)
    sequences = cu_seqlens.shape[0] - 1
    if sequences == 0:
        nothing = torch.zeros_like(position, dtype=torch.bool)[None]
        return Rows(nothing, nothing, nothing)
    real = (position >= cu_seqlens[0]) & (position < cu_seqlens[-1])
    row = torch.searchsorted(cu_seqlens, position, right=True).clamp(1, sequences)
    rank, behind = position - cu_seqlens[row - 1], cu_seqlens[row] - 1 - position
    kept = _kept(real, rank, behind, keep)
    return Rows(real[None], kept[None], (real & (rank == 0))[None])


def _kept(real: Tensor, rank: Tensor, behind: Tensor, keep: Keep) -> Tensor:
    """``rank`` and ``behind``: how many real tokens of its row stand before and behind one."""
    kept = (rank < keep.first) | (behind < keep.last)
    return real & (kept if keep.mask is None else kept | (keep.mask != 0))


def kept_lists(rows: Rows, ratio: int, count: int, *, outside: bool = False) -> KeptLists:
    """Cuts each row into at most ``count`` groups, which start at positions in their row.

    ``outside``: positions of no group form pieces of up to k, which own and merge nothing.
    """
    real, kept, heads = rows
    n = real.shape[1]
    position = torch.arange(n, device=real.device).expand(real.shape)
    through = real.long().cumsum(-1)
    before = through - real.long()
    merged = real & ~kept
    # By its number from 1 on: whether a row's real token is one to be merged.
    place = torch.where(real, through, n + 1)
    table = real.new_zeros(real.shape[0], n + 2).scatter(1, place, merged)
    # Between two tokens to be merged with no kept one between them, or one itself.
    inside = table.gather(1, through) & table.gather(1, before + 1)
    first = merged & ~table.gather(1, before)
    if heads is not None:
        first = first | (merged & heads)
    runs, cut = first | kept, inside | kept
    gap = ~cut
    if outside:
        runs, cut = runs | (gap & ~F.pad(gap, (1, 0))[:, :n]), torch.ones_like(cut)
    run = runs.long().cumsum(-1)
    begun = run.new_zeros(run.shape[0], n + 1).scatter(1, torch.where(runs, run, 0), position)
    begins = cut & ((position - begun.gather(1, run)) % ratio == 0)
    ends = cut & ~F.pad(cut & ~begins, (0, 1))[:, 1:]
    # Offsets on a device are not checked: what does not fit goes where nobody looks.
    group = (begins.long().cumsum(-1) - 1).clamp(0, count)

    def by_group(where: Tensor, values: Tensor) -> Tensor:
        made = values.new_zeros(values.shape[0], count + 1)
        return made.scatter(1, torch.where(where, group, count), values)[:, :count]

    start = by_group(begins, position)
    owned = by_group(ends, position + 1) - start
    span = torch.where(by_group(begins, gap), 0, owned)
    return KeptLists(start, span, owned, by_group(begins, kept))
