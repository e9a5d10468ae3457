"""Attention whose terms differ from pair to pair: by content and distance, by places on a page."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..dense import pieces
from ..grouped_attention import reference
from ..grouped_attention.relative import logsumexp, t5_buckets
from ..transforms import tracing
from .terms import Terms

BLOCK = 1 << 21
"""So many terms of single tokens exist at a time, in inference."""


class Pairs(NamedTuple):
    """What every pair of a query and a key adds, made for some queries at a time.

    A key has ``s`` places, one for each slot of its group, or its tokens' mean alone (s = 1); what
    it adds is the logsumexp over them. Places are float64; distances key - query are rounded as
    ``floor(distance + 0.5)``.
    """

    queries: Tensor
    """``[B, n]``: columns."""
    keys: Tensor
    """``[B, G, s]``: columns."""
    exists: Tensor | None
    """bool ``[B, G, s]``: slots that hold a token; None: all do."""
    terms: Terms
    places: tuple[tuple[Tensor, Tensor], ...] = ()
    """Of each of ``terms.places``: of queries ``[B, n]``, of keys ``[B, G, s]``."""

    def whole(self) -> Tensor:
        """``[B, H, n, G]``, where no content has a say."""
        n = self.queries.shape[1]
        if tracing() or torch.compiler.is_compiling() or n == 0:
            return self.block(0, n, None)
        each = max(1, self.keys.numel() * max(t.shape[1] for t in self.terms.weights))
        parts = [self.block(*some, None) for some in pieces(n, max(16, BLOCK // each))]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def block(self, first: int, last: int, by_content: Content | None) -> Tensor:
        """``[B, H or 1, last - first, G]`` of these queries."""
        terms = self.terms
        distance = _distance(self.queries, self.keys, first, last)
        found: Tensor | None = None
        tables = [] if terms.table is None else [(terms.table, distance)]
        for place, (queries, keys) in zip(terms.places, self.places, strict=True):
            tables.append((place.table, _distance(queries, keys, first, last)))
        for table, apart in tables:
            bucket = t5_buckets(apart, table.weight.shape[0], True, table.max_distance)
            term = table.weight.t()[:, bucket].transpose(0, 1)  # [B, H, m, G, s]
            found = term if found is None else found + term
        if terms.distances is not None:
            assert by_content is not None
            term = by_content.terms(terms.distances.columns(distance), first, last)
            found = term if found is None else found + term
        hidden = None if self.exists is None else ~self.exists[:, None]
        if terms.window is not None:
            outside = (distance < -terms.window[0]) | (distance > terms.window[1])
            hidden = outside if hidden is None else hidden | outside
        if found is None:
            found = torch.zeros(distance.shape, dtype=torch.float32, device=distance.device)
            found = found[:, None]
        if hidden is not None:
            found = found.masked_fill(hidden[:, None], -math.inf)
        return found[..., 0] if found.shape[-1] == 1 else logsumexp(found)


class Content(NamedTuple):
    """Of one sublayer: what meets what where content meets distance; None: it has no such term."""

    queries: tuple[Tensor, Tensor] | None
    """``[B, n, H, size]``, scaled, and ``[W, H, size]`` of distances."""
    keys: Tensor | None
    """``[B, G, H, W]``: products of each key, scaled, with those of distances."""

    def terms(self, column: Tensor, first: int, last: int) -> Tensor:
        """``[B, H, m, G, s]`` for the columns ``[B, m, G, s]`` of some queries."""
        _, m, count, slots = column.shape
        found: Tensor | None = None
        if self.queries is not None:
            queries, of_distances = self.queries
            table = torch.einsum("bnhs,whs->bhnw", queries[:, first:last], of_distances)
            index = column.flatten(2)[:, None].expand(*table.shape[:2], -1, -1)
            found = table.gather(-1, index).unflatten(-1, (count, slots))
        if self.keys is not None:
            table = self.keys.transpose(1, 2)  # [B, H, G, W]
            index = column.transpose(1, 2).flatten(2)[:, None].expand(*table.shape[:2], -1, -1)
            term = table.gather(-1, index).unflatten(-1, (m, slots)).transpose(2, 3)
            found = term if found is None else found + term
        assert found is not None
        return found


def _distance(queries: Tensor, keys: Tensor, first: int, last: int) -> Tensor:
    """int64 ``[B, m, G, s]``: from some queries to all keys."""
    apart = keys[:, None] - queries[:, first:last, None, None]
    return (apart + 0.5).floor().long()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    pairs: Pairs | Tensor,
    by_content: Content | None,
    scale: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """``[B, n, H, size]``: as ``grouped_attention``, with ``pairs`` besides: what they are made of,
    or made ``[B, H or 1, n, G]``.

    In inference some queries go at a time, so that no array of all pairs exists but a made one.
    """
    visible = reference.Visible(bias)
    parts = []
    # Weights are dropped in one piece: a second pass of checkpointing, which may go whole, must
    # drop the same.
    whole = dropout_p > 0
    for first, last in [(0, q.shape[1])] if whole else _blocks(q, k, pairs):
        if isinstance(pairs, Pairs):
            added = pairs.block(first, last, by_content)
        else:
            added = pairs[:, :, first:last]
        some = q[:, first:last]
        parts.append(
            reference.grouped_attention(some, k, v, visible, None, scale, dropout_p, added)
        )
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _blocks(q: Tensor, k: Tensor, pairs: Pairs | Tensor) -> Iterator[tuple[int, int]]:
    rows, n, heads, _ = q.shape
    if tracing() or torch.compiler.is_compiling() or torch.is_grad_enabled() or n == 0:
        return iter([(0, n)])
    slots = pairs.keys.shape[-1] if isinstance(pairs, Pairs) else 1
    each = max(1, rows * heads * k.shape[1] * slots)
    return pieces(n, max(16, BLOCK // each))
