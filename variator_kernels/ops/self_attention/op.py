"""A self-attention sublayer of inference on the CPU as a registered op, which a compiled graph
holds whole: it runs there as it does without a compiler. It has no gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arguments import MergeWeights
from ..grouped_attention import DistanceBias
from ..groups import FIELDS, SCHEMA, Groups
from ..library import LIBRARY, define
from ..transforms import graphing
from . import fused
from .description import SelfAttention
from .keys import Keys
from .rotation import Rotation

_WEIGHTS = ("w_q", "w_k", "w_v", "w_o", "b_q", "b_k", "b_v", "b_o", "norm_weight", "norm_bias")
_SETTINGS = ("head_size", "scale", "norm", "eps", "post_norm", "residual", "precision")
_KEYS = 8
_TURNS = 5

define(
    "self_attention(Tensor x, Tensor w_q, Tensor w_k, Tensor w_v, Tensor w_o, Tensor? b_q,"
    " Tensor? b_k, Tensor? b_v, Tensor? b_o, Tensor? norm_weight, Tensor? norm_bias,"
    " int head_size, float scale, str norm, float eps, bool post_norm, bool residual,"
    " str? precision, Tensor? bias, Tensor? first, Tensor? last, Tensor? distance_values,"
    " Tensor? query_positions, Tensor? key_positions, Tensor? pattern, int origin,"
    " Tensor? cos, Tensor? sin, Tensor? key_cos, Tensor? key_sin, bool neighbours,"
    f" Tensor? merge_weight, Tensor? merge_bias, {SCHEMA}) -> Tensor"
)
_NO_GROUPS = Groups(None, None, None, None, None, 1, "listed")


def dense(x: Tensor, attention: SelfAttention, keys: Keys, rotation: Rotation | None) -> Tensor:
    """:func:`fused.dense`."""
    if not graphing():
        return fused.dense(x, attention, keys, rotation)
    rotations = None if rotation is None else (rotation, rotation)
    return _node(*arguments(x, attention, keys, rotations))


def merged_keys(
    x: Tensor,
    merge: MergeWeights,
    groups: Groups,
    attention: SelfAttention,
    keys: Keys,
    rotations: tuple[Rotation, Rotation] | None,
) -> Tensor:
    """:func:`fused.merged_keys`."""
    if not graphing():
        return fused.merged_keys(x, merge, groups, attention, keys, rotations)
    return _node(*arguments(x, attention, keys, rotations, merge[:2], groups))


def _node(*given: Any) -> Tensor:
    return torch.ops.variator.self_attention.default(*given)


def arguments(
    x: Tensor, attention: SelfAttention, keys: Keys, rotations: tuple[Rotation, Rotation] | None,
    merge: tuple[Tensor | None, Tensor | None] = (None, None), groups: Groups | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """Of the op: keys of tokens, or of what ``merge`` makes of ``groups``."""
    turns: tuple[Any, ...] = (None, None, None, None, False)
    if rotations is not None:
        turns = (*rotations[0][:2], *rotations[1])
    own = (getattr(attention, name) for name in (*_WEIGHTS, *_SETTINGS))
    terms = keys.relative or (None, None, None, None, 0)
    seen = keys.bias, keys.first, keys.last
    return (x, *own, *seen, *terms, *turns, *merge, *(groups or _NO_GROUPS))


@torch.library.impl(LIBRARY, "self_attention", "CPU")
def _forward(x: Tensor, *given: Any) -> Tensor:
    named = dict(zip((*_WEIGHTS, *_SETTINGS), given, strict=False))
    rest = given[len(named) :]
    bias, first, last, *relative = rest[:_KEYS]
    terms = None if relative[0] is None else DistanceBias(*relative)
    keys = Keys(bias, terms, None, None, first, last)
    cos, sin, key_cos, key_sin, neighbours = rest[_KEYS : _KEYS + _TURNS]
    rotations = None
    if cos is not None:
        rotations = Rotation(cos, sin, neighbours), Rotation(key_cos, key_sin, neighbours)
    weight, shift, *of_groups = rest[_KEYS + _TURNS :]
    attention = SelfAttention(**named)
    if weight is None:
        return fused.dense(x, attention, keys, rotations and rotations[0])
    groups = Groups(*of_groups[:FIELDS])
    return fused.merged_keys(x, MergeWeights(weight, shift), groups, attention, keys, rotations)


@torch.library.register_fake("variator::self_attention")
def _fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)
