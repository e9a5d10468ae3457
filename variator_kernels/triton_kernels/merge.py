"""group_merge: scores, softmax, weighted sum and ``W_1h h`` from one look at x in device memory.

A program takes a tile of BG groups by SC slots as the rows of its matrix products. The scores of a
token need that slot's part of W_c: the tile is multiplied with the parts of all its SC slots and
each row keeps its own. Where SC covers all slots the program also makes the weighted sum, from rows
that are still in cache; where k is too large for that, programs write the scores of their slots
and ``weighted_sum_kernel`` finishes.
"""

import triton
import triton.language as tl

from .slots import batch_jit, column, locate, norm_vectors, row_statistics, slot_softmax


@triton.jit
def write_merged(
    p_x, p_norm_weight, p_norm_bias, p_start, p_span, p_owned, p_mask, p_merged,
    b_coefficient, b_mean, total, o_g, o, count, launched, n, per_row, d, x_stride,
    K: tl.constexpr, K2: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr,
    NORM: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Columns ``o .. o+BD-1`` of the merged vectors: sum over slots, then the norm's vectors."""
    o_k = tl.arange(0, K2)
    o_d = o + tl.arange(0, BD)
    b_sum = tl.zeros([BG, BD], tl.float32)
    for j in tl.static_range(K):
        token, _, real = locate(
            o_g, j, p_start, p_span, p_owned, p_mask, launched, n, per_row, K, FORM
        )
        m = real[:, None] & (o_d < d)[None, :]
        p = p_x + (token * x_stride)[:, None] + o_d[None, :]
        b_x = tl.load(p, mask=m, other=0.0).to(tl.float32)
        if NORM == "layer":
            b_x = tl.where(m, b_x - column(b_mean, o_k, j)[:, None], 0.0)
        b_sum += column(b_coefficient, o_k, j)[:, None] * b_x
    weight, bias = norm_vectors(p_norm_weight, p_norm_bias, o_d, d)
    b_sum = b_sum * weight[None, :] + total[:, None] * bias[None, :]
    p = p_merged + o_g.to(tl.int64)[:, None] * d + o_d[None, :]
    m = (o_g < count)[:, None] & (o_d < d)[None, :]
    tl.store(p, b_sum.to(p_merged.dtype.element_ty), mask=m)


@triton.jit
def normalized(b_x, m, mean, rstd, p_norm_weight, p_norm_bias, o_d, d):
    """h of columns ``o_d``, 0 where ``m`` is not, in the storage dtype."""
    weight, bias = norm_vectors(p_norm_weight, p_norm_bias, o_d, d)
    b_h = (b_x.to(tl.float32) - mean[:, None]) * rstd[:, None]
    return tl.where(m, b_h * weight[None, :] + bias[None, :], 0.0).to(b_x.dtype)


@triton.jit
def project(
    p_row, p_projection, p_norm_weight, p_norm_bias, p_projected, token, owned, real, mean, rstd,
    first, d, projection_stride, BT: tl.constexpr, BD: tl.constexpr, R: tl.constexpr,
    BR: tl.constexpr, NORM: tl.constexpr, STATISTICS_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns ``first .. first + BR - 1`` of ``W_1h h``, where the rows' statistics are known."""
    o_r = first + tl.arange(0, BR)
    b_projected = tl.zeros([BT, BR], tl.float32)
    for o in range(0, d, BD):
        o_d = o + tl.arange(0, BD)
        m = real[:, None] & (o_d < d)[None, :]
        b_h = tl.load(p_row[:, None] + o_d[None, :], mask=m, other=0.0)
        p = p_projection + o_r.to(tl.int64)[None, :] * projection_stride + o_d[:, None]
        b_p = tl.load(p, mask=(o_r < R)[None, :] & (o_d < d)[:, None], other=0.0)
        if STATISTICS_FIRST:
            b_h = normalized(b_h, m, mean, rstd, p_norm_weight, p_norm_bias, o_d, d)
        elif NORM == "rms":
            weight, _ = norm_vectors(p_norm_weight, None, o_d, d)
            b_p = b_p.to(tl.float32) * weight[:, None]
        b_projected = tl.dot(b_h, b_p.to(b_h.dtype), b_projected, input_precision=PRECISION)
    if NORM == "rms" and not STATISTICS_FIRST:
        b_projected *= rstd[:, None]
    b_projected = tl.where(real[:, None], b_projected, 0.0)
    p = p_projected + token[:, None] * R + o_r[None, :]
    tl.store(p, b_projected, mask=owned[:, None] & (o_r < R)[None, :])


@batch_jit()
def group_merge_kernel(
    p_x, p_weight, p_bias, p_projection, p_norm_weight, p_norm_bias,
    p_start, p_span, p_owned, p_mask,
    p_merged, p_projected, p_weights, p_scores, p_mean, p_rstd,
    count, launched, n, per_row, d, x_stride, weight_stride, projection_stride, eps,
    K: tl.constexpr, K2: tl.constexpr, SC: tl.constexpr, C: tl.constexpr, BG: tl.constexpr,
    BD: tl.constexpr, BS: tl.constexpr, R: tl.constexpr, BR: tl.constexpr, NORM: tl.constexpr,
    FORM: tl.constexpr, STATISTICS_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns of ``W_1h h`` behind the first BR are made in later walks over the tile's x."""
    BT: tl.constexpr = BG * SC
    dtype = p_x.dtype.element_ty
    pid, first_slot = tl.program_id(0), tl.program_id(1) * SC
    o_t = tl.arange(0, BT)
    o_g, o_j = pid * BG + o_t // SC, first_slot + o_t % SC
    token, owned, real = locate(
        o_g, o_j, p_start, p_span, p_owned, p_mask, launched, n, per_row, K, FORM
    )
    p_row = p_x + token * x_stride
    mean = tl.zeros([BT], tl.float32)
    rstd = tl.full([BT], 1.0, tl.float32)
    if STATISTICS_FIRST:
        mean, rstd = row_statistics(p_row, real, d, eps, BT, BD, NORM)

    # Column c of the score product: score c % K2 by the weights of slot c // K2 of the tile.
    o_c = tl.arange(0, C)
    o_i, o_s = o_c % K2, first_slot + o_c // K2
    m_c = (o_i < K) & (o_s < K) & (o_c < SC * K2)
    p_score = p_weight + o_i.to(tl.int64) * weight_stride + o_s.to(tl.int64) * d
    o_r = tl.arange(0, BR)
    b_score = tl.zeros([BT, C], tl.float32)
    b_projected = tl.zeros([BT, BR], tl.float32)
    squares = tl.zeros([BT], tl.float32)
    for o in range(0, d, BD):
        o_d = o + tl.arange(0, BD)
        m_d = o_d < d
        m = real[:, None] & m_d[None, :]
        b_h = tl.load(p_row[:, None] + o_d[None, :], mask=m, other=0.0)
        b_w = tl.load(p_score[None, :] + o_d[:, None], mask=m_c[None, :] & m_d[:, None], other=0.0)
        if R > 0:
            p = p_projection + o_r.to(tl.int64)[None, :] * projection_stride + o_d[:, None]
            b_p = tl.load(p, mask=(o_r < R)[None, :] & m_d[:, None], other=0.0)
        if STATISTICS_FIRST:
            b_h = normalized(b_h, m, mean, rstd, p_norm_weight, p_norm_bias, o_d, d)
        elif NORM == "rms":
            # 1/rms is known after the loop and multiplies the sums; the norm's weight goes to the
            # right-hand sides, so that x reaches the tensor cores as it lies in memory.
            b_wide = b_h.to(tl.float32)
            squares += tl.sum(b_wide * b_wide, 1)
            weight, _ = norm_vectors(p_norm_weight, None, o_d, d)
            b_w = b_w.to(tl.float32) * weight[:, None]
            if R > 0:
                b_p = b_p.to(tl.float32) * weight[:, None]
        b_score = tl.dot(b_h, b_w.to(dtype), b_score, input_precision=PRECISION)
        if R > 0:
            b_projected = tl.dot(b_h, b_p.to(dtype), b_projected, input_precision=PRECISION)
    if NORM == "rms" and not STATISTICS_FIRST:
        rstd = tl.where(real, tl.rsqrt(squares / d + eps), 0.0)
        b_score *= rstd[:, None]
        b_projected *= rstd[:, None]

    if R > 0:
        b_projected = tl.where(real[:, None], b_projected, 0.0)
        p = p_projected + token[:, None] * R + o_r[None, :]
        tl.store(p, b_projected, mask=owned[:, None] & (o_r < R)[None, :])
        for first in range(BR, R, BR):
            project(
                p_row, p_projection, p_norm_weight, p_norm_bias, p_projected, token, owned, real,
                mean, rstd, first, d, projection_stride, BT, BD, R, BR, NORM, STATISTICS_FIRST,
                PRECISION,
            )  # fmt: skip

    SLOTS: tl.constexpr = C // K2
    mine = tl.arange(0, SLOTS)[None, :, None] == (o_t % SC)[:, None, None]
    b_own = tl.sum(tl.where(mine, tl.reshape(b_score, (BT, SLOTS, K2)), 0.0), 1)
    b_own = tl.sum(tl.reshape(b_own, (BG, SC, K2)), 1)
    o_b = pid * BG + tl.arange(0, BG)
    o_k = tl.arange(0, K2)
    m_g = o_b < count
    if SC == K2:
        bias_c = tl.load(p_bias + o_k, mask=o_k < K, other=0.0).to(tl.float32)
        b_real = tl.reshape(real.to(tl.int32), (BG, K2)) != 0
        b_a = slot_softmax(b_own + bias_c[None, :], b_real)
        p = p_weights + o_b.to(tl.int64)[:, None] * K + o_k[None, :]
        tl.store(p, b_a, mask=m_g[:, None] & (o_k < K)[None, :])
        b_coefficient = b_a * tl.reshape(rstd, (BG, K2)) if NORM != "none" else b_a
        b_mean = tl.reshape(mean, (BG, K2))
        total = tl.sum(b_a, 1)
        # From the last columns to the first: the last ones are still in cache.
        for o in range(0, d, BS):
            write_merged(
                p_x, p_norm_weight, p_norm_bias, p_start, p_span, p_owned, p_mask, p_merged,
                b_coefficient, b_mean, total, o_b, (tl.cdiv(d, BS) - 1) * BS - o,
                count, launched, n, per_row, d, x_stride, K, K2, BG, BS, NORM, FORM,
            )  # fmt: skip
    else:
        p = p_scores + (tl.program_id(1).to(tl.int64) * count + o_b)[:, None] * K2 + o_k[None, :]
        tl.store(p, b_own, mask=m_g[:, None])
        if NORM != "none":
            o_token = o_g.to(tl.int64) * K2 + o_j
            tl.store(p_rstd + o_token, rstd, mask=o_g < count)
            if NORM == "layer":
                tl.store(p_mean + o_token, mean, mask=o_g < count)


@batch_jit()
def weighted_sum_kernel(
    p_x, p_bias, p_norm_weight, p_norm_bias, p_start, p_span, p_owned, p_mask,
    p_merged, p_weights, p_scores, p_mean, p_rstd,
    count, launched, n, per_row, d, x_stride,
    K: tl.constexpr, K2: tl.constexpr, PARTS: tl.constexpr, BG: tl.constexpr, BS: tl.constexpr,
    NORM: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Adds up the scores of PARTS programs, then softmax and weighted sum."""
    o_g = tl.program_id(0) * BG + tl.arange(0, BG)
    o_k = tl.arange(0, K2)
    m_g = o_g < count
    b_score = tl.zeros([BG, K2], tl.float32)
    o_gk = o_g.to(tl.int64)[:, None] * K2 + o_k[None, :]
    for part in tl.static_range(PARTS):
        p = p_scores + tl.full([], part, tl.int64) * count * K2 + o_gk
        b_score += tl.load(p, mask=m_g[:, None], other=0.0)
    b_score += tl.load(p_bias + o_k, mask=o_k < K, other=0.0).to(tl.float32)[None, :]
    _, _, real = locate(
        o_g[:, None], o_k[None, :], p_start, p_span, p_owned, p_mask, launched, n, per_row, K, FORM
    )
    b_a = slot_softmax(b_score, real)
    if tl.program_id(1) == 0:
        p = p_weights + o_g.to(tl.int64)[:, None] * K + o_k[None, :]
        tl.store(p, b_a, mask=m_g[:, None] & (o_k < K)[None, :])
    b_coefficient = b_a
    b_mean = tl.zeros([BG, K2], tl.float32)
    if NORM != "none":
        b_coefficient *= tl.load(p_rstd + o_gk, mask=m_g[:, None], other=0.0)
        if NORM == "layer":
            b_mean = tl.load(p_mean + o_gk, mask=m_g[:, None], other=0.0)
    write_merged(
        p_x, p_norm_weight, p_norm_bias, p_start, p_span, p_owned, p_mask, p_merged,
        b_coefficient, b_mean, tl.sum(b_a, 1), o_g, tl.program_id(1) * BS,
        count, launched, n, per_row, d, x_stride, K, K2, BG, BS, NORM, FORM,
    )  # fmt: skip
