"""Terms of attention that depend on the distance of key and query: T5's buckets, local windows."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..transforms import has_values


class DistanceBias(NamedTuple):
    """What a key adds to the scores, by its distance from the query.

    Of query s and key g of row b the column is ``floor(keys[b, g] - queries[b, s] + 0.5) - origin``
    (beyond the ends: the first or last one) of ``values[pattern[b, g], head]``. So nothing of size
    n x G exists; :func:`distance_bias` makes one, once a forward for all layers that share it.
    """

    values: Tensor
    """``[P, H, W]``, or ``[P, 1, W]`` for all heads; -inf: invisible at that distance."""
    queries: Tensor
    """``[B, n]``: positions."""
    keys: Tensor
    """``[B, G]``: positions."""
    pattern: Tensor | None = None
    """int64 ``[B, G]``: which of the P rows a key reads; None: the first."""
    origin: int = 0
    """The distance of column 0."""


def distance_bias(
    table: Tensor | None,
    *,
    queries: Tensor,
    keys: Tensor,
    members: Tensor | None = None,
    window: tuple[int, int] | None = None,
    bidirectional: bool = True,
    max_distance: int = 128,
    dtype: torch.dtype = torch.float32,
) -> DistanceBias:
    """The relative terms of one forward for :func:`grouped_attention`, differentiable in ``table``.

    Without ``members`` (placement ``attention``; plain keys) a key reads the term of the distance
    ``floor(key - query + 0.5)``, both positions perhaps means. With them (``attention_kv``) it gets
    the logsumexp over its tokens of their own terms: exact for holes, tails and windows, and the
    logarithm of their number is in it.

    Args:
        table: T5's ``relative_attention_bias.weight [buckets, H]``; None: no such term.
        queries: positions ``[B, n]``; integers, float32 or float64.
        keys: positions ``[B, G]``; with ``members`` the integer position of slot 0.
        members: bool ``[B, G, k]``: slots that hold a token, slot j at position ``keys + j``. A
            key without a token is invisible.
        window: ``(left, right)``: a token is seen from ``left`` before to ``right`` behind a query.
        bidirectional, max_distance: T5's; the number of buckets is the table's.
        dtype: of the terms, float32 or float64; a table's is at least its own.

    Raises:
        ValueError: a shape, dtype or number does not fit; the message names it.
    """
    _check(table, queries, keys, members, window, max_distance)
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    slots = 1 if members is None else members.shape[-1]
    reach = max_distance if table is not None else 0
    if window is not None:
        reach = max(reach, window[0] + 1, window[1] + 1)
    # From -reach and beyond, and from +reach and beyond, terms no longer change.
    origin = -(reach + slots - 1)
    distance = torch.arange(origin, reach + slots, device=queries.device)
    term = queries.new_zeros(1, distance.shape[0], dtype=dtype)
    if table is not None:
        buckets = t5_buckets(distance, table.shape[0], bidirectional, max_distance)
        term = table.t().to(torch.promote_types(table.dtype, dtype))[:, buckets]
    if window is not None:
        outside = (distance < -window[0]) | (distance > window[1])
        term = term.masked_fill(outside, -math.inf)
    if members is None:
        return DistanceBias(term[None], queries, keys, None, origin)
    patterns, pattern = _patterns(members)
    # [1, H, W, k]; unfold() is an operation that ONNX's older exporter does not know here.
    last = 2 * reach + slots
    windows = torch.stack([term[:, slot : slot + last] for slot in range(slots)], -1)[None]
    values = logsumexp(windows.masked_fill(~patterns[:, None, None], -math.inf))
    return DistanceBias(values, queries, keys, pattern, origin)


def t5_buckets(distance: Tensor, buckets: int, bidirectional: bool, most: int) -> Tensor:
    """T5's bucket of each integer ``distance`` (key - query), as ``transformers`` computes it."""
    base = torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        base = (distance > 0).long() * buckets
        distance = distance.abs()
    else:
        distance = -distance.clamp_max(0)
    exact = buckets // 2
    large = torch.log(distance.float() / exact) / math.log(most / exact) * (buckets - exact)
    # Of distance 0 the logarithm is no number to convert; it is not taken.
    large = exact + torch.where(distance < exact, 0, large).long()
    return base + torch.where(distance < exact, distance, large.clamp_max(buckets - 1))


