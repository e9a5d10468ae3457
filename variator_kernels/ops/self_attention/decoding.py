"""A step of decoding in few calls: one token in each row, and all rows alike.

What :mod:`causal` computes then, in inference on the CPU. Products of one token are short, and
PyTorch takes microseconds for the smallest operation, so what holds of all layers is found once a
step, and queries, keys and values of a layer stay in one piece of memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import prepack
from ..arguments import MergeWeights
from ..feed_forward import autocasts
from ..fused_product import PACKED, Product
from ..grouped_attention import cpu as attention_cpu
from ..prepacked_linear import FEW
from ..transforms import nobody_changes
from .book import Book
from .description import SelfAttention
from .merged_keys import MergedKeys
from .products import keys_and_values, output, queries
from .rotation import Rotation
from .steps import Step


class Single:
    """What such a step means for all layers of one scheme: places and numbers of entries."""

    def __init__(self, step: Step, before: int) -> None:
        """``before``: real tokens that each row's cache holds."""
        scheme = step.scheme
        self.step, self.every = step, before + 1
        self.slot = scheme.slot(before, step.plain)
        """Of the entries, the new token's."""
        self.recent = (before - scheme.kept) % step.recent
        self.merged = step.plain + scheme.kept + (self.every - scheme.kept) // scheme.ratio - 1
        """The same of the group that the token completes, if it does."""
        self.visible = step.visible
        self.bias = self._bias()
        self._turns: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def _oldest(self, before: Tensor, size: int) -> int:
        """The lowest rank in a ring of ``size``."""
        return max(int(before[0]), self.every - self.step.scheme.kept - size)

    def _bias(self) -> Tensor:
        """:attr:`Step.bias_after`."""
        step, (ratio, _, kept) = self.step, self.step.scheme
        plain, rank = step.plain, self.every - kept - 1
        lowest = max(self._oldest(step.past.oldest, plain), step.scheme.count(rank) * ratio)
        bias = torch.zeros(self.visible, dtype=step.dtype)
        bias[plain + kept :] = math.log(ratio)
        if self.every < kept:
            bias[plain + self.every : plain + kept] = -math.inf
        # From the oldest rank that the ring has room for up to the lowest that is seen.
        begin = (rank + 1) % plain
        end = begin + min(plain, lowest - rank - 1 + plain)
        bias[begin : min(end, plain)] = -math.inf
        if end > plain:
            bias[: end - plain] = -math.inf
        return bias.expand(step.rows, -1).contiguous()

    @functools.cached_property
    def book(self) -> Book:
        """:attr:`Step.book`."""
        step, past = self.step, self.step.past
        oldest = self._oldest(past.oldest, step.plain)
        oldest_recent = self._oldest(past.oldest_recent, step.recent)
        return past._replace(
            columns=past.columns + 1,
            seen=past.seen + 1,
            every=self.every,
            oldest=torch.full_like(past.oldest, oldest),
            oldest_recent=torch.full_like(past.oldest_recent, oldest_recent),
            positions=self._positions,
            full=past.full + 1,
        )

    @functools.cached_property
    def _positions(self) -> Tensor:
        positions = self.step.past.positions.clone()
        positions.select(1, self.recent).copy_(self.step.positions[:, 0])
        return positions

    @property
    def mean_positions(self) -> Tensor:
        """:attr:`Step.mean_positions` of a group that the token completes."""
        return self._positions.mean(1, keepdim=True)

    def turn(self, rotation: Rotation, heads: Tensor) -> Tensor:
        """``heads [B, ., head_size]`` turned in place, the token's or those of a merged one."""
        cos = rotation.cos
        if rotation.neighbours or cos.shape[-1] != heads.shape[-1]:
            return heads.copy_(rotation.of(heads[:, None])[:, 0])
        half, known = heads.shape[-1] // 2, self._turns.get(id(cos))
        if known is None or known[1].dtype != heads.dtype:
            sin = rotation.sin.to(heads.dtype)
            sin = torch.cat((-sin[..., :half], sin[..., half:]), -1)
            known = self._turns[id(cos)] = cos, cos.to(heads.dtype), sin
        others = heads.roll(half, -1)
        return heads.mul_(known[1]).addcmul_(others, known[2])


def single(h: Tensor, step: Step) -> Single | None:
    """Of ``step``, for the layers' inputs ``h [B, 1, d]``; None where they go another way: rows
    differ, a gradient is asked for, or somebody has a say in what runs."""
    before = step.past.every
    if before is None or not step.single or step.rows == 0 or not h.is_cpu:
        return None
    if torch.is_grad_enabled() or autocasts(h) or not nobody_changes():
        return None
    return Single(step, before)


