"""Gradients of group_merge: of the scores and of x. Weight gradients: weight_sums.py.

Saved from the forward are only the softmax weights; h is made again from x.
"""

import triton
import triton.language as tl

from .slots import batch_jit, locate, norm_vectors, row_statistics


@batch_jit()
def score_gradient_kernel(
    p_x, p_norm_weight, p_norm_bias, p_start, p_span, p_owned, p_mask,
    p_weights, p_d_merged, p_d_scores, p_mean, p_rstd,
    count, launched, n, per_row, d, x_stride, eps,
    K: tl.constexpr, K2: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr,
    NORM: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """``ds_j = a_j (dg·h_j - Σ a dg·h)`` to ``d_scores [groups, K2]``; row statistics beside it."""
    BT: tl.constexpr = BG * K2
    o_t = tl.arange(0, BT)
    o_g, o_j = tl.program_id(0) * BG + o_t // K2, o_t % K2
    m_g = o_g < count
    token, _, real = locate(
        o_g, o_j, p_start, p_span, p_owned, p_mask, launched, n, per_row, K, FORM
    )
    real = real & m_g
    p_row = p_x + token * x_stride
    p_gradient = p_d_merged + o_g.to(tl.int64) * d
    o_slot = o_g.to(tl.int64) * K2 + o_j
    mean = tl.zeros([BT], tl.float32)
    rstd = tl.full([BT], 1.0, tl.float32)
    if NORM != "none":
        mean, rstd = row_statistics(p_row, real, d, eps, BT, BD, NORM)
        tl.store(p_mean + o_slot, mean, mask=m_g)
        tl.store(p_rstd + o_slot, rstd, mask=m_g)
    d_a = tl.zeros([BT], tl.float32)
    for o in range(0, d, BD):
        o_d = o + tl.arange(0, BD)
        m = real[:, None] & (o_d < d)[None, :]
        b_h = tl.load(p_row[:, None] + o_d[None, :], mask=m, other=0.0).to(tl.float32)
        b_dg = tl.load(p_gradient[:, None] + o_d[None, :], mask=m, other=0.0).to(tl.float32)
        if NORM != "none":
            weight, bias = norm_vectors(p_norm_weight, p_norm_bias, o_d, d)
            b_h = (b_h - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]
        d_a += tl.sum(b_h * b_dg, 1)
    a = tl.load(p_weights + o_g.to(tl.int64) * K + o_j, mask=m_g & (o_j < K), other=0.0)
    total = tl.sum(tl.reshape(a * d_a, (BG, K2)), 1)
    b_ds = tl.reshape(a, (BG, K2)) * (tl.reshape(d_a, (BG, K2)) - total[:, None])
    tl.store(p_d_scores + o_slot, tl.reshape(b_ds, (BT,)), mask=m_g)


@triton.jit
def hidden_gradient(
    pieces, b_ds, a, p_projection, p_weight, p_gradient, real, o_i, o_s, m_c, o_d, d,
    weight_stride, projection_stride, R: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dh = a dg + W_1hᵀ dP + W_cᵀ ds`` of a tile, fp32: columns ``o_d``; dP in pieces of BR."""
    m_d = o_d < d
    p = p_weight + (o_i.to(tl.int64) * weight_stride + o_s.to(tl.int64) * d)[:, None] + o_d[None, :]
    b_w = tl.load(p, mask=m_c[:, None] & m_d[None, :], other=0.0)
    b_dh = tl.dot(b_ds, b_w.to(b_ds.dtype), input_precision=PRECISION)
    for first in tl.static_range(0, R, BR):
        o_r = first + tl.arange(0, BR)
        p = p_projection + o_r.to(tl.int64)[:, None] * projection_stride + o_d[None, :]
        b_w = tl.load(p, mask=(o_r < R)[:, None] & m_d[None, :], other=0.0)
        b_dh = tl.dot(pieces[first // BR], b_w.to(b_ds.dtype), b_dh, input_precision=PRECISION)
    m = real[:, None] & m_d[None, :]
    b_dg = tl.load(p_gradient[:, None] + o_d[None, :], mask=m, other=0.0).to(tl.float32)
    return tl.where(m, b_dh + a[:, None] * b_dg, 0.0)


@batch_jit()
def merge_backward_kernel(
    p_x, p_weight, p_projection, p_norm_weight, p_norm_bias, p_start, p_span, p_owned, p_mask,
    p_weights, p_d_merged, p_d_projected, p_d_scores, p_mean, p_rstd,
    p_dx, p_d_norm_weight, p_d_norm_bias,
    count, launched, n, per_row, d, x_stride, weight_stride, projection_stride,
    K: tl.constexpr, K2: tl.constexpr, SC: tl.constexpr, C: tl.constexpr, BG: tl.constexpr,
    BD: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, NORM: tl.constexpr, FORM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dx, and a program's part of the gradients of the norm's vectors ``[programs, d]``."""
    BT: tl.constexpr = BG * SC
    dtype = p_x.dtype.element_ty
    first_slot = tl.program_id(1) * SC
    o_t = tl.arange(0, BT)
    o_g, o_j = tl.program_id(0) * BG + o_t // SC, first_slot + o_t % SC
    token, owned, real = locate(
        o_g, o_j, p_start, p_span, p_owned, p_mask, launched, n, per_row, K, FORM
    )
    real = real & (o_g < count)
    o_c = tl.arange(0, C)
    o_i, o_s = o_c % K2, first_slot + o_c // K2
    m_c = (o_i < K) & (o_s < K) & (o_c < SC * K2)
    o_slot = o_g.to(tl.int64) * K2
    # ds stands in the columns of its own slot alone.
    m_own = real[:, None] & m_c[None, :] & ((o_t % SC)[:, None] == (o_c // K2)[None, :])
    b_ds = tl.load(p_d_scores + o_slot[:, None] + o_i[None, :], mask=m_own, other=0.0).to(dtype)
    pieces = ()
    for first in tl.static_range(0, R, BR):
        o_r = first + tl.arange(0, BR)
        p_dp = p_d_projected + token[:, None] * R + o_r[None, :]
        b_dp = tl.load(p_dp, mask=real[:, None] & (o_r < R)[None, :], other=0.0)
        pieces = pieces + (b_dp.to(dtype),)  # type: ignore[assignment]  # noqa: RUF005
    a = tl.load(p_weights + o_g.to(tl.int64) * K + o_j, mask=real, other=0.0)
    p_row = p_x + token * x_stride
    p_gradient = p_d_merged + o_g.to(tl.int64) * d
    p_out = p_dx + token * d
    if NORM == "none":
        for o in range(0, d, BD):
            o_d = o + tl.arange(0, BD)
            b_dh = hidden_gradient(
                pieces, b_ds, a, p_projection, p_weight, p_gradient, real, o_i, o_s, m_c, o_d, d,
                weight_stride, projection_stride, R, BR, PRECISION,
            )  # fmt: skip
            m = owned[:, None] & (o_d < d)[None, :]
            tl.store(p_out[:, None] + o_d[None, :], b_dh.to(dtype), mask=m)
    else:
        mean = tl.load(p_mean + o_slot + o_j, mask=real, other=0.0)
        rstd = tl.load(p_rstd + o_slot + o_j, mask=real, other=0.0)
        program = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
        along = tl.zeros([BT], tl.float32)
        across = tl.zeros([BT], tl.float32)
        for o in range(0, d, BD):
            o_d = o + tl.arange(0, BD)
            m_d = o_d < d
            b_dh = hidden_gradient(
                pieces, b_ds, a, p_projection, p_weight, p_gradient, real, o_i, o_s, m_c, o_d, d,
                weight_stride, projection_stride, R, BR, PRECISION,
            )  # fmt: skip
            m = real[:, None] & m_d[None, :]
            b_x = tl.load(p_row[:, None] + o_d[None, :], mask=m, other=0.0).to(tl.float32)
            b_x = tl.where(m, (b_x - mean[:, None]) * rstd[:, None], 0.0)
            weight, _ = norm_vectors(p_norm_weight, None, o_d, d)
            b_wdh = b_dh * weight[None, :]
            along += tl.sum(b_wdh * b_x, 1)
            across += tl.sum(b_wdh, 1)
            if p_norm_weight is not None:
                tl.store(p_d_norm_weight + program * d + o_d, tl.sum(b_dh * b_x, 0), mask=m_d)
            if p_norm_bias is not None:
                tl.store(p_d_norm_bias + program * d + o_d, tl.sum(b_dh, 0), mask=m_d)
        along = along / d
        across = across / d if NORM == "layer" else tl.zeros([BT], tl.float32)
        for o in range(0, d, BD):
            o_d = o + tl.arange(0, BD)
            m_d = o_d < d
            b_dh = hidden_gradient(
                pieces, b_ds, a, p_projection, p_weight, p_gradient, real, o_i, o_s, m_c, o_d, d,
                weight_stride, projection_stride, R, BR, PRECISION,
            )  # fmt: skip
            m = real[:, None] & m_d[None, :]
            b_x = tl.load(p_row[:, None] + o_d[None, :], mask=m, other=0.0).to(tl.float32)
            b_x = (b_x - mean[:, None]) * rstd[:, None]
            weight, _ = norm_vectors(p_norm_weight, None, o_d, d)
            b_dx = b_dh * weight[None, :] - b_x * along[:, None] - across[:, None]
            b_dx = tl.where(m, b_dx * rstd[:, None], 0.0)
            m = owned[:, None] & m_d[None, :]
            tl.store(p_out[:, None] + o_d[None, :], b_dx.to(dtype), mask=m)
