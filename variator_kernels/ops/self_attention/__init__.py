"""Self-attention sublayers with merged keys and values; compositions of the ops below."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import MergeWeights
from ..compressed_ffn.layered import normalize_real
from ..fast_norm import normalize_fast
from ..feed_forward import FeedForward, normalize
from ..group_merge import op as merge_op
from ..group_merge import reference as merge_reference
from ..grouped_attention import grouped_attention, lacks
from ..groups import Groups, real_tokens
from ..transforms import tracing
from .blocks import with_global_keys
from .book import Book, Scheme
from .causal import causal_attention
from .decoding import Single, single
from .decoding import attend as attend_single
from .description import GlobalKeys, OfDistances, Projections, SelfAttention
from .fused import fuses
from .keys import (
    Keys,
    members,
    merged_queries,
    plain_keys,
    whole_queries,
)
from .merged_keys import MergedKeys
from .op import dense
from .op import merged_keys as fused_merged_keys
from .pairs import Pairs
from .pairs import attention as of_pairs
from .products import by_content, keys_and_values, output, queries
from .rotation import Rotation, turned_between
from .steps import Step
from .terms import BlockTable, Distances, PlaceTable, Table, Terms

__all__ = [
    "BlockTable",
    "Book",
    "Distances",
    "GlobalKeys",
    "Keys",
    "MergedKeys",
    "OfDistances",
    "Pairs",
    "PlaceTable",
    "Projections",
    "Rotation",
    "Scheme",
    "SelfAttention",
    "Single",
    "Step",
    "Table",
    "Terms",
    "around",
    "attend",
    "attend_single",
    "attention_kv",
    "by_content",
    "causal_attention",
    "dense",
    "fuses",
    "keys_and_values",
    "members",
    "merged_queries",
    "plain_keys",
    "queries",
    "single",
    "turned_between",
    "whole_queries",
    "with_global_keys",
]


def attention_kv(
    x: Tensor,
    merge: MergeWeights,
    attention: SelfAttention,
    groups: Groups,
    keys: Keys,
    rotations: tuple[Rotation, Rotation] | None,
    backend: str,
    asked: str = "",
) -> Tensor:
    """The sublayer with whole queries, and keys and values of merged vectors (paper section 3.2,
    merge alone): ``x [B, n, d]`` to the same shape, norm to residual.

    ``rotations``: of queries and keys. ``asked``: what ``backend`` was chosen for, if that is
    known. Padding passes through unchanged, or is 0 without a residual.
    """
    real = real_tokens(groups, x)
    real = None if real is None else real[..., None]
    # What padding holds must not reach a gradient. A trace must not depend on whether one is taken.
    tokens = x
    if real is not None and (torch.is_grad_enabled() or tracing()):
        tokens = torch.where(real, x, 0)
    table = None if keys.relative is None else keys.relative.values
    fused = backend == "cpu" and keys.pairs is None and keys.sums is None
    if fused and fuses(x, attention, table, merge):
        return fused_merged_keys(x, merge, groups, attention, keys, rotations)
    norm = attention.pre_norm
    if backend == "reference":
        h = normalize(tokens, norm.name, norm.weight, norm.bias, norm.eps)
    else:
        h = normalize_fast(tokens, norm)
    if backend == "reference":
        merged = merge_reference.group_merge(h, merge.weight, merge.bias, groups)
    else:
        merged = merge_op.group_merge(x, merge, groups, norm, backend)[0]
    merged = with_global_keys(merged, h, keys.sums, attention.global_keys)
    o = attend(h, merged, attention, keys, rotations, backend, asked)
    if attention.dropout_outer > 0:
        o = F.dropout(o, attention.dropout_outer)
    y = x + o if attention.residual else o
    if real is not None:
        y = torch.where(real, y, x if attention.residual else 0)
    return normalize_real(y, attention.any_norm, groups) if attention.post_norm else y


def attend(
    h: Tensor,
    source: Tensor,
    attention: SelfAttention,
    keys: Keys,
    rotations: tuple[Rotation, Rotation] | None,
    backend: str,
    asked: str = "",
) -> Tensor:
    """``[B, n, d]``: queries of ``h [B, n, d]`` over keys and values of ``source [B, G, d]``."""
    q = queries(h, attention)
    k, v = keys_and_values(source, attention)
    if rotations is not None:
        q, k = rotations[0].of(q), rotations[1].of(k)
    if keys.pairs is not None:
        content = None
        if isinstance(keys.pairs, Pairs):
            content = by_content(q, k, keys.pairs.terms.distances, attention)
        dropout = attention.dropout_weights
        out = of_pairs(q, k, v, keys.bias, keys.pairs, content, attention.scale, dropout)
        return output(out, attention)
    out = grouped_attention(
        q,
        k,
        v,
        scale=attention.scale,
        bias=keys.bias,
        first=keys.first,
        last=keys.last,
        relative=keys.relative,
        dropout_p=attention.dropout_weights,
        backend=_kernels(backend, asked, q, keys, attention),
    )
    return output(out, attention)


def _kernels(backend: str, asked: str, q: Tensor, keys: Keys, attention: SelfAttention) -> str:
    """The backend of attention alone: a sublayer's own, ``"auto"`` where that one has no such
    kernel, or where no kernels were proven on a GPU, which has fused attention of PyTorch's."""
    if backend == "reference" and asked == "auto" and q.is_cuda:
        return asked
    if backend in ("reference", "auto"):
        return backend
    lacking = lacks(backend, q, keys.relative, attention.dropout_weights)
    return "auto" if lacking else backend


def around(
    attention: SelfAttention,
    keys: Keys,
    rotations: tuple[Rotation, Rotation] | None,
    backend: str,
    asked: str = "",
) -> FeedForward:
    """The sublayer as what plugins go around: merged vectors attend to merged vectors."""

    def attends(merged: Tensor) -> Tensor:
        source = with_global_keys(merged, merged, keys.sums, attention.global_keys)
        return attend(merged, source, attention, keys, rotations, backend, asked)

    return FeedForward(
        attention.w_o,
        attention.w_o,
        norm=attention.norm,
        norm_weight=attention.norm_weight,
        norm_bias=attention.norm_bias,
        eps=attention.eps,
        post_norm=attention.post_norm,
        residual=attention.residual,
        dropout_outer=attention.dropout_outer,
        pack=attention.pack,
        precision=attention.precision,
        module=attends,
    )
