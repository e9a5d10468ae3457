"""grouped_attention by PyTorch's fused attention, for GPUs: a key's bias as two numbers of its own.

A mask would have the queries' dtype (a bias of bf16 is off by 0.4 %) and keep flash attention from
running. Here queries end in two ones and keys in the bias, over the scale, as the sum of two
numbers of the dtype. No array of queries by keys is made.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import Visible
from .relative import DistanceBias

LARGEST_HEAD = 256 - 2
_ALIGNED = 8
"""Numbers of a head are filled up to a multiple of it, as flash attention wants them."""
_INVISIBLE = {torch.float16: -3e4}
"""Over the scale; whatever else a score holds, its weight is 0."""


def fits(queries: Tensor, visible: Visible, relative: DistanceBias | None) -> bool:
    """Whether such a call runs here; terms of distances and causal bounds do not."""
    causal = visible.first is not None or visible.last is not None
    return (
        queries.is_cuda
        and queries.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and queries.shape[-1] <= LARGEST_HEAD
        and relative is None
        and not causal
    )


def grouped_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    scale: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """As :func:`reference.grouped_attention`, on any device; differentiable."""
    size, dtype = queries.shape[-1], queries.dtype
    if bias is not None:
        seen = bias != -math.inf
        keys, values = (torch.where(seen[..., None, None], t, 0) for t in (keys, values))
        wide = bias.float() / scale
        lowest = _INVISIBLE.get(dtype, -1e9)
        high = torch.where(seen, wide, lowest).to(dtype).detach()
        # The gradient goes by the second one alone.
        low = torch.where(seen, wide - high.float(), 0).to(dtype)
        ends = torch.stack((high, low), -1)[:, :, None].expand(-1, -1, keys.shape[2], -1)
        keys = torch.cat((keys, ends), -1)
        queries = torch.cat((queries, queries.new_ones(*queries.shape[:-1], 2)), -1)
    q, k, v = (_filled(t).transpose(1, 2) for t in (queries, keys, values))
    if v.shape[-1] != q.shape[-1]:
        v = F.pad(v, (0, q.shape[-1] - v.shape[-1]))
    shared = q.shape[1] != k.shape[1]
    found = F.scaled_dot_product_attention(
        q, k, v, dropout_p=dropout_p, scale=scale, enable_gqa=shared
    )
    return found.transpose(1, 2)[..., :size]


def _filled(heads: Tensor) -> Tensor:
    missing = -heads.shape[-1] % _ALIGNED
    return F.pad(heads, (0, missing)) if missing else heads
