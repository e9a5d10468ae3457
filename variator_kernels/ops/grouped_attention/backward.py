"""The backward pass of grouped_attention on the CPU: blocks of queries, products by PyTorch.

Weights are made again, a block at a time: memory is H x BLOCK x G, whatever n is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..library import accumulator
from .op import Attention
from .reference import looked_up

BLOCK = 128
"""Queries."""


def backward(d_out: Tensor, call: Attention) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, keys, values, and of ``bias [B, G]``."""
    with torch.autocast("cpu", enabled=False):
        return _backward(d_out, call)


def _backward(d_out: Tensor, call: Attention) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    queries, keys, values = call[:3]
    rows, n, heads, d = queries.shape
    count, kv_heads = keys.shape[1:3]
    wide = accumulator(queries.dtype)
    d_queries = torch.zeros_like(queries, memory_format=torch.contiguous_format)
    d_keys = torch.zeros(rows, count, kv_heads, d, dtype=wide)
    d_values = torch.zeros_like(d_keys)
    d_bias = torch.zeros(rows, count, dtype=wide)
    for row in range(rows):
        k, v = (_by_head(t[row], kv_heads, wide) for t in (keys, values))
        if call.visible.bias is not None:  # what nobody sees may hold anything
            seen = (call.visible.bias[row] != -math.inf)[:, None]
            k, v = (torch.where(seen, t, 0) for t in (k, v))
        for begin in range(0, n, BLOCK):
            at = slice(begin, min(begin + BLOCK, n))
            q, d_o = (_by_head(t[row, at], kv_heads, wide) for t in (queries, d_out))
            weights = _softmax(_scores(q, k, call, row, at))
            d_values[row] += (weights.transpose(1, 2) @ d_o).transpose(0, 1)
            d_weights = d_o @ v.transpose(1, 2)
            # Not from the output: its rounding to 16 bits would not cancel.
            d_weights -= (weights * d_weights).sum(-1, keepdim=True)
            d_scores = d_weights.mul_(weights)
            d_bias[row] += d_scores.sum((0, 1))
            d_keys[row] += (d_scores.transpose(1, 2) @ q).transpose(0, 1) * call.scale
            d_q = (d_scores @ k * call.scale).view(heads, -1, d)
            d_queries[row, at] = d_q.transpose(0, 1).to(queries.dtype)
    return d_queries, d_keys.to(keys.dtype), d_values.to(values.dtype), d_bias


def _by_head(tokens: Tensor, kv_heads: int, wide: torch.dtype) -> Tensor:
    """``[m, H, d]`` to ``[H_kv, H / H_kv * m, d]``."""
    m, _, d = tokens.shape
    return tokens.to(wide).transpose(0, 1).reshape(kv_heads, -1 if m else 0, d)


def _softmax(scores: Tensor) -> Tensor:
    """0 where no key is visible. A saved logsumexp of large scores would not be exact enough."""
    some = (scores != -math.inf).any(-1, keepdim=True)
    return torch.where(some, scores, 0).softmax(-1) * some


def _scores(q: Tensor, k: Tensor, call: Attention, row: int, at: slice) -> Tensor:
    """``[H_kv, H / H_kv * m, G]``; -inf where a query does not see a key."""
    scores = q @ k.transpose(1, 2) * call.scale
    m, heads = at.stop - at.start, call.queries.shape[2]
    by_head = scores.view(heads, m, -1)
    visible, relative = call.visible, call.relative
    if visible.bias is not None:
        by_head += visible.bias[row].to(scores.dtype)
    if relative is not None:
        pattern = relative.pattern
        part = relative._replace(
            queries=relative.queries[row : row + 1, at],
            keys=relative.keys[row : row + 1],
            pattern=None if pattern is None else pattern[row : row + 1],
        )
        by_head += looked_up(part)[0].to(scores.dtype)
    query = torch.arange(at.start, at.stop)[:, None]
    if visible.first is not None:
        by_head.masked_fill_(query < visible.first[row], -math.inf)
    if visible.last is not None:
        by_head.masked_fill_(query >= visible.last[row], -math.inf)
    return scores
