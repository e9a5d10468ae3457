"""Which tokens form which group: data that every op reads (:mod:`make_groups` makes it).

Groups are data: a start, a span of up to k slots and perhaps a kept flag each, so groups of unequal
size need nothing new. A row's groups start at its first real token that is not kept and run to its
last; slots of padding inside a span stay empty.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Keep(NamedTuple):
    """Which real tokens stay whole: groups of their own, without merge and adapter."""

    first: int = 0
    """Of each row, or sequence."""
    last: int = 0
    mask: Tensor | None = None
    """bool ``[B, n]``, or ``[T]`` for varlen input: further ones; padding in it is ignored."""

    @property
    def nothing(self) -> bool:
        """Whether it names no token, whatever the input."""
        return self.first == 0 and self.last == 0 and self.mask is None


NOTHING_KEPT = Keep()


class Groups(NamedTuple):
    """The groups of one input; token indices are int64, into the flat ``[tokens, d]`` list.

    Three forms. ``"listed"`` names every group, ``[B, G]`` or, for varlen input, ``[G]``. The GPU
    kernels compute the others: ``"plain"`` (no padding, no tensor) and ``"masked"`` (``start [B]``
    is the position of a row's first real token). There every token belongs to exactly one slot,
    also padding, so a kernel that walks over all slots writes every row of an output.
    """

    start: Tensor | None
    """A group's first token."""
    span: Tensor | None
    """How many slots it has, 0 to k; of these the ones that ``mask`` leaves out are empty."""
    owned: Tensor | None
    """Listed groups on a GPU: how many tokens its slots write, real or passed on. Of varlen input
    there is one group more, which merges nothing and may own tokens outside the sequences."""
    kept: Tensor | None
    """bool, as ``start``: this group is one token that stays whole, without merge and adapter."""
    mask: Tensor | None
    """bool ``[B, n]``; None if there is no padding."""
    ratio: int
    """k, the most slots a group has."""
    form: str

    def shape(self, x: Tensor) -> tuple[int, ...]:
        """``(B, G)``, or ``(G,)`` for varlen input: the groups of ``x [B, n, ...]``, ``[T, ...]``
        that have a merged vector."""
        if self.form != "listed":
            return x.shape[0], max_groups(x, self.ratio)
        assert self.start is not None
        if self.owned is not None and self.start.dim() == 1:
            return (self.start.shape[0] - 1,)
        return tuple(self.start.shape)


SCHEMA = (
    "Tensor? start, Tensor? span, Tensor? owned, Tensor? kept, Tensor? mask, int ratio, str form"
)
"""The fields of :class:`Groups` as arguments of a registered op."""
FIELDS = len(Groups._fields)


def max_groups(
    x: Tensor, ratio: int, cu_seqlens: Tensor | None = None, keep: Keep = NOTHING_KEPT
) -> int:
    """The most groups ``x`` can have: in a row of ``[B, n, d]``, in all of varlen ``[T, d]``."""
    tokens: Any = x.shape[1] if cu_seqlens is None else x.shape[0]  # a tensor while it is traced
    if keep.mask is not None:
        return tokens  # perhaps each is kept
    kept: Any = keep.first + keep.last
    if kept > 0 and not isinstance(tokens, Tensor):
        if tokens == 0:
            return 0
        kept = torch.sym_min(kept, tokens)  # however many are asked for
    rows = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    # A kept token leaves k-1 slots empty, so may each row's last group. Not -(-n // k): exporters
    # truncate.
    return (tokens + rows * (kept + 1) * (ratio - 1)) // ratio


def count_tokens(x: Tensor) -> int:
    """B * n, or T: how many tokens ``x [B, n, d]`` or ``[T, d]`` holds."""
    return x.shape[0] * x.shape[1] if x.dim() == 3 else x.shape[0]  # numel() would be a constant


def first_real(mask: Tensor) -> Tensor:
    """``[B]``: the position of each row's first real token; 0 where there is none."""
    n: Any = mask.shape[1]  # a tensor while it is traced: nobody traces without a token
    if not isinstance(n, Tensor) and n == 0:
        return mask.new_zeros(len(mask), dtype=torch.long)
    return mask.int().argmax(-1)


def _cut(first: Tensor, length: Tensor, groups: int, ratio: int) -> tuple[Tensor, Tensor]:
    """Rows of ``length [B, 1]`` tokens from ``first [B, 1]`` on, cut into ``groups`` each."""
    position = torch.arange(0, groups * ratio, ratio, device=first.device)
    left = length - position
    return first + torch.where(left > 0, position, 0), left.clamp(0, ratio)


def plain_lists(
    rows: int, n: int, ratio: int, device: torch.device | str, spare: int = 0
) -> tuple[Tensor, Tensor]:
    """Start and span ``[B, G]`` of a batch without padding; ``spare`` groups are empty."""
    first = torch.arange(rows, device=device)[:, None] * n
    length = torch.zeros_like(first) + n
    return _cut(first, length, (n + ratio - 1) // ratio + spare, ratio)


def masked_lists(mask: Tensor, ratio: int, spare: int = 0) -> tuple[Tensor, Tensor]:
    """Start and span ``[B, G]`` for a bool mask ``[B, n]``; ``spare`` groups are empty."""
    rows, n = mask.shape
    first = first_real(mask)
    last = n - first_real(mask.flip(-1))
    length = torch.where(mask.any(-1), last - first, 0)
    start = torch.arange(rows, device=mask.device) * n + first
    return _cut(start[:, None], length[:, None], (n + ratio - 1) // ratio + spare, ratio)


def varlen_lists(tokens: int, cu_seqlens: Tensor, ratio: int) -> tuple[Tensor, Tensor, Tensor]:
    """Start, span and owned tokens of as many groups as there can be, and one more.

    Groups behind the last real one own the tokens outside ``cu_seqlens[0] .. cu_seqlens[-1]`` (they
    wrap around at the end of the list).
    """
    sequences = cu_seqlens.shape[0] - 1
    groups = (tokens + sequences * (ratio - 1)) // ratio + 1
    group = torch.arange(groups, device=cu_seqlens.device)
    first, last = cu_seqlens[0], cu_seqlens[-1]
    lengths = cu_seqlens.diff()
    if sequences == 0:
        used = torch.zeros_like(last)
        start = span = torch.zeros_like(group)
    else:
        counts = (lengths + ratio - 1) // ratio
        ends = counts.cumsum(0)
        used = ends[-1]
        row = torch.searchsorted(ends, group, right=True).clamp_max(sequences - 1)
        position = (group - (ends - counts)[row]) * ratio
        start = cu_seqlens[row] + position
        span = (lengths[row] - position).clamp(0, ratio)
    real = group < used
    behind = (group - used) * ratio
    outside = tokens - (last - first)
    start = torch.where(real, start, last + behind)
    span = torch.where(real, span, 0)
    return start, span, torch.where(real, span, (outside - behind).clamp(0, ratio))


def slots(groups: Groups) -> tuple[Tensor, Tensor]:
    """Where each slot of listed ``groups`` lies in the flat list of tokens.

    Returns ``index`` (int64) and ``exists`` (bool), both ``[B, G, k]``, or ``[G, k]`` for varlen
    input. A slot behind a group's span has index 0.
    """
    start, span = groups.start, groups.span
    assert start is not None and span is not None
    slot = torch.arange(groups.ratio, device=start.device)
    exists = slot < span[..., None]
    index = torch.where(exists, start[..., None] + slot, 0)
    if groups.mask is not None:
        exists = exists & groups.mask.reshape(-1)[index]
    return index, exists


def token_slots(groups: Groups, tokens: int) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`slots`: the slot of each token in the flattened ``[.., G, k]`` arrays.

    Returns ``slot`` (int64) and ``real`` (bool), both ``[tokens]``; a token that is not real has an
    arbitrary but valid slot.
    """
    index, exists = slots(groups)
    # Slots without a token write to a place of their own.
    place = torch.where(exists, index, tokens).flatten()
    number = torch.arange(place.shape[0], device=place.device)
    slot = number.new_zeros(tokens + 1).scatter(0, place, number)[:tokens]
    real = torch.zeros(tokens + 1, dtype=torch.bool, device=place.device)
    return slot, real.scatter(0, place, torch.ones_like(place, dtype=torch.bool))[:tokens]


def real_tokens(groups: Groups, x: Tensor) -> Tensor | None:
    """bool, as ``x [B, n, ...]`` or varlen ``[T, ...]`` without its last dimension: which tokens
    are real; None if all are."""
    if groups.mask is not None:
        return groups.mask
    if x.dim() == 3:
        return None
    listed = groups
    if groups.owned is not None:
        listed = groups._replace(owned=None)
    return token_slots(listed, x.shape[0])[1]
