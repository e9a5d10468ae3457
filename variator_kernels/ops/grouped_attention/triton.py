"""grouped_attention on the Triton kernels (triton_kernels/attention.py, attention_backward.py).

Whole positions of one row must lie within 2^29 of one another; others are exact as fp64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ...triton_kernels import launch
from ...triton_kernels.attention import attention_kernel
from ...triton_kernels.attention_backward import key_gradient_kernel, query_gradient_kernel
from ..arguments import require
from ..library import accumulator
from .kernel_checks import check
from .op import Attention

FEWEST_ROWS = 16  # that a matrix product takes
# Products of fp32 and fp64 are others, and so are the tiles that fit.
_SUFFIX = {torch.float32: "_fp32", torch.float64: "_fp64"}


class Launch(NamedTuple):
    """What every kernel is told of a call: lists, strides, sizes, and what it is compiled for."""

    q: Tensor
    k: Tensor
    v: Tensor
    lists: tuple[Tensor | None, ...]
    """bias, first, last, values, query positions, key positions, pattern."""
    numbers: tuple[Any, ...]
    constants: dict[str, Any]

    @property
    def rows(self) -> int:
        """Of a head of keys: pairs of a query and a head."""
        return self.q.shape[1] * self.constants["SHARED"]

    @property
    def pairs(self) -> int:
        """Of batch rows and heads of keys."""
        return self.k.shape[0] * self.k.shape[2]


def _unit_inner(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def _launch(call: Attention) -> Launch:
    check(call)
    q, k, v = (_unit_inner(t) for t in call[:3])
    (n, heads, d), (count, kv_heads) = q.shape[1:], k.shape[1:3]
    scale, wide, relative = call.scale, accumulator(q.dtype), call.relative
    if wide == torch.float64:  # a number reaches a kernel as fp32
        q, scale = q * scale, 1.0
    lists: list[Tensor | None] = [*call.visible, None, None, None, None]
    patterns = per_head = width = origin = 0
    places = "none"
    if relative is not None:
        values, positions = relative.values, relative[1:3]
        patterns, per_head, width = values.shape
        origin = relative.origin
        whole = not any(t.is_floating_point() for t in positions)
        places = "whole" if whole else "real"
        lists[3:] = [values.detach().to(wide).contiguous(), *positions, relative.pattern]
        require(values.numel() < 2**31, "values of distances are addressed by 32 bits")
    for i, each in enumerate(lists):
        if i != 3 and each is not None:
            lists[i] = _unit_inner(each)
    strides = (t.stride(0) if t is not None else 0 for t in (*lists[:3], *lists[4:]))
    numbers = (
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *strides,
        n, count, kv_heads, patterns, per_head * width, width if per_head > 1 else 0, width,
        origin, scale,
    )  # fmt: skip
    constants = {
        "SHARED": heads // kv_heads, "HEAD": d, "D": launch.power_of_2(d, 16),
        "ALIGNED": all(t.stride(0) % 16 == 0 for t in (q, k, v)),
        "HIDES": any(t is not None for t in call.visible), "PLACES": places,
        "WIDE": tl.float64 if wide == torch.float64 else tl.float32,
        "PRECISION": launch.precision(q),
    }  # fmt: skip
    require(n * heads < 2**31 and count < 2**31, "queries and keys are counted in 32 bits")
    return Launch(q, k, v, tuple(lists), numbers, constants)


def _tiles(kernel: str, call: Launch) -> dict[str, Any]:
    """Settings of a kernel; a step of decoding, which has few rows, does not fill a tile."""
    row = launch.settings(
        f"{kernel}{_SUFFIX.get(call.q.dtype, '')}",
        arch=launch.arch(call.q),
        d=call.constants["D"],
        terms=call.constants["PLACES"] != "none",
    )
    bm = FEWEST_ROWS if call.rows <= FEWEST_ROWS else row["bm"]
    return {"BM": bm, "BN": row["bn"], **launch.options(row)}


def grouped_attention(call: Attention) -> Tensor:
    made = _launch(call)
    q, k, v, lists, numbers, constants = made
    out = q.new_empty(q.shape)
    if out.numel() == 0:
        return out
    if k.shape[1] == 0:
        return out.zero_()
    tiles = _tiles("attention", made)
    with launch.device_of(q):
        attention_kernel[(launch.cdiv(made.rows, tiles["BM"]) * made.pairs,)](
            q, k, v, out, *lists, *numbers, **constants, **tiles
        )
    return out


def grouped_attention_backward(
    d_out: Tensor, call: Attention, d_bias: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made = _launch(call)
    q, k, v, lists, numbers, constants = made
    require(d_out.shape == q.shape, f"d_out is {list(d_out.shape)}")
    wide = accumulator(q.dtype)
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), k.new_zeros(k.shape[:2], dtype=wide)
    d_out = d_out.to(q.dtype).contiguous()
    statistics = q.new_empty(3, made.pairs, made.rows, dtype=wide).unbind()
    tiles = _tiles("attention_queries", made)
    parts = None
    if d_bias and call.visible.bias is not None:
        parts = k.new_empty(k.shape[0], k.shape[2], k.shape[1], dtype=wide)
    with launch.device_of(q):
        query_gradient_kernel[(launch.cdiv(made.rows, tiles["BM"]) * made.pairs,)](
            q, k, v, d_out, dq, *statistics, *lists, *numbers, **constants, **tiles
        )
        tiles = _tiles("attention_keys", made)
        key_gradient_kernel[(launch.cdiv(k.shape[1], tiles["BN"]) * made.pairs,)](
            q, k, v, d_out, *statistics, dk, dv, parts, *lists, *numbers, **constants, **tiles
        )
        of_bias = k.new_zeros(k.shape[:2], dtype=wide) if parts is None else parts.sum(1)
    if wide == torch.float64:
        dq *= call.scale
    return dq, dk, dv, of_bias
