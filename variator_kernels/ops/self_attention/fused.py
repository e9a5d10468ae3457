"""Self-attention sublayers in few passes, for inference on the CPU: queries, keys and values as one
product with the norm in front of it, the residual added by the last one."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import MergeWeights, flat
from ..dense import PIECE, pieces, together
from ..fast_norm import normalize_fast
from ..fused_product import Product, runs
from ..group_merge import cpu as group_merge
from ..grouped_attention import op as grouped_attention
from ..grouped_attention.reference import Visible
from ..groups import Groups, real_tokens
from ..transforms import graphing
from .description import SelfAttention
from .keys import Keys
from .rotation import Rotation
from .whole import at_once


def fuses(
    x: Tensor, attention: SelfAttention, table: Tensor | None, merge: MergeWeights | None = None
) -> bool:
    """Whether the sublayer is no more than its weights, and :func:`fused_product.runs` holds, of a
    merge too. ``table``: of distances, which has its own dtype."""
    a = attention
    # Norms of heads are modules: their weights may get gradients, and no registered op takes them.
    if (a.q_norm is not None or a.k_norm is not None) and (torch.is_grad_enabled() or graphing()):
        return False
    if torch.is_grad_enabled() and table is not None and table.requires_grad:
        return False
    if a.modules is not None or not a.pack or a.dropout_weights > 0 or a.dropout_outer > 0:
        return False
    weights = (a.w_q, a.w_k, a.w_v, a.w_o, a.b_q, a.b_k, a.b_v, a.b_o)
    return runs(x, (*weights, a.norm_weight, a.norm_bias, *(merge or ())))


def dense(x: Tensor, attention: SelfAttention, keys: Keys, rotation: Rotation | None) -> Tensor:
    """The sublayer without plugins: ``x [B, n, d]`` to the same shape, norm to residual.

    ``keys`` are the tokens: a bias of -inf hides padding. Padded queries get some output.
    """
    size = max(1, PIECE // max(1, x.shape[1]))

    def rows(first: int, last: int) -> Tensor:
        turns = None if rotation is None else rotation.rows(torch.arange(first, last))
        return _dense(x[first:last], attention, _rows(keys, first, last), turns)

    if size >= x.shape[0]:
        return _dense(x, attention, keys, rotation)
    return together(rows(*some) for some in pieces(x.shape[0], size))


def _dense(x: Tensor, a: SelfAttention, keys: Keys, rotation: Rotation | None) -> Tensor:
    y = at_once(x, a, keys) if rotation is None else None
    return _in_steps(x, a, keys, rotation) if y is None else y


def _in_steps(x: Tensor, a: SelfAttention, keys: Keys, rotation: Rotation | None) -> Tensor:
    rows = flat(x)
    every = Product((a.w_q, a.w_k, a.w_v), (a.b_q, a.b_k, a.b_v), a.precision)(rows, a.pre_norm)
    parts = every.split([a.w_q.shape[0], a.w_k.shape[0], a.w_v.shape[0]], -1)
    rotations = None if rotation is None else (rotation, rotation)
    return _attend(parts, x, x.shape[:2], a, keys, rotations)


def merged_keys(
    x: Tensor,
    merge: MergeWeights,
    groups: Groups,
    attention: SelfAttention,
    keys: Keys,
    rotations: tuple[Rotation, Rotation] | None,
) -> Tensor:
    """The sublayer with keys and values of merged vectors: ``x [B, n, d]`` to the same shape, norm
    to residual, or to a norm behind. Padding passes through, or is 0 without a residual."""
    a, real = attention, real_tokens(groups, x)
    y = at_once(x, a, keys, merge, groups) if rotations is None else None
    if y is not None and (real is None or a.residual):
        return y
    if y is None:
        y = _merged_in_steps(x, merge, groups, a, keys, rotations)
    return y if real is None else torch.where(real[..., None], y, x if a.residual else 0)


def _merged_in_steps(
    x: Tensor,
    merge: MergeWeights,
    groups: Groups,
    a: SelfAttention,
    keys: Keys,
    rotations: tuple[Rotation, Rotation] | None,
) -> Tensor:
    norm = a.pre_norm
    merged = group_merge.merged(x, merge, groups, norm)
    q = Product((a.w_q,), (a.b_q,), a.precision)(flat(x), norm)
    both = Product((a.w_k, a.w_v), (a.b_k, a.b_v), a.precision)(flat(merged))
    k, v = both.split([a.w_k.shape[0], a.w_v.shape[0]], -1)
    return _attend((q, k, v), x, merged.shape[:2], a, keys, rotations)


def _attend(
    parts: tuple[Tensor, ...],
    x: Tensor,
    keys_shape: torch.Size,
    a: SelfAttention,
    keys: Keys,
    rotations: tuple[Rotation, Rotation] | None,
) -> Tensor:
    shapes = (x.shape[:2], keys_shape, keys_shape)
    q, k, v = (
        part.view(*shape, -1, a.head_size) for part, shape in zip(parts, shapes, strict=True)
    )
    q = q if a.q_norm is None else a.q_norm(q)
    k = k if a.k_norm is None else a.k_norm(k)
    if rotations is not None:
        q, k = rotations[0].of(q), rotations[1].of(k)
    visible = Visible(keys.bias, keys.first, keys.last)
    call = grouped_attention.Attention(q, k, v, visible, keys.relative, a.scale)
    out = grouped_attention.grouped_attention(call, "cpu")
    residual = flat(x) if a.residual else None
    rows = out.view(-1, a.w_o.shape[1])
    y = Product((a.w_o,), (a.b_o,), a.precision)(rows, residual=residual).view(x.shape)
    return normalize_fast(y, a.any_norm) if a.post_norm else y


def _rows(keys: Keys, first: int, last: int) -> Keys:
    """Of some rows of the batch."""
    relative = keys.relative
    if relative is not None:
        pattern = relative.pattern
        relative = relative._replace(
            queries=relative.queries[first:last],
            keys=relative.keys[first:last],
            pattern=None if pattern is None else pattern[first:last],
        )
    given = keys.bias, keys.first, keys.last
    bias, begin, end = (None if t is None else t[first:last] for t in given)
    return Keys(bias, relative, None, None, begin, end)