def joined(first: DistanceBias, second: DistanceBias) -> DistanceBias:
    """Of the keys of both, one after the other, under the same queries."""
    origin = min(first.origin, second.origin)
    end = max(one.origin + one.values.shape[2] for one in (first, second))
    heads = max(first.values.shape[1], second.values.shape[1])
    values, patterns = [], []
    for one in (first, second):
        found = one.values.expand(-1, heads, -1)
        before, behind = one.origin - origin, end - one.origin - found.shape[2]
        ends = found[..., :1].expand(-1, -1, before), found[..., -1:].expand(-1, -1, behind)
        values.append(torch.cat((ends[0], found, ends[1]), -1))
        pattern = torch.zeros_like(one.keys, dtype=torch.int64)
        patterns.append(pattern if one.pattern is None else one.pattern)
    patterns[1] = patterns[1] + values[0].shape[0]
    keys = torch.cat((first.keys, second.keys), 1)
    return DistanceBias(torch.cat(values), first.queries, keys, torch.cat(patterns, 1), origin)


def columns(relative: DistanceBias) -> Tensor:
    """int64 ``[B, n, G]``: the column of each pair; the reference alone holds such an array."""
    distance = relative.keys.double()[:, None] - relative.queries.double()[..., None] + 0.5
    # A group without a token may have no position.
    column = distance.floor().nan_to_num(0.0) - relative.origin
    return column.clamp(0, relative.values.shape[-1] - 1).long()


def _patterns(members: Tensor) -> tuple[Tensor, Tensor]:
    """Different ones ``[P, k]``, and which one each key has ``[B, G]``."""
    shape, k = members.shape[:-1], members.shape[-1]
    rows = members.reshape(math.prod(shape), k)
    if rows.shape[0] == 0 or not has_values(members):
        number = torch.arange(rows.shape[0], device=members.device)
        if rows.shape[0] == 0:
            rows = members.new_zeros(1, k)
        return rows, number.view(shape)
    if k > 62:
        found, number = torch.unique(rows, dim=0, return_inverse=True)
        return found, number.view(shape)
    bit = torch.arange(k, device=members.device)
    codes, number = torch.unique((rows.long() << bit).sum(-1), return_inverse=True)
    return (codes[:, None] >> bit & 1).bool(), number.view(shape)


def logsumexp(terms: Tensor) -> Tensor:
    """Over the last dimension; -inf, with a gradient of 0, where all are."""
    top = terms.detach().amax(-1, keepdim=True)
    top = torch.where(top == -math.inf, 0, top)
    total = (terms - top).exp().sum(-1)
    some = total > 0
    return torch.where(some, torch.where(some, total, 1).log() + top[..., 0], -math.inf)


def _check(
    table: Tensor | None, queries: Tensor, keys: Tensor, members: Tensor | None,
    window: tuple[int, int] | None, max_distance: int,
) -> None:  # fmt: skip
    for positions, name in ((queries, "queries"), (keys, "keys")):
        if positions.dim() != 2:
            raise ValueError(f"{name} must be positions [rows, .], got {list(positions.shape)}")
        exact = positions.dtype in (torch.int32, torch.int64, torch.float32, torch.float64)
        if not exact or (members is not None and positions.is_floating_point()):
            kinds = "integers" if members is not None else "integers, float32 or float64"
            raise ValueError(f"{name} must be {kinds}, got {positions.dtype}")
    if queries.shape[0] != keys.shape[0]:
        raise ValueError(
            f"keys must have the queries' {queries.shape[0]} rows, got {keys.shape[0]}"
        )
    if members is not None and (members.shape[:-1] != keys.shape or members.dtype != torch.bool):
        raise ValueError(
            f"members must be bool [{keys.shape[0]}, {keys.shape[1]}, k], got {members.dtype} "
            f"{list(members.shape)}"
        )
    if table is not None and (table.dim() != 2 or not table.is_floating_point()):
        raise ValueError(f"table must be floating [buckets, heads], got {list(table.shape)}")
    if max_distance < 1:
        raise ValueError(f"max_distance must be >= 1, got {max_distance}")
    if window is not None and min(window) < 0:
        raise ValueError(f"window must be (left, right), each >= 0, got {window}")
