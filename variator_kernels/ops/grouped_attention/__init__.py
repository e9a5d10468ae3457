"""grouped_attention: whole queries over the keys of merged groups, kept tokens and plain tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import backends
from .. import checks
from ..feed_forward import autocasts
from ..transforms import fitting
from . import op, reference, sdpa
from .reference import Visible
from .relative import DistanceBias, distance_bias

__all__ = ["DistanceBias", "distance_bias", "grouped_attention", "lacks"]


def grouped_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    first: Tensor | None = None,
    last: Tensor | None = None,
    relative: DistanceBias | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """``softmax(scale · q·k + bias + relative) · v`` over the keys that a query sees.

    A key is anything with a key and a value: a merged group, a kept token, a plain one. Rows with
    fewer keys than G fill up with keys of bias -inf. No array of size n x G exists in the kernels.

    How a model's attention is said:

    - *BERT, learned positions*: ``bias`` = log of a group's number of tokens; no token gives -inf,
      so it is the padding mask too.
    - *RoPE*: the same, queries and keys rotated by the caller (merged keys by mean positions).
    - *T5, attention_kv*: ``relative=distance_bias(table, queries=positions, keys=starts,
      members=exists)`` holds the logsumexp over a group's tokens, their number included: no bias.
    - *T5, attention* (queries merged too): ``relative=distance_bias(table, queries=means,
      keys=means)`` and ``bias`` = log of the number of tokens. k = 1 is T5's own attention.
    - *Local windows*: ``distance_bias(None, ..., members=exists, window=(left, right))``.
    - *Causal decoders*: a key is seen by the queries ``first <= s < last``, s counted in
      ``queries``. With groups of k and a window of w plain keys, i = t // k: plain key t has
      ``first = t`` and ``last = max((i+1)·k, (i+1)·k + w - 1)``, where the merged key i, of bias
      log k, has its ``first``; a kept token is seen from itself on. In decoding, with a cache of
      visible entries, neither is needed.

    Padded queries get some output; the caller passes those tokens through.

    Args:
        queries: ``[B, n, H, d]``.
        keys, values: ``[B, G, H_kv, d]``; query head h reads ``h // (H / H_kv)`` (grouped-query
            attention).
        scale: default ``1 / sqrt(d)``; T5's is 1.
        bias: floating ``[B, G]``; -inf: invisible, and what key and value hold does not matter.
        first, last: int32 or int64 ``[B, G]``; None: from the first query, to the last.
        relative: terms of the distance, made by :func:`distance_bias`. The kernels know no gradient
            for them: ``auto`` takes the reference where it is asked for.
        dropout_p: of the weights; only the reference drops, and ``auto`` takes it then.
        backend: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"``. On a GPU where no kernel of
            ours is proven, ``auto`` is PyTorch's fused attention as long as there are no terms of
            distances and no bounds, else the reference.

    Returns:
        ``[B, n, H, d]`` in the queries' dtype; 0 for a query without a visible key.

    Raises:
        ValueError: a shape, dtype, device or backend does not fit; the message names it.
    """
    visible = Visible(bias, first, last)
    common = relative is None and first is None and last is None
    if not (common and _usual(queries, keys, values, bias)):
        _check(queries, keys, values, relative)
        _check_visible(visible, keys)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be >= 0 and < 1, got {dropout_p}")
    if scale is None:
        scale = 1 / math.sqrt(queries.shape[-1])
    if autocasts(queries):  # its precision is its own
        with torch.autocast(queries.device.type, enabled=False):
            return grouped_attention(
                queries, keys, values, scale=scale, bias=bias, first=first, last=last,
                relative=relative, dropout_p=dropout_p, backend=backend,
            )  # fmt: skip
    chosen = _backend(backend, queries, relative, dropout_p)
    if chosen == "reference" and backend == "auto" and sdpa.fits(queries, visible, relative):
        return sdpa.grouped_attention(queries, keys, values, bias, scale, dropout_p)
    if chosen == "reference":
        return reference.grouped_attention(
            queries, keys, values, visible, relative, scale, dropout_p
        )
    call = op.Attention(queries, keys, values, visible, relative, float(scale))
    return op.grouped_attention(call, chosen)


_KERNELS = ("cpu", "triton")
LARGEST_HEAD = 256
"""Numbers of a head that the Triton kernels hold on the chip."""


def lacks(
    backend: str, queries: Tensor, relative: DistanceBias | None, dropout_p: float
) -> str | None:
    """What a backend's kernels would need for such a call and do not have; None: they run it."""
    if backend not in _KERNELS:
        return f"grouped_attention has no {backend} kernels"
    if backend == "triton" and queries.shape[-1] > LARGEST_HEAD:
        return f"the kernels know head sizes up to {LARGEST_HEAD}, got {queries.shape[-1]}"
    if dropout_p > 0:
        return "the kernels have no dropout of weights"
    if relative is not None and relative.values.requires_grad and torch.is_grad_enabled():
        return "the kernels have no gradient for the terms of distances (T5's table); freeze it"
    return None


