"""Inputs of grouped_attention that its tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.ops.cases import masked
from variator_kernels import functional as vf
from variator_kernels.ops.groups import Keep, slots
from variator_kernels.ops.make_groups import make_groups

# (rows, queries, keys, heads, heads of keys, head size): one query, a ragged size, no query, no
# key, no row, grouped-query attention, more keys than a tile holds, head sizes beside a vector's.
SHAPES = [
    (2, 1, 1, 2, 2, 16),
    (2, 1, 37, 4, 2, 64),
    (3, 37, 10, 3, 3, 24),
    (1, 70, 300, 2, 1, 33),
    (2, 0, 4, 2, 2, 8),
    (2, 5, 0, 2, 2, 8),
    (0, 5, 3, 2, 2, 8),
    (1, 130, 530, 1, 1, 7),
    (2, 65, 129, 6, 2, 128),
]
KINDS = ["plain", "bias", "t5 attention", "t5 attention_kv", "window", "causal"]

PATHS = ["packed", "direct"]
"""The ways of the CPU's kernel; the fixture `path` takes one, whatever the sizes."""


def qkv(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    rows, n, count, heads, kv_heads, d = shape
    sizes = (rows, n, heads, d), (rows, count, kv_heads, d), (rows, count, kv_heads, d)
    return [torch.randn(*size).to(dtype) for size in sizes]


def t5_table(heads: int, buckets: int = 32) -> Tensor:
    return 2 * torch.randn(buckets, heads)


def options(kind: str, shape: tuple[int, ...], ratio: int = 4) -> dict[str, Any]:
    """Keyword arguments of a kind, for keys that stand for groups of ``ratio`` tokens."""
    rows, n, count, heads, _, _ = shape
    steps = torch.arange(count)
    if kind == "plain":
        return {}
    if kind == "bias":
        bias = torch.randint(0, ratio + 1, (rows, count)).float().log()  # some are -inf
        if rows and count:
            bias[0] = -torch.inf
        return {"bias": bias, "scale": 0.2}
    if kind == "causal":
        first = (steps + 1) * ratio
        first, last = first - ratio, first + n // 2
        return {name: t.expand(rows, count).int() for name, t in (("first", first), ("last", last))}
    spans = torch.randint(1, ratio + 1, (rows, count))
    positions = torch.arange(n).expand(rows, n)
    starts = (steps * ratio).expand(rows, count)
    table = t5_table(heads)
    if kind == "t5 attention":
        means = starts + (spans - 1) / 2
        relative = vf.distance_bias(table, queries=positions, keys=means)
        return {"relative": relative, "bias": spans.float().log(), "scale": 1.0}
    members = torch.arange(ratio) < spans[..., None]
    members[:, ::3] = True
    given: dict[str, Any] = {"members": members, "queries": positions, "keys": starts}
    if kind == "window":
        return {"relative": vf.distance_bias(None, window=(9, 6), **given)}
    return {"relative": vf.distance_bias(table, **given), "scale": 1.0}


def of_tokens(mask_kind: str, rows: int, n: int, ratio: int, keep: Keep) -> dict[str, Tensor]:
    """Of groups as a forward makes them: start and members of each, and the mask of tokens."""
    mask = masked(mask_kind, rows, n)
    groups = make_groups(torch.zeros(rows, n, 1), ratio, mask=mask, keep=keep)
    index, exists = slots(groups)
    assert groups.start is not None
    start = groups.start - torch.arange(rows)[:, None] * n
    real = torch.ones(rows, n, dtype=torch.bool) if mask is None else mask
    return {"start": start, "index": index, "members": exists, "mask": real}
