"""A decoder's self-attention over merged keys: a composition of the ops below."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import NO_NORM, MergeWeights
from ..group_merge import op as merge_op
from ..group_merge import reference as merge_reference
from ..grouped_attention import grouped_attention
from ..groups import Groups
from ..make_groups import make_groups
from .description import SelfAttention
from .merged_keys import MergedKeys
from .products import keys_and_values, output, queries
from .rotation import Rotation
from .steps import Step


def causal_attention(
    h: Tensor,
    merge: MergeWeights,
    attention: SelfAttention,
    step: Step,
    rotations: tuple[Rotation, Callable[[], Rotation]] | None,
    store: MergedKeys | None,
    backend: str,
) -> Tensor:
    """The sublayer without norm and residual: ``h [B, n, d]`` to the same shape.

    ``rotations``: of the tokens, and of the groups that ``step`` completes. ``store`` takes up what
    later queries need. Padding gets some output.
    """
    q = queries(h, attention)
    k, v = keys_and_values(h, attention)
    if rotations is not None:
        q, k = rotations[0].of(q), rotations[0].of(k)
    if store is not None and step.single:
        store.remember_single(step, h.detach())
        if step.groups:
            rows = None if step.every is not None else step.exists[:, 0].nonzero()[:, 0]
            source = store.recent if rows is None else store.recent[rows]
            merged = _merge(source, merge, None, backend)
            k_m, v_m = keys_and_values(merged, attention)
            if rotations is not None:
                turn = rotations[1]()
                k_m = (turn if rows is None else turn.rows(rows)).of(k_m)
            store.append_merged(step, rows, k_m.detach(), v_m.detach())
        store.append_single(step, k.detach(), v.detach())
        entries = step.visible
        keys, values = (
            t[:, :, :entries].transpose(1, 2) for t in (store.merged_keys, store.merged_values)
        )
        bias = step.bias_after
        first = last = None
    else:
        old = store if store is not None and step.past.columns else None
        k_m, v_m = k[:, :0], v[:, :0]
        if step.groups:
            k_m, v_m = keys_and_values(_merged(h, merge, step, old, backend), attention)
            k_m = k_m if rotations is None else rotations[1]().of(k_m)
        keys, values = (torch.cat(parts, 1) for parts in ((k, k_m), (v, v_m)))
        if old is not None:
            entries = step.past.plain + step.scheme.kept + step.held_groups
            before = (old.merged_keys, old.merged_values)
            there = (t[:, :, :entries].transpose(1, 2) for t in before)
            keys, values = (torch.cat(two, 1) for two in zip(there, (keys, values), strict=True))
        bias = step.bias
        first, last = step.first, step.last
        if store is not None:
            store.rebuild(step, *(t.detach() for t in (h, k, v, k_m, v_m)))
    if store is not None:
        store.book = step.book
    out = grouped_attention(
        q,
        keys,
        values,
        scale=attention.scale,
        bias=bias,
        first=first,
        last=last,
        dropout_p=attention.dropout_weights,
        backend="reference" if backend == "reference" else "auto",
    )
    if store is not None and step.past.columns and out.requires_grad:
        out = _Cut.apply(out)
    o = output(out, attention)
    return F.dropout(o, attention.dropout_outer) if attention.dropout_outer > 0 else o


class _Cut(torch.autograd.Function):
    """Refuses gradients, which would lack all that goes through what a cache holds."""

    @staticmethod
    def forward(ctx, out):
        return out.view_as(out)

    @staticmethod
    def backward(ctx, *_):
        raise ValueError(
            "no gradient goes through past_key_values of merged keys: train with use_cache=False, "
            "on whole sequences"
        )


def _merged(
    h: Tensor, merge: MergeWeights, step: Step, old: MergedKeys | None, backend: str
) -> Tensor:
    """``[B, groups, d]``: of the groups that are completed."""
    groups = step.in_place if backend in ("cpu", "reference") else None
    if groups is None:
        source = h if old is None else torch.cat((old.recent, h), 1)
        rows = torch.arange(step.rows, device=h.device)[:, None]
        h = source[rows, step.members]
    return _merge(h, merge, groups, backend)


def _merge(h: Tensor, merge: MergeWeights, groups: Groups | None, backend: str) -> Tensor:
    """Of whole ``groups``; None: of all tokens, side by side."""
    if groups is None:
        groups = make_groups(h, len(merge.bias), backend=backend, inner=True)
    if backend == "reference":
        return merge_reference.group_merge(h, merge.weight, merge.bias, groups)
    return merge_op.group_merge(h, merge, groups, NO_NORM, backend)[0]
