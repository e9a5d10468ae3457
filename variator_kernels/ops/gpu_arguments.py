"""Which tokens form a group, as GPU kernels read it: made on the device, without synchronisation.

Slots are numbered through: slot ``s = i*k + j`` is the j-th of group i. Every token belongs to
exactly one slot, also padding, so a kernel that walks over all slots writes every row of an output
and nothing needs to be zeroed or copied before. Three forms:

``plain``   ``[B, n, d]`` without a mask: all arithmetic, no tensor.
``masked``  ``start [B]`` is the row position of the first real token. Slots count from there and
            wrap around at the row's end to the left padding.
``packed``  ``start``, ``length``, ``span`` ``[launched]``: a group's first token, how many tokens
            it merges, and how many it owns. Groups behind the last real one own the tokens outside
            ``cu_seqlens[0] .. cu_seqlens[-1]`` (they wrap around at the end of the list), which are
            passed through.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import check_decompress, check_merge, require
from .groups import max_groups


class Groups(NamedTuple):
    """The groups of one input. Token indices are int64, into the flat ``[tokens, d]`` list."""

    form: str
    start: Tensor | None
    length: Tensor | None
    span: Tensor | None
    mask: Tensor | None
    """uint8, a byte a token, nonzero for a real one; ``masked`` only."""
    n: int
    """Tokens a row; for packed input all tokens."""
    per_row: int
    """Groups a row; for packed input all groups."""
    total: int
    """Groups that have a merged vector."""
    launched: int
    """Groups to walk over: packed input has one more that may own tokens."""
    ratio: int


def groups(x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, ratio: int) -> Groups:
    """The groups of ``x [B, n, ...]``, or of packed ``x [T, ...]``."""
    per_row = max_groups(x, ratio, cu_seqlens)
    if cu_seqlens is not None:
        start, length, span = _packed(x.shape[0], cu_seqlens.long(), ratio, per_row + 1)
        n, count = x.shape[0], per_row
        return Groups("packed", start, length, span, None, n, per_row, count, per_row + 1, ratio)
    rows, n = x.shape[:2]
    count = rows * per_row
    if mask is None:
        return Groups("plain", None, None, None, None, n, per_row, count, count, ratio)
    mask = (mask if mask.dtype == torch.bool else mask != 0).contiguous().view(torch.uint8)
    start = mask.argmax(-1) if mask.numel() else mask.new_zeros(rows, dtype=torch.long)
    return Groups("masked", start, None, None, mask, n, per_row, count, count, ratio)


def _packed(
    tokens: int, cu_seqlens: Tensor, ratio: int, launched: int
) -> tuple[Tensor, Tensor, Tensor]:
    group = torch.arange(launched, device=cu_seqlens.device)
    first, last = cu_seqlens[0], cu_seqlens[-1]
    lengths = cu_seqlens.diff()
    if len(lengths) == 0:
        used = torch.zeros_like(last)
        start = length = torch.zeros_like(group)
    else:
        counts = (lengths + ratio - 1) // ratio
        ends = counts.cumsum(0)
        used = ends[-1]
        row = torch.searchsorted(ends, group, right=True).clamp_max(len(lengths) - 1)
        position = (group - (ends - counts)[row]) * ratio
        start = cu_seqlens[row] + position
        length = (lengths[row] - position).clamp(0, ratio)
    real = group < used
    behind = (group - used) * ratio
    outside = tokens - (last - first)
    start = torch.where(real, start, last + behind)
    length = torch.where(real, length, 0)
    span = torch.where(real, length, (outside - behind).clamp(0, ratio))
    return start, length, span


def dense(vector: Tensor | None) -> Tensor | None:
    """A vector that may be missing, with unit stride."""
    return None if vector is None else vector.contiguous()


def rows_of(matrix: Tensor) -> Tensor:
    """A matrix whose rows have unit stride; they may lie apart."""
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


def merge_outputs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    projection: Tensor | None,
) -> tuple[Groups, Tensor, Tensor, Tensor]:
    """Checks a merge's arguments: its groups, and room for its three outputs."""
    k = bias.shape[0]
    check_merge(x, weight, norm_weight, norm_bias, projection, k)
    spans = groups(x, mask, cu_seqlens, k)
    lead = x.shape[:-2] if cu_seqlens is None else ()
    merged = x.new_empty(*lead, spans.per_row, x.shape[-1])
    weights = x.new_empty(*lead, spans.per_row, k, dtype=torch.float32)
    r = 0 if projection is None else projection.shape[0]
    return spans, merged, x.new_empty(*x.shape[:-1], r, dtype=torch.float32), weights


def decompress_output(
    u: Tensor,
    projected: Tensor,
    w1u: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    ratio: int,
) -> tuple[Groups, Tensor]:
    """Checks a decompress's arguments: its groups, and room for ``y``."""
    spans = groups(projected, mask, cu_seqlens, ratio)
    check_decompress(u, projected, w1u, b1, w2, spans.total)
    require(b2.shape == u.shape[-1:], f"b2 is {list(b2.shape)}")
    shape = (*projected.shape[:-1], u.shape[-1])
    require(residual is None or residual.shape == shape, "residual's shape")
    return spans, u.new_empty(shape)
