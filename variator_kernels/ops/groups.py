"""Which tokens form a group: spans of real tokens, cut into k slots."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Groups(NamedTuple):
    """Which tokens form which group, of one input at one ratio: made once a forward."""

    ratio: int
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None


def make_groups(
    x: Tensor,
    ratio: int,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "reference",
) -> Groups:
    """The groups of ``x [B, n, d]`` or varlen ``[T, d]``, as ``backend`` (resolved) reads them."""
    return Groups(ratio, mask, cu_seqlens)


def max_groups(x: Tensor, ratio: int, cu_seqlens: Tensor | None = None) -> int:
    """The most groups ``x`` can have: in a row of ``[B, n, d]``, in all of packed ``[T, d]``."""
    if cu_seqlens is None:
        return -(-x.shape[1] // ratio)
    sequences = cu_seqlens.shape[0] - 1
    return (x.shape[0] + sequences * (ratio - 1)) // ratio


def slots(
    x: Tensor, ratio: int, mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Where each group's slots lie, without host synchronisation.

    Returns ``index`` (int64, token index into the flat ``[tokens, d]`` view of ``x``) and
    ``exists`` (bool), both ``[B, G, k]``, or ``[G, k]`` for packed input. A slot that holds no
    token has an arbitrary but valid index.
    """
    groups = max_groups(x, ratio, cu_seqlens)
    slot = torch.arange(ratio, device=x.device)
    if cu_seqlens is not None:
        cu = cu_seqlens.long()
        lengths = cu.diff()
        ends = ((lengths + ratio - 1) // ratio).cumsum(0)
        group = torch.arange(groups, device=x.device)
        row = torch.searchsorted(ends, group, right=True).clamp_max(max(len(lengths) - 1, 0))
        if len(lengths) == 0:
            return slot.new_zeros(groups, ratio), slot.new_zeros(groups, ratio, dtype=torch.bool)
        first = ends - (lengths + ratio - 1) // ratio
        position = (group - first[row])[:, None] * ratio + slot
        exists = (position < lengths[row][:, None]) & (group < ends[-1])[:, None]
        index = (cu[row][:, None] + position).clamp(0, max(x.shape[0] - 1, 0))
        return index, exists
    batch, n = x.shape[:2]
    position = torch.arange(groups, device=x.device)[:, None] * ratio + slot
    row = torch.arange(batch, device=x.device)[:, None, None]
    if mask is None:
        position = position.expand(batch, groups, ratio)
        exists = position < n
    else:
        real = mask != 0
        start = real.int().argmax(-1) if n else real.new_zeros(batch, dtype=torch.long)
        position = position + start[:, None, None]
        inside = position < n
        exists = inside & (real[row, position.clamp(0, max(n - 1, 0))] if n else inside)
    return row * n + position.clamp(0, max(n - 1, 0)), exists


def token_slots(
    x: Tensor, ratio: int, mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`slots`: each token's slot in the flattened ``[.., G, k]`` arrays.

    Returns ``slot`` (int64) and ``real`` (bool), both ``[B, n]`` or ``[T]``; a token that is
    not real has an arbitrary but valid slot.
    """
    groups = max_groups(x, ratio, cu_seqlens)
    if cu_seqlens is not None:
        cu = cu_seqlens.long()
        token = torch.arange(x.shape[0], device=x.device)
        if cu.shape[0] < 2:
            return token.new_zeros(x.shape[0]), torch.zeros_like(token, dtype=torch.bool)
        counts = (cu.diff() + ratio - 1) // ratio
        row = (torch.searchsorted(cu, token, right=True) - 1).clamp(0, counts.shape[0] - 1)
        slot = (counts.cumsum(0) - counts)[row] * ratio + token - cu[row]
        real = (token >= cu[0]) & (token < cu[-1])
        return torch.where(real, slot, 0), real
    batch, n = x.shape[:2]
    position = torch.arange(n, device=x.device).expand(batch, n)
    if mask is None:
        real = torch.ones_like(position, dtype=torch.bool)
    else:
        real = mask != 0
        start = real.int().argmax(-1) if n else real.new_zeros(batch, dtype=torch.long)
        position = (position - start[:, None]).clamp_min(0)
    row = torch.arange(batch, device=x.device)[:, None]
    return row * (groups * ratio) + position, real
