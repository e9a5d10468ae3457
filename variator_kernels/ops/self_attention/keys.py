"""What attention has to know of merged keys: their weight, positions, visibility."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..grouped_attention import DistanceBias, distance_bias
from ..grouped_attention.relative import joined
from ..groups import Groups, real_tokens, slots
from ..transforms import graphing, tracing
from .blocks import Blocks, Sums
from .pairs import Pairs
from .terms import Terms


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
    real: Tensor | None
    """bool ``[B, n]``: tokens that there are; None: all."""

    def mean(self, positions: Tensor) -> Tensor:
        """Of ``positions [B or 1, n]`` over each group's tokens, fp64 ``[B, G]``; 0 of none."""
        found = torch.where(self.exists, self.of(positions.double()), 0)
        return found.sum(-1) / self.number.clamp_min(1)

    def of(self, values: Tensor) -> Tensor:
        """``values [B or 1, n]`` of the token in each slot, ``[B, G, k]``; behind a span some."""
        rows, count, k = self.column.shape
        wide = values.expand(rows, -1)
        if wide.shape[1] == 0:
            return wide.new_zeros(rows, count, k)
        # Not by a view of a product of sizes, which exporters would want to divide.
        return wide[:, None].expand(-1, count, -1).gather(-1, self.column)


def members(groups: Groups, x: Tensor) -> Members:
    """Those of listed ``groups`` of ``x [B, n, d]``."""
    index, exists = slots(groups)
    first = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    assert groups.start is not None
    column = (index - first[..., None]).clamp_min(0)  # behind a span
    start, real = (groups.start - first).clamp_min(0), real_tokens(groups, x)
    return Members(column, exists, start, exists.sum(-1), real)


class Keys(NamedTuple):
    """Of the keys of one forward and ratio."""

    bias: Tensor | None = None
    """``[B, G]``, as :func:`~variator_kernels.functional.grouped_attention` takes it."""
    relative: DistanceBias | None = None
    pairs: Pairs | Tensor | None = None
    """Instead of it, where terms are not of one distance alone: what makes them, or, where they do
    not depend on the content, made ``[B, H, n, G]``."""
    sums: Sums | None = None
    """What becomes global keys, behind the merged ones."""
    first: Tensor | None = None
    """int32 ``[B, G]``: no query before sees a key, and none from ``last`` on (a local window). The
    terms say so too; kernels pass by keys of whole blocks of queries."""
    last: Tensor | None = None


def plain_keys(x: Tensor, real: Tensor | None, terms: Terms) -> Keys:
    """The tokens of ``x [B, n, d]`` as keys of themselves; those that are not ``real [B, n]`` are
    hidden."""
    bias = None
    if real is not None:
        bias = torch.zeros(real.shape, dtype=_wide(x), device=x.device)
        bias = bias.masked_fill_(~real, -torch.inf)
    if terms.nothing:
        return Keys(bias)
    places = torch.arange(x.shape[1], device=x.device, dtype=torch.float64)
    places = places.expand(x.shape[0], -1).contiguous()  # what the kernels read
    if terms.of_pairs:
        others = tuple(_both(place.places, x) for place in terms.places)
        return Keys(bias, None, _made(Pairs(places, places[..., None], None, terms, others)))
    bounds = _bounds(terms, x, places.long(), 1)
    found = Keys(bias, _relative(terms, x, places, places), None, None, *bounds)
    if terms.blocks is None:
        return found
    columns = torch.arange(x.shape[1], device=x.device)[None]
    return _with_global(found, Blocks(real, x, terms.blocks), x, columns, real)


def whole_queries(groups: Members, x: Tensor, terms: Terms) -> Keys:
    """Merged keys under the whole queries of ``x [B, n, d]`` (``attention_kv``).

    A key weighs as the tokens it stands for: the logsumexp of all of their additive terms, which is
    the logarithm of their number where the model has no such terms.
    """
    if terms.nothing:
        return Keys(_logarithm(groups.number, x))
    places = torch.arange(x.shape[1], device=groups.start.device).expand(groups.start.shape[0], -1)
    if not terms.of_pairs:
        relative = _relative(terms, x, places, groups.start, groups.exists)
        bounds = _bounds(terms, x, groups.start, groups.exists.shape[-1])
        found = Keys(None, relative, None, None, *bounds)
        if terms.blocks is None:
            return found
        return _with_global(found, Blocks(groups.real, x, terms.blocks), x, places, groups.real)
    others = tuple(
        (place.places.double(), groups.of(place.places.double())) for place in terms.places
    )
    pairs = Pairs(places.double(), groups.column.double(), groups.exists, terms, others)
    return Keys(None, None, _made(pairs))