def _backend(asked: str, queries: Tensor, relative: DistanceBias | None, dropout_p: float) -> str:
    chosen = fitting(asked, backends.resolve(asked, queries, double=True, among=_KERNELS))
    if chosen == "reference":
        return chosen
    why = lacks(chosen, queries, relative, dropout_p)
    if why is None:
        return chosen
    if asked == "auto":
        return "reference"
    raise ValueError(f"backend {asked!r} cannot run here: {why}; or use backend='reference'")


def _usual(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> bool:
    """Whether nothing is wrong with the most common arguments: what :func:`_check` and
    :func:`_check_visible` ask, in a time that few queries can spare."""
    if type(q) is not Tensor or type(k) is not Tensor or type(v) is not Tensor:
        return False
    shape, of_keys = q.shape, k.shape
    if len(shape) != 4 or len(of_keys) != 4 or of_keys != v.shape:
        return False
    rows, _, heads, d = shape
    if bias is not None and not (
        type(bias) is Tensor
        and bias.shape == of_keys[:2]
        and bias.is_floating_point()
        and bias.device == k.device
    ):
        return False
    return (
        of_keys[0] == rows
        and of_keys[3] == d > 0
        and of_keys[2] > 0
        and heads % of_keys[2] == 0
        and q.dtype == k.dtype == v.dtype
        and q.is_floating_point()
        and q.device == k.device == v.device
    )


def _check(q: Tensor, k: Tensor, v: Tensor, relative: DistanceBias | None) -> None:
    for tensor, name in ((q, "queries"), (k, "keys"), (v, "values")):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be [rows, ., heads, d], got {list(tensor.shape)}")
        checks.floating(tensor, name)
        checks.same_device(tensor, q, name, "queries")
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name} must have the queries' dtype {q.dtype}, got {tensor.dtype}")
    rows, n, heads, d = q.shape
    if d < 1:
        raise ValueError(f"queries must have a head size of at least 1, got {list(q.shape)}")
    checks.shape(k, (rows, k.shape[1], k.shape[2], d), "keys")
    checks.shape(v, tuple(k.shape), "values")
    if k.shape[2] < 1 or heads % k.shape[2]:
        raise ValueError(f"keys must have heads that divide the queries' {heads}, got {k.shape[2]}")
    if relative is None:
        return
    shared = relative.values.shape[1] if relative.values.dim() == 3 else 0
    if shared not in (1, heads) or relative.values.shape[0] < 1 or relative.values.shape[2] < 1:
        got = list(relative.values.shape)
        raise ValueError(f"relative must have values [P, 1 or {heads}, W], got {got}")
    if not -(2**53) < relative.origin < 2**53:
        raise ValueError(f"relative.origin must be within 2^53, got {relative.origin}")
    checks.floating(relative.values, "relative.values")
    checks.shape(relative.queries, (rows, n), "relative.queries")
    checks.shape(relative.keys, (rows, k.shape[1]), "relative.keys")
    for field in ("values", "queries", "keys", "pattern"):
        tensor = getattr(relative, field)
        if tensor is not None:
            checks.same_device(tensor, q, f"relative.{field}", "queries")
    if relative.pattern is not None:
        checks.shape(relative.pattern, (rows, k.shape[1]), "relative.pattern")


def _check_visible(visible: Visible, keys: Tensor) -> None:
    for name, tensor in visible._asdict().items():
        if tensor is None:
            continue
        checks.shape(tensor, tuple(keys.shape[:2]), name)
        checks.same_device(tensor, keys, name, "keys")
        if name == "bias":
            checks.floating(tensor, name)
        elif tensor.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} must be int32 or int64, got {tensor.dtype}")
