"""Weight gradients: sums of outer products over tokens, the same for merge and decompress."""

import triton.language as tl

from .slots import batch_jit, locate, norm_vectors


@batch_jit("tiles")
def weight_sums_kernel(
    p_a, p_norm_weight, p_norm_bias, p_mean, p_rstd, p_b, p_scores,
    p_start, p_span, p_owned, p_mask, p_sum_b, p_sum_scores, p_sum_a,
    count, launched, n, per_row, d, a_stride, tiles,
    K: tl.constexpr, K2: tl.constexpr, C: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr,
    R: tl.constexpr, BR: tl.constexpr, NORM: tl.constexpr, FORM: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns of one slot over a share of the groups, fp32; of ``b`` BR columns. A program writes
    its own part:

    ``sum_b [parts, R, d] = Σ b ⊗ norm(a)`` over tokens, ``sum_scores [parts, K, d]`` the same for
    ``scores [groups, K2]``, ``sum_a [parts, d]``; parts are shares x slots. Added up in a fixed
    order afterwards, so gradients do not change from run to run.
    """
    dtype = p_a.dtype.element_ty
    pieces: tl.constexpr = max(1, (R + BR - 1) // BR)
    j, piece = tl.program_id(1) // pieces, tl.program_id(1) % pieces
    o_d = tl.program_id(0) * BD + tl.arange(0, BD)
    o_j = tl.zeros([BG], tl.int32) + j
    o_r, o_c = piece * BR + tl.arange(0, BR), tl.arange(0, C)
    m_d = o_d < d
    b_sum = tl.zeros([BD, BR], tl.float32)
    b_scores = tl.zeros([BD, C], tl.float32)
    b_columns = tl.zeros([BD], tl.float32)
    weight, bias = norm_vectors(p_norm_weight, p_norm_bias, o_d, d)
    first = tl.program_id(2) * tiles
    for tile in range(first, first + tiles):
        o_g = tile * BG + tl.arange(0, BG)
        token, _, real = locate(
            o_g, o_j, p_start, p_span, p_owned, p_mask, launched, n, per_row, K, FORM
        )
        real = real & (o_g < count)
        o_slot = o_g.to(tl.int64) * K2
        m = real[:, None] & m_d[None, :]
        b_a = tl.load(p_a + (token * a_stride)[:, None] + o_d[None, :], mask=m, other=0.0)
        if NORM != "none":
            mean = tl.load(p_mean + o_slot + j, mask=real, other=0.0)
            rstd = tl.load(p_rstd + o_slot + j, mask=real, other=0.0)
            b_a = (b_a.to(tl.float32) - mean[:, None]) * rstd[:, None]
            b_a = tl.where(m, b_a * weight[None, :] + bias[None, :], 0.0).to(dtype)
        if R > 0:
            m = real[:, None] & (o_r < R)[None, :]
            b_b = tl.load(p_b + token[:, None] * R + o_r[None, :], mask=m, other=0.0).to(dtype)
            b_sum = tl.dot(tl.trans(b_a), b_b, b_sum, input_precision=PRECISION)
        if p_scores is not None:
            m = real[:, None] & (o_c < K)[None, :]
            p = p_scores + o_slot[:, None] + o_c[None, :]
            b_s = tl.load(p, mask=m, other=0.0).to(dtype)
            b_scores = tl.dot(tl.trans(b_a), b_s, b_scores, input_precision=PRECISION)
        if COLUMNS:
            b_columns += tl.sum(b_a.to(tl.float32), 0)
    part = (tl.program_id(2) * K + j).to(tl.int64)
    if R > 0:
        p = p_sum_b + (part * R + o_r[None, :]) * d + o_d[:, None]
        tl.store(p, b_sum, mask=m_d[:, None] & (o_r < R)[None, :])
    if p_scores is not None:
        p = p_sum_scores + (part * K + o_c[None, :]) * d + o_d[:, None]
        tl.store(p, b_scores, mask=m_d[:, None] & (o_c < K)[None, :] & (piece == 0))
    if COLUMNS:
        tl.store(p_sum_a + part * d + o_d, b_columns, mask=m_d & (piece == 0))
