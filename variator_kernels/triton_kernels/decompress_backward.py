"""Gradients of adapter_decompress: per token, per group. Weight gradients: weight_sums.py.

Nothing of the forward is saved but its inputs; t is made again.
"""

import triton.language as tl

from .decompress import adapter_inner
from .slots import batch_jit, locate


@batch_jit()
def inner_gradient_kernel(
    p_dy, p_u, p_projected, p_w1u, p_b1, p_w2, p_start, p_span, p_owned, p_mask,
    p_t, p_dz, count, launched, n, per_row, d, dy_stride, w1u_stride, w2_stride,
    K: tl.constexpr, BT: tl.constexpr, BU: tl.constexpr, BD: tl.constexpr, R: tl.constexpr,
    BR: tl.constexpr, TANH: tl.constexpr, FORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dz = (W_2ᵀ dy) φ'`` (fp32) and t (storage dtype) of every token ``[tokens, R]``.

    A program makes BR columns of BT slots.
    """
    dtype = p_u.dtype.element_ty
    o_slot = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o_g, o_j = (o_slot // K).to(tl.int32), (o_slot % K).to(tl.int32)
    first_group = (tl.program_id(0).to(tl.int64) * BT // K).to(tl.int32)
    token, owned, real = locate(
        o_g, o_j, p_start, p_span, p_owned, p_mask, launched, n, per_row, K, FORM
    )
    first = tl.program_id(1) * BR
    b_t = adapter_inner(
        p_u, p_projected, p_w1u, p_b1, token, real, o_g, first_group, first, count, d, w1u_stride,
        BT, BU, BD, R, BR, TANH, PRECISION,
    )  # fmt: skip
    o_r = first + tl.arange(0, BR)
    b_dt = tl.zeros([BT, BR], tl.float32)
    for o in range(0, d, BD):
        o_d = o + tl.arange(0, BD)
        m_d = o_d < d
        p = p_dy + (token * dy_stride)[:, None] + o_d[None, :]
        b_dy = tl.load(p, mask=real[:, None] & m_d[None, :], other=0.0)
        p = p_w2 + o_d.to(tl.int64)[:, None] * w2_stride + o_r[None, :]
        b_w = tl.load(p, mask=m_d[:, None] & (o_r < R)[None, :], other=0.0)
        b_dt = tl.dot(b_dy.to(dtype), b_w.to(dtype), b_dt, input_precision=PRECISION)
    if TANH:
        b_dt *= 1.0 - b_t * b_t
    b_dt = tl.where(real[:, None], b_dt, 0.0)
    o_out = token[:, None] * R + o_r[None, :]
    m = owned[:, None] & (o_r < R)[None, :]
    tl.store(p_dz + o_out, b_dt, mask=m)
    tl.store(p_t + o_out, b_t.to(dtype), mask=m)


@batch_jit()
def group_gradient_kernel(
    p_dy, p_dz, p_w1u, p_start, p_span, p_owned, p_mask, p_du, p_d_group,
    count, launched, n, per_row, d, dy_stride, w1u_stride,
    K: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr, R: tl.constexpr, BR: tl.constexpr,
    FORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``du = Σ_j dy_j + W_1uᵀ Σ_j dz_j``; the second sum goes to ``d_group [groups, R]``, fp32."""
    dtype = p_du.dtype.element_ty
    o_g = tl.program_id(0) * BG + tl.arange(0, BG)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d, m_g = o_d < d, o_g < count
    b_du = tl.zeros([BG, BD], tl.float32)
    for j in range(K):
        token, _, real = locate(
            o_g, j, p_start, p_span, p_owned, p_mask, launched, n, per_row, K, FORM
        )
        p = p_dy + (token * dy_stride)[:, None] + o_d[None, :]
        b_du += tl.load(p, mask=real[:, None] & m_d[None, :], other=0.0).to(tl.float32)
    for first in range(0, R, BR):
        o_r = first + tl.arange(0, BR)
        m_r = o_r < R
        b_dz = tl.zeros([BG, BR], tl.float32)
        for j in range(K):
            token, _, real = locate(
                o_g, j, p_start, p_span, p_owned, p_mask, launched, n, per_row, K, FORM
            )
            p = p_dz + token[:, None] * R + o_r[None, :]
            b_dz += tl.load(p, mask=real[:, None] & m_r[None, :], other=0.0)
        if tl.program_id(1) == 0:
            p = p_d_group + o_g.to(tl.int64)[:, None] * R + o_r[None, :]
            tl.store(p, b_dz, mask=m_g[:, None] & m_r[None, :])
        p = p_w1u + o_r.to(tl.int64)[:, None] * w1u_stride + o_d[None, :]
        b_w = tl.load(p, mask=m_r[:, None] & m_d[None, :], other=0.0)
        b_du = tl.dot(b_dz.to(dtype), b_w.to(dtype), b_du, input_precision=PRECISION)
    p = p_du + o_g.to(tl.int64)[:, None] * d + o_d[None, :]
    tl.store(p, b_du.to(dtype), mask=m_g[:, None] & m_d[None, :])
