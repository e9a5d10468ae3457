"""Global keys: one for each block of a row's tokens (LongT5's transient-global attention).

Blocks count from a row's first real token, each of ``size`` places. Tokens behind the last place
that ends a block count to the block before it; a row without such a place has no global keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..feed_forward import normalize
from ..grouped_attention import DistanceBias
from ..grouped_attention.relative import t5_buckets
from ..transforms import tracing
from .description import GlobalKeys
from .terms import BlockTable


class Blocks:
    """Of the rows of ``x [B, n, d]``; bool ``real [B, n]``, None: all."""

    def __init__(self, real: Tensor | None, x: Tensor, terms: BlockTable) -> None:
        self.terms = terms
        rows, n = x.shape[:2]
        self.most = n // terms.size
        """Of a row."""
        self.start = torch.zeros(rows, dtype=torch.int64, device=x.device)
        self.number = torch.full_like(self.start, self.most)
        if real is not None:
            self.start = (real.cumsum(1) == 0).sum(1)
            place = torch.arange(n, device=x.device) - self.start[:, None]
            self.number = (real & (place % terms.size == terms.size - 1)).sum(1)

    def of(self, places: Tensor) -> Tensor:
        """The block of each of ``places [B or 1, m]``, columns or means of some (which count as the
        next column, of two the first); ``most`` where there is none."""
        if places.is_floating_point():
            places = (places - 0.5).ceil().long()
        found = (places - self.start[:, None]) // self.terms.size
        found = torch.minimum(found, self.number[:, None] - 1)
        return torch.where(found < 0, self.most, found)

    def bias(self, dtype: torch.dtype) -> Tensor:
        """``[B, most]``: -inf for those that a row has not."""
        there = torch.arange(self.most, device=self.start.device) < self.number[:, None]
        zeros = torch.zeros(there.shape, dtype=dtype, device=there.device)
        return zeros.masked_fill(~there, -torch.inf)

    def distances(self, queries: Tensor, dtype: torch.dtype) -> DistanceBias:
        """Their terms, for queries at columns ``queries [B, n]``.

        A distance between blocks is one from a query to the first column of a key's block, but for
        queries behind the last block, which count to it. What a key adds to these depends on how
        many blocks follow it: that is its pattern.
        """
        (weight, furthest), size = self.terms
        far = furthest  # beyond it nothing changes
        if not (tracing() or torch.compiler.is_compiling()):  # which must bear any length
            far = min(furthest, self.most)
        distance = torch.arange(-far * size, far * size + 1, device=weight.device)
        following = torch.arange(far + 1, device=weight.device)
        blocks = torch.maximum(-(-distance // size), -following[:, None])
        buckets = t5_buckets(blocks, weight.shape[0], True, furthest)  # [patterns, columns]
        wide = weight.to(torch.promote_types(weight.dtype, dtype))
        values = wide.t()[:, buckets].transpose(0, 1)
        number = torch.arange(self.most, device=weight.device)
        keys = self.start[:, None] + number * size
        pattern = (self.number[:, None] - 1 - number).clamp(0, far)
        return DistanceBias(values, queries, keys.to(queries.dtype), pattern, -far * size)


class Sums(NamedTuple):
    """Which of m vectors are summed to which global keys."""

    block: Tensor
    """int64 ``[B, m]``; :attr:`most`: to none."""
    most: int
    number: Tensor | None = None
    """``[B, m]``: of tokens that a vector stands for; None: one each."""


def with_global_keys(
    source: Tensor, vectors: Tensor, sums: Sums | None, keys: GlobalKeys | None
) -> Tensor:
    """``source [B, G, d]`` of keys and values, and behind it what becomes global ones: sums of
    ``vectors [B, m, d]``, normed."""
    if sums is None:
        return source
    assert keys is not None
    rows, _, d = vectors.shape
    wide = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    if sums.number is not None:
        wide = wide * sums.number.to(wide.dtype)[..., None]
    first = torch.arange(rows, device=vectors.device)[:, None] * (sums.most + 1)
    found = wide.new_zeros(rows * (sums.most + 1), d)
    found = found.index_add(0, (first + sums.block).flatten(), wide.flatten(0, 1))
    found = found.view(rows, sums.most + 1, d)[:, : sums.most]
    made = normalize(found, "rms", keys.weight, None, keys.eps)
    return torch.cat((source, made.to(source.dtype)), 1)