def attend(
    h: Tensor,
    merge: MergeWeights,
    attention: SelfAttention,
    one: Single,
    rotations: tuple[Rotation, Callable[[], Rotation]] | None,
    store: MergedKeys,
) -> Tensor | None:
    """The sublayer without norm and residual: ``h [B, 1, d]`` to the same shape. None if it does
    more than its weights say, or its cache is of another dtype: nothing has changed then."""
    entries, rows = store.entries, h.shape[0]
    if attention.dropout_weights > 0 or attention.dropout_outer > 0 or type(h) is not Tensor:
        return None
    if entries.shape[0] != rows or entries.shape[3] < one.visible:
        return None  # the kernel reads by address
    every = together(h, attention)
    if type(every) is not Tensor or every.dtype != entries.dtype:
        return None
    _, _, kv_heads, _, size = entries.shape
    heads = every.view(rows, -1, size)
    count = heads.shape[1] - 2 * kv_heads
    if rotations is not None:
        one.turn(rotations[0], heads[:, : count + kv_heads])
    store.recent.narrow(1, one.recent, 1).copy_(h)
    if one.step.groups:
        _append_merged(merge, attention, one, rotations, store)
        entries = store.entries
    entries.select(3, one.slot).copy_(heads[:, count:].view(rows, 2, kv_heads, size))
    row, both, head, token, _ = entries.stride()
    begin, byte = entries.data_ptr(), entries.element_size()
    out = attention_cpu.of_memory(
        (rows, 1, one.visible, count, kv_heads, size),
        heads.dtype,
        (heads.data_ptr(), heads.stride(0), 0, size),
        (begin, row, token, head),
        (begin + both * byte, row, token, head),
        one.bias,
        attention.scale,
    )
    store.book = one.book
    w_o, b_o = attention.w_o, attention.b_o
    if runs_plainly(h, attention, w_o):
        return F.linear(out.view(rows, 1, -1), w_o, b_o)
    if packs(h, attention, w_o):
        return Product((w_o,), (b_o,))(out.view(rows, -1)).view(h.shape)
    return output(out, attention)


def _append_merged(
    merge: MergeWeights,
    attention: SelfAttention,
    one: Single,
    rotations: tuple[Rotation, Callable[[], Rotation]] | None,
    store: MergedKeys,
) -> None:
    """The group that the token completes in every row."""
    recent, (rows, _, kv_heads, room, size) = store.recent, store.entries.shape
    wide = one.step.dtype
    tokens = recent.to(wide)
    scores = F.linear(tokens.view(rows, -1), merge.weight.to(wide), merge.bias.to(wide))
    merged = torch.bmm(scores.softmax(1)[:, None], tokens).to(recent.dtype)
    a = attention
    if a.k_norm is None and runs_plainly(merged, a, a.w_k, a.w_v):
        both = torch.cat((F.linear(merged, a.w_k, a.b_k), F.linear(merged, a.w_v, a.b_v)), 2)
        both = both.view(rows, -1, size)
    else:
        both = torch.cat(keys_and_values(merged, a), 2)[:, 0]
    if rotations is not None:
        one.turn(rotations[1](), both[:, :kv_heads])
    if one.merged >= room:
        store.grow()
    store.entries.select(3, one.merged).copy_(both.view(rows, 2, kv_heads, size))


def together(h: Tensor, attention: SelfAttention) -> Tensor:
    """Queries, keys and values of ``h [B, 1, d]``, before rotations: ``[B, 1, (H + 2 H_kv) *
    head_size]`` in memory of its own."""
    a = attention
    if a.q_norm is not None or a.k_norm is not None:
        return _one_by_one(h, a)
    if runs_plainly(h, a, a.w_q, a.w_k, a.w_v):
        linear = F.linear
        return torch.cat(
            (linear(h, a.w_q, a.b_q), linear(h, a.w_k, a.b_k), linear(h, a.w_v, a.b_v)), 2
        )
    if packs(h, a, a.w_q, a.w_k, a.w_v):
        every = Product((a.w_q, a.w_k, a.w_v), (a.b_q, a.b_k, a.b_v))
        return every(h.reshape(-1, h.shape[-1]))
    return _one_by_one(h, a)


def runs_plainly(h: Tensor, attention: SelfAttention, *weights: Tensor) -> bool:
    """Whether products of ``h [B, 1, d]`` with some of the weights are PyTorch's, as they are."""
    few = h.shape[0] <= FEW or not attention.pack
    return few and h.dtype not in prepack.EMULATED and _are_bare(h, attention, weights)


def packs(h: Tensor, attention: SelfAttention, *weights: Tensor) -> bool:
    """Whether they are those of packed weights."""
    return attention.pack and h.dtype in PACKED and _are_bare(h, attention, weights)


def _are_bare(h: Tensor, attention: SelfAttention, weights: tuple[Tensor, ...]) -> bool:
    """Whether they are of the dtype of ``h``, and no others run in their place."""
    if attention.modules is not None or attention.precision is not None:
        return False
    return all(weight.dtype == h.dtype for weight in weights)


def _one_by_one(h: Tensor, attention: SelfAttention) -> Tensor:
    return torch.cat((queries(h, attention), *keys_and_values(h, attention)), 2)
