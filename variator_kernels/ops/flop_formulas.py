"""Multiply-adds of the ops, and what ``torch.utils.flop_counter`` needs to count them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula


def ffn_macs(hidden: int, inner: int, gated: bool) -> int:
    """Of the FFN, a vector; also its number of weights."""
    return (3 if gated else 2) * hidden * inner


def groups_around(length: int, ratio: int, kept: Iterable[int] = ()) -> int:
    """Groups of up to k tokens in a row of ``length``, whose tokens at the positions ``kept`` stay
    whole: these are vectors of the FFN too, but without merge and adapter."""
    edges = (-1, *sorted(set(kept)), length)
    return sum((end - start - 2 + ratio) // ratio for start, end in pairwise(edges))


def merge_macs(tokens: int, hidden: int, ratio: int) -> int:
    """Scores and weighted sum. A slot without a token is no work."""
    return tokens * (ratio * hidden + hidden)


def decompress_macs(tokens: int, groups: int, hidden: int, bottleneck: int) -> int:
    """The split adapter: ``W_1h h`` and ``W_2`` a token, ``W_1u u`` a group."""
    return (2 * tokens + groups) * bottleneck * hidden


def attention_macs(queries: int, keys: int, width: int) -> int:
    """Scores and weighted sum of a row, ``width`` = heads times head size; every key counts as
    visible."""
    return 2 * queries * keys * width


def register() -> None:
    """Teach ``torch.utils.flop_counter`` our ops (a multiply-add is two of its flops)."""
    for name, formula in _FORMULAS.items():
        op = getattr(torch.ops.variator, name)
        if op not in flop_registry:
            decorate: Any = register_flop_formula(op)
            decorate(formula)


# Formulas get the ops' arguments with shapes in the place of tensors (schemas: ops/<op>/op.py).
# A shape does not tell padding, nor which tokens stay whole: every token counts as real, merged and
# restored, and every group that a row may have as there. Backward passes count two products for
# each of the forward's, and what they compute again.


def _group_merge(x: Any, weight: Any, bias: Any, projection: Any, *_: Any, **__: Any) -> int:
    d, tokens = x[-1], math.prod(x[:-1])
    r = 0 if projection is None else projection[0]
    return 2 * (merge_macs(tokens, d, bias[0]) + tokens * r * d)


def _group_merge_backward(
    d_merged: Any, d_projected: Any, softmax: Any, *arguments: Any, **_: Any
) -> int:
    return 2 * _group_merge(*arguments)


def _adapter_decompress(u: Any, projected: Any, w1u: Any, *_: Any, **__: Any) -> int:
    r, d = w1u
    return 2 * r * d * (math.prod(projected[:-1]) + math.prod(u[:-1]))


def _adapter_decompress_backward(
    dy: Any, u: Any, projected: Any, w1u: Any, *_: Any, **__: Any
) -> int:
    r, d = w1u
    return 2 * _adapter_decompress(u, projected, w1u) + 2 * r * d * math.prod(u[:-1])


def _compressed_ffn(*arguments: Any, **_: Any) -> int:
    x, _wc, bc, _w1, b1, _w2, _b2, w_in, _w_out, w_gate = arguments[:10]
    start = arguments[15]
    d, k, tokens = x[-1], bc[0], math.prod(x[:-1])
    if len(x) == 3 and arguments[18] is not None:
        groups = math.prod(start)  # around tokens that stay whole
    elif len(x) == 3:
        groups = x[0] * ((x[1] + k - 1) // k)
    else:
        groups = start[0] - (arguments[17] is not None)  # on a GPU there is one more
    macs = groups * ffn_macs(d, w_in[0], w_gate is not None)
    return 2 * (macs + merge_macs(tokens, d, k) + decompress_macs(tokens, groups, d, b1[0]))


def _compressed_ffn_backward(dy: Any, *arguments: Any, **_: Any) -> int:
    return 3 * _compressed_ffn(*arguments)


def _int8_linear(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x[:-1]) * math.prod(weight)


def _grouped_attention(queries: Any, keys: Any, *_: Any, **__: Any) -> int:
    rows, n, heads, d = queries
    return 2 * rows * attention_macs(n, keys[1], heads * d)


def _grouped_attention_backward(d_out: Any, queries: Any, keys: Any, *_: Any, **__: Any) -> int:
    # Scores again, and four products: of dP, dQ, dK and dV.
    return _grouped_attention(queries, keys) * 5 // 2


def _feed_forward(x: Any, w_in: Any, w_out: Any, w_gate: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x[:-1]) * ffn_macs(x[-1], w_in[0], w_gate is not None)


def _self_attention(x: Any, w_q: Any, w_k: Any, w_v: Any, w_o: Any, *rest: Any, **_: Any) -> int:
    rows, n, d = x
    # Behind the weights: biases, norm, settings, keys, rotations; W_c, b_c, groups.
    shift, start = rest[27:29]
    keys = n if shift is None else start[1]
    macs = n * d * 2 * w_q[0] + keys * d * (w_k[0] + w_v[0]) + attention_macs(n, keys, w_q[0])
    return 2 * rows * (macs + (0 if shift is None else merge_macs(n, d, shift[0])))


_FORMULAS = {
    "group_merge": _group_merge,
    "group_merge_backward": _group_merge_backward,
    "adapter_decompress": _adapter_decompress,
    "adapter_decompress_backward": _adapter_decompress_backward,
    "compressed_ffn": _compressed_ffn,
    "compressed_ffn_backward": _compressed_ffn_backward,
    "int8_linear": _int8_linear,
    "feed_forward": _feed_forward,
    "self_attention": _self_attention,
    "grouped_attention": _grouped_attention,
    "grouped_attention_backward": _grouped_attention_backward,
}