def merged_queries(groups: Members, x: Tensor, terms: Terms) -> Keys:
    """Merged keys under merged queries of ``x [B, n, d]`` (``attention``): terms of the distance
    between the means of their tokens' positions, and the logarithm of a key's number of tokens."""
    bias = _logarithm(groups.number, x)
    if terms.nothing:
        return Keys(bias)
    means = groups.mean(torch.arange(x.shape[1], device=groups.start.device)[None])
    if not terms.of_pairs:
        keys = Keys(bias, _relative(terms, x, means, means))
        if terms.blocks is None:
            return keys
        blocks, exists = Blocks(groups.real, x, terms.blocks), groups.number > 0
        return _with_global(keys, blocks, x, means, exists, groups.number)
    others = tuple(
        (found, found[..., None]) for found in (groups.mean(p.places) for p in terms.places)
    )
    return Keys(bias, None, _made(Pairs(means, means[..., None], None, terms, others)))


def _with_global(
    keys: Keys,
    blocks: Blocks,
    x: Tensor,
    places: Tensor,
    exists: Tensor | None,
    number: Tensor | None = None,
) -> Keys:
    """With global keys behind ``keys``, sums of vectors at ``places [B or 1, m]``, each of so many
    tokens, which are queries too."""
    dtype, relative = _wide(x), keys.relative
    assert relative is not None
    bias = keys.bias
    if bias is None:
        bias = torch.zeros(relative.keys.shape, dtype=dtype, device=x.device)
    block = blocks.of(places)
    if exists is not None:
        block = torch.where(exists, block, blocks.most)
    further = blocks.bias(dtype)
    first, last = keys.first, keys.last
    if first is not None and last is not None:
        everywhere = further.new_zeros(further.shape, dtype=torch.int32)
        first = torch.cat((first, everywhere), 1)
        last = torch.cat((last, everywhere + x.shape[1]), 1)
    return Keys(
        torch.cat((bias, further), 1),
        joined(relative, blocks.distances(relative.queries, dtype)),
        None,
        Sums(block, blocks.most, number),
        first,
        last,
    )


def _bounds(
    terms: Terms, x: Tensor, start: Tensor, slots: int
) -> tuple[Tensor | None, Tensor | None]:
    """Under queries that are tokens, of keys of up to so many slots from ``start [B, G]`` on."""
    if terms.window is None or tracing() or (torch.compiler.is_compiling() and not graphing()):
        return None, None
    before, behind = terms.window
    if x.shape[1] <= 2 * (before + behind):  # a block of queries sees about all of them
        return None, None
    return (start - behind).clamp_min(0).int(), (start + slots + before).int()


def _relative(
    terms: Terms, x: Tensor, queries: Tensor, keys: Tensor, exists: Tensor | None = None
) -> DistanceBias:
    table = terms.table
    return distance_bias(
        None if table is None else table.weight,
        queries=queries,
        keys=keys,
        members=exists,
        window=terms.window,
        max_distance=128 if table is None else table.max_distance,
        dtype=_wide(x),
    )


def _both(places: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of queries and keys that are tokens."""
    wide = places.double().expand(x.shape[0], -1)
    return wide, wide[..., None]


def _made(pairs: Pairs) -> Pairs | Tensor:
    """All of them, once for all layers, where no layer has its own."""
    return pairs if pairs.terms.distances is not None else pairs.whole()


def _wide(x: Tensor) -> torch.dtype:
    """Of scores: fp32, fp64 for fp64 storage."""
    return torch.promote_types(x.dtype, torch.float32)


def _logarithm(number: Tensor, x: Tensor) -> Tensor:
    return number.to(_wide(x)).log()
