"""The norm after the residual (post-norm models): real rows of y, in place."""

import triton.language as tl

from .slots import batch_jit, locate, norm_vectors


@batch_jit()
def row_norm_kernel(
    p_y, p_norm_weight, p_norm_bias, p_start, p_span, p_owned, p_mask,
    launched, n, per_row, d, eps,
    K: tl.constexpr, BT: tl.constexpr, D2: tl.constexpr, NORM: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """A program takes BT whole rows, so y is read and written once."""
    o_slot = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o_g, o_j = (o_slot // K).to(tl.int32), (o_slot % K).to(tl.int32)
    token, _, real = locate(
        o_g, o_j, p_start, p_span, p_owned, p_mask, launched, n, per_row, K, FORM
    )
    o_d = tl.arange(0, D2)
    m = real[:, None] & (o_d < d)[None, :]
    p = p_y + (token * d)[:, None] + o_d[None, :]
    b_y = tl.load(p, mask=m, other=0.0).to(tl.float32)
    if NORM == "layer":
        b_y = tl.where(m, b_y - (tl.sum(b_y, 1) / d)[:, None], 0.0)
    b_y *= tl.rsqrt(tl.sum(b_y * b_y, 1) / d + eps)[:, None]
    weight, bias = norm_vectors(p_norm_weight, p_norm_bias, o_d, d)
    b_y = b_y * weight[None, :] + bias[None, :]
    tl.store(p, b_y.to(p_y.dtype.element_ty), mask=m)
