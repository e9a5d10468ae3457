"""What the kernels share: where a slot's token lies, norms, softmax over slots, dot operands."""

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl


def batch_jit(*numbers: str, lists: tuple[str, ...] = ()) -> Callable[[Callable], Any]:
    """``triton.jit`` for a kernel over a batch's groups: compiled once, whatever sizes come.

    Triton compiles a kernel again where a number becomes 1 or a multiple of 16, or a pointer one of
    16 bytes. Of what changes with every request (the groups' numbers and lists, and ``numbers`` and
    ``lists`` besides) it would do so for seconds, at a random request or inside a graph capture.
    """
    return triton.jit(
        do_not_specialize=["count", "launched", "n", "per_row", *numbers],
        do_not_specialize_on_alignment=["p_start", "p_span", "p_owned", "p_mask", "p_kept", *lists],
    )


@triton.jit
def locate(
    o_g, o_j, p_start, p_span, p_owned, p_mask, launched, n, per_row,
    K: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Slot ``o_j`` of group ``o_g``: its token (int64), whether it owns one, whether that is real.

    See ``ops/gpu_arguments.py``. A token that a slot owns but that is not real is passed through.
    """
    owned = (o_g < launched) & (o_j < K)
    if FORM == "listed":
        token = tl.load(p_start + o_g, mask=owned, other=0) + o_j
        real = owned & (o_j < tl.load(p_span + o_g, mask=owned, other=0))
        owned = owned & (o_j < tl.load(p_owned + o_g, mask=owned, other=0))
        token = tl.where(token >= n, token - n, token)
        inside = (token >= 0) & (token < n)  # offsets on a device are not checked
        owned = owned & inside
        real = real & inside
        if p_mask is not None:
            real = real & (tl.load(p_mask + token, mask=real, other=0) != 0)
    else:
        row = o_g // per_row
        position = (o_g - row * per_row) * K + o_j
        owned = owned & (position < n)
        real = owned
        if FORM == "masked":
            position = position + tl.load(p_start + row, mask=owned, other=0)
            real = owned & (position < n)
            position = tl.where(position >= n, position - n, position)
        token = row.to(tl.int64) * n + position
        if FORM == "masked":
            real = real & (tl.load(p_mask + token, mask=owned, other=0) != 0)
    return token, owned, real


@triton.jit
def row_statistics(p_row, m_row, d, eps, BT: tl.constexpr, BD: tl.constexpr, NORM: tl.constexpr):
    """Mean (0 for RMS norm) and reciprocal deviation of rows of ``d`` numbers, in fp32."""
    mean = tl.zeros([BT], tl.float32)
    if NORM == "layer":
        # Of differences to one of the row's numbers: a sum of large ones would lose its last bits.
        pivot = tl.load(p_row, mask=m_row, other=0.0).to(tl.float32)
        for o in range(0, d, BD):
            o_d = o + tl.arange(0, BD)
            m = m_row[:, None] & (o_d < d)[None, :]
            b_x = tl.load(p_row[:, None] + o_d[None, :], mask=m, other=0.0).to(tl.float32)
            mean += tl.sum(tl.where(m, b_x - pivot[:, None], 0.0), 1)
        mean = pivot + mean / d
    squares = tl.zeros([BT], tl.float32)
    for o in range(0, d, BD):
        o_d = o + tl.arange(0, BD)
        m = m_row[:, None] & (o_d < d)[None, :]
        b_x = tl.load(p_row[:, None] + o_d[None, :], mask=m, other=0.0).to(tl.float32)
        b_x = tl.where(m, b_x - mean[:, None], 0.0)
        squares += tl.sum(b_x * b_x, 1)
    return mean, tl.where(m_row, tl.rsqrt(squares / d + eps), 0.0)


@triton.jit
def norm_vectors(p_norm_weight, p_norm_bias, o_d, d):
    """Norm weight and bias of the columns ``o_d``; 1 and 0 where there is none."""
    weight = tl.full(o_d.shape, 1.0, tl.float32)
    bias = tl.zeros(o_d.shape, tl.float32)
    if p_norm_weight is not None:
        weight = tl.load(p_norm_weight + o_d, mask=o_d < d, other=0.0).to(tl.float32)
    if p_norm_bias is not None:
        bias = tl.load(p_norm_bias + o_d, mask=o_d < d, other=0.0).to(tl.float32)
    return weight, bias


@triton.jit
def slot_softmax(scores, real):
    """Softmax of ``scores [groups, slots]`` over the slots that hold a token; 0 elsewhere."""
    scores = tl.where(real, scores, float("-inf"))
    top = tl.max(scores, 1)
    top = tl.where(top == float("-inf"), 0.0, top)
    b_e = tl.exp(scores - top[:, None])
    total = tl.sum(b_e, 1)
    return b_e / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def column(b_values, o_column, j):
    """Column ``j`` of ``b_values``, whose columns are ``o_column``."""
    return tl.sum(tl.where((o_column == j)[None, :], b_values, 0.0), 1)


@triton.jit
def adapter_activation(z, TANH: tl.constexpr):
    if TANH:
        z = 1.0 - 2.0 / (tl.exp(2.0 * z) + 1.0)  # right at both ends, where exp is 0 or infinite
    return z
