"""What attention has to know of merged keys: their weight, positions, visibility."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..grouped_attention import DistanceBias, distance_bias
from ..groups import Groups, slots
from ..transforms import is_plain


class Table(NamedTuple):
    """T5's terms of the distance: ``weight [buckets, H]``, and where the last bucket begins."""

    weight: Tensor
    max_distance: int = 128


class Members(NamedTuple):
    """The tokens of each group of ``[B, n]`` tokens."""

    column: Tensor
    """int64 ``[B, G, k]``: the place in the row of what each slot holds; 0 behind a span."""
    exists: Tensor
    """bool ``[B, G, k]``."""
    start: Tensor
    """int64 ``[B, G]``: the place of slot 0."""
    number: Tensor
    """int64 ``[B, G]``: tokens."""

    def mean(self, positions: Tensor) -> Tensor:
        """Of ``positions [B or 1, n]`` over each group's tokens, fp64 ``[B, G]``; 0 of none."""
        rows, count, _ = self.column.shape
        wide = positions.double().expand(rows, -1)
        if wide.shape[1] == 0:
            return wide.new_zeros(rows, count)
        # Not by a view of a product of sizes, which exporters would want to divide.
        found = wide[:, None].expand(-1, count, -1).gather(-1, self.column)
        return torch.where(self.exists, found, 0).sum(-1) / self.number.clamp_min(1)


def members(groups: Groups, x: Tensor) -> Members:
    """Those of listed ``groups`` of ``x [B, n, d]``."""
    index, exists = slots(groups)
    first = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    assert groups.start is not None
    column = (index - first[..., None]).clamp_min(0)  # behind a span
    return Members(column, exists, (groups.start - first).clamp_min(0), exists.sum(-1))


class Keys(NamedTuple):
    """Of the keys of one forward and ratio."""

    bias: Tensor | None = None
    """``[B, G]``, as :func:`~variator_kernels.functional.grouped_attention` takes it."""
    relative: DistanceBias | None = None


def plain_keys(
    x: Tensor, real: Tensor | None, table: Table | None, window: tuple[int, int] | None
) -> Keys:
    """The tokens of ``x [B, n, d]`` as keys of themselves; those that are not ``real [B, n]`` are
    hidden."""
    bias = None
    if real is not None:
        bias = torch.zeros(real.shape, dtype=_wide(x), device=x.device)
        bias = bias.masked_fill_(~real, -torch.inf)
    if table is None and window is None:
        return Keys(bias)
    places = torch.arange(x.shape[1], device=x.device, dtype=torch.float64)
    places = places.expand(x.shape[0], -1).contiguous()  # what the kernels read
    relative = distance_bias(
        None if table is None else table.weight,
        queries=places,
        keys=places,
        window=window,
        max_distance=128 if table is None else table.max_distance,
        dtype=_wide(x),
    )
    return Keys(bias, relative)


def whole_queries(
    groups: Members, x: Tensor, table: Table | None, window: tuple[int, int] | None
) -> Keys:
    """Merged keys under the whole queries of ``x [B, n, d]`` (``attention_kv``).

    A key weighs as the tokens it stands for: the logsumexp of all of their additive terms, which is
    the logarithm of their number where the model has no such terms.
    """
    if table is None and window is None:
        return Keys(_logarithm(groups.number, x))
    places = torch.arange(x.shape[1], device=groups.start.device).expand(groups.start.shape[0], -1)
    relative = distance_bias(
        None if table is None else table.weight,
        queries=places,
        keys=groups.start,
        members=groups.exists,
        window=window,
        max_distance=128 if table is None else table.max_distance,
        dtype=_wide(x),
    )
    return Keys(None, relative)


def merged_queries(
    groups: Members, x: Tensor, table: Table | None, window: tuple[int, int] | None
) -> Keys:
    """Merged keys under merged queries of ``x [B, n, d]`` (``attention``): terms of the distance
    between the means of their tokens' positions, and the logarithm of a key's number of tokens."""
    bias = _logarithm(groups.number, x)
    if table is None and window is None:
        return Keys(bias)
    means = groups.mean(torch.arange(x.shape[1], device=groups.start.device)[None])
    relative = distance_bias(
        None if table is None else table.weight,
        queries=means,
        keys=means,
        window=window,
        max_distance=128 if table is None else table.max_distance,
        dtype=_wide(x),
    )
    return Keys(bias, relative)


def _wide(x: Tensor) -> torch.dtype:
    """Of scores: fp32, fp64 for fp64 storage."""
    return torch.promote_types(x.dtype, torch.float32)


def _logarithm(number: Tensor, x: Tensor) -> Tensor:
    return number.to(_wide(x)).log()


class Rotation(NamedTuple):
    """Cosines and sines ``[B or 1, m, head_size]`` of m positions (RoPE)."""

    cos: Tensor
    sin: Tensor

    def of(self, vectors: Tensor) -> Tensor:
        """``vectors [B, m, H, head_size]`` turned: halves of a head are the two components. What
        the cosines have no place for at a head's end stays."""
        size, part = vectors.shape[-1], self.cos.shape[-1]
        if part > size:
            raise ValueError(f"position_embeddings must turn heads of {size}, got {part}")
        if part < size:
            turned = self.of(vectors[..., :part])
            return torch.cat((turned, vectors[..., part:]), -1)
        given = (vectors, self.cos, self.sin)
        if not torch.is_grad_enabled() and all(is_plain(t) for t in given):
            return self._in_few_passes(vectors)
        wide = torch.promote_types(vectors.dtype, torch.float32)
        x, cos, sin = vectors.to(wide), self.cos[:, :, None].to(wide), self.sin[:, :, None].to(wide)
        first, second = x.chunk(2, -1)
        return (x * cos + torch.cat((-second, first), -1) * sin).to(vectors.dtype)

    def _in_few_passes(self, vectors: Tensor) -> Tensor:
        """The same, over memory twice: the two components are written where they belong."""
        turned = torch.empty_like(vectors, memory_format=torch.contiguous_format)
        cos, sin = (t[:, :, None].to(vectors.dtype).chunk(2, -1) for t in (self.cos, self.sin))
        x, y = vectors.chunk(2, -1)
        first, second = turned.chunk(2, -1)
        torch.mul(x, cos[0], out=first)
        first.addcmul_(y, sin[0], value=-1)
        torch.mul(y, cos[1], out=second)
        second.addcmul_(x, sin[1])
        return turned

    def rows(self, index: Tensor) -> Rotation:
        """Of some rows."""
        return self if self.cos.shape[0] == 1 else Rotation(self.cos[index], self.sin[index])
