"""grouped_attention in plain PyTorch: what correct means."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..feed_forward import fixed
from .relative import DistanceBias, columns


class Visible(NamedTuple):
    """Which keys are seen, and how much each weighs."""

    bias: Tensor | None = None
    """``[B, G]``, added to every score of a key; -inf: nobody sees it, nothing of it is read."""
    first: Tensor | None = None
    """int32 ``[B, G]``: the first query that sees a key."""
    last: Tensor | None = None
    """int32 ``[B, G]``: the first query behind that no longer does."""


EVERYTHING = Visible()


def grouped_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Visible,
    relative: DistanceBias | None,
    scale: float,
    dropout_p: float = 0.0,
    pairs: Tensor | None = None,
) -> Tensor:
    """``softmax(scale · q·k + bias + relative) · v`` over the visible keys; 0 where there is none.

    ``pairs [B or 1, H or 1, n, G]`` is added to the scores too.

    ``queries [B, n, H, d]``, ``keys`` and ``values [B, G, H_kv, d]`` give ``[B, n, H, d]``. Scores
    and softmax in fp32 (fp64 for fp64 storage); the weights meet the values in their dtype.
    """
    dtype = queries.dtype
    wide = torch.promote_types(dtype, torch.float32)
    if visible.bias is not None:
        seen = (visible.bias != -math.inf)[..., None, None]
        keys, values = (torch.where(seen, t, t.new_zeros(())) for t in (keys, values))
    q = queries.transpose(1, 2).to(wide)
    k, v = keys.transpose(1, 2), values.transpose(1, 2)
    shared = fixed(queries.shape[2]) // max(fixed(keys.shape[2]), 1)
    if shared > 1:
        k, v = (t[:, :, None].expand(-1, -1, shared, -1, -1).flatten(1, 2) for t in (k, v))
    scores = q @ k.to(wide).transpose(-1, -2) * scale
    if visible.bias is not None:
        scores = scores + visible.bias.to(wide)[:, None, None]
    if relative is not None:
        scores = scores + looked_up(relative).to(wide)
    if pairs is not None:
        scores = scores + pairs.to(wide)
    query = torch.arange(queries.shape[1], device=queries.device)[:, None]
    for bound, hidden in ((visible.first, query.__lt__), (visible.last, query.__ge__)):
        if bound is not None:
            scores = scores.masked_fill(hidden(bound[:, None])[:, None], -math.inf)
    some = (scores != -math.inf).any(-1, keepdim=True)
    weights = torch.where(some, scores, 0).softmax(-1) * some
    weights = F.dropout(weights, dropout_p, training=dropout_p > 0)
    return (weights.to(dtype) @ v).transpose(1, 2)


def looked_up(relative: DistanceBias) -> Tensor:
    """``[B, H, n, G]``."""
    column = columns(relative)
    if relative.pattern is None:
        return relative.values[0][:, column].transpose(0, 1)
    pattern = relative.pattern.long()[:, None].expand(column.shape)
    return relative.values.transpose(0, 1)[:, pattern, column].transpose(0, 1)
