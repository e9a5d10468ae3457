"""adapter_decompress: the adapter on tensor cores, broadcast, b_2 and residual, one write of y."""

import triton
import triton.language as tl

from .slots import adapter_activation, batch_jit, locate


@triton.jit
def adapter_inner(
    p_u, p_projected, p_w1u, p_b1, token, real, o_g, first_group, first, count, d, w1u_stride,
    BT: tl.constexpr, BU: tl.constexpr, BD: tl.constexpr, R: tl.constexpr, BR: tl.constexpr,
    TANH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``t = φ(W_1u u + W_1h h + b_1)`` of a tile of slots, fp32, 0 without a token.

    Columns ``first .. first + BR - 1``: ``[BT, BR]``.

    W_1u u is made once for each of the (at most BU) groups of the tile, then spread to their slots.
    """
    dtype = p_u.dtype.element_ty
    o_r = first + tl.arange(0, BR)
    m_r = o_r < R
    o_u = first_group + tl.arange(0, BU)
    p_group = p_u + o_u.to(tl.int64) * d
    b_v = tl.zeros([BU, BR], tl.float32)
    for o in range(0, d, BD):
        o_d = o + tl.arange(0, BD)
        m_d = o_d < d
        m = (o_u < count)[:, None] & m_d[None, :]
        b_u = tl.load(p_group[:, None] + o_d[None, :], mask=m, other=0.0)
        p = p_w1u + o_r.to(tl.int64)[None, :] * w1u_stride + o_d[:, None]
        b_w = tl.load(p, mask=m_r[None, :] & m_d[:, None], other=0.0)
        b_v = tl.dot(b_u, b_w.to(dtype), b_v, input_precision=PRECISION)
    b_v += tl.load(p_b1 + o_r, mask=m_r, other=0.0).to(tl.float32)[None, :]
    local = tl.broadcast_to((o_g - first_group)[:, None], (BT, BR))
    b_z = tl.gather(b_v, local, 0)
    p = p_projected + token[:, None] * R + o_r[None, :]
    m = real[:, None] & m_r[None, :]
    b_z += tl.load(p, mask=m, other=0.0)
    return tl.where(m, adapter_activation(b_z, TANH), 0.0)


@batch_jit("across")
def adapter_decompress_kernel(
    p_u, p_projected, p_w1u, p_b1, p_w2, p_b2, p_residual, p_poison, p_kept,
    p_start, p_span, p_owned, p_mask, p_y,
    count, launched, n, per_row, across, d, w1u_stride, w2_stride, residual_stride,
    K: tl.constexpr, BT: tl.constexpr, BU: tl.constexpr, BD: tl.constexpr, R: tl.constexpr,
    BR: tl.constexpr, TANH: tl.constexpr, FORM: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A program writes ``across`` blocks of columns of the tokens of BT consecutive slots.

    t lies on chip, in pieces of BR columns that fit into registers while they are made.

    ``p_poison [groups, K]`` are the merge's softmax weights: NaN where a token of the group held
    NaN, which an activation between merge and decompress may have turned into a number. The tokens
    of a group with a byte in ``p_kept [groups]`` stay whole.
    """
    dtype = p_u.dtype.element_ty
    o_slot = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o_g, o_j = (o_slot // K).to(tl.int32), (o_slot % K).to(tl.int32)
    first_group = (tl.program_id(0).to(tl.int64) * BT // K).to(tl.int32)
    token, owned, real = locate(
        o_g, o_j, p_start, p_span, p_owned, p_mask, launched, n, per_row, K, FORM
    )
    adapted = real
    if p_kept is not None:
        adapted = real & (tl.load(p_kept + o_g, mask=real, other=0) == 0)
    pieces = ()
    for first in tl.static_range(0, R, BR):
        b_t = adapter_inner(
            p_u, p_projected, p_w1u, p_b1, token, adapted, o_g, first_group, first, count, d,
            w1u_stride, BT, BU, BD, R, BR, TANH, PRECISION,
        )  # fmt: skip
        pieces = pieces + (b_t.to(dtype),)  # type: ignore[assignment]  # noqa: RUF005
    p_group = p_u + o_g.to(tl.int64) * d
    poison = tl.zeros([BT], tl.float32)
    if p_poison is not None:
        poison = 0.0 * tl.load(p_poison + o_g.to(tl.int64) * K, mask=real, other=0.0)
    # Said here, STAGES pipelines all loads: u and the residual feed no product.
    begin = tl.program_id(1) * across * BD  # the compiler knows it as a multiple of BD
    for o in tl.range(begin, tl.minimum(begin + across * BD, d), BD, num_stages=STAGES):
        o_d = o + tl.arange(0, BD)
        m_d = o_d < d
        b_o = tl.zeros([BT, BD], tl.float32)
        for first in tl.static_range(0, R, BR):
            o_r = first + tl.arange(0, BR)
            p = p_w2 + o_d.to(tl.int64)[None, :] * w2_stride + o_r[:, None]
            b_w = tl.load(p, mask=(o_r < R)[:, None] & m_d[None, :], other=0.0)
            b_o = tl.dot(pieces[first // BR], b_w.to(dtype), b_o, input_precision=PRECISION)
        m = real[:, None] & m_d[None, :]
        b_u = tl.load(p_group[:, None] + o_d[None, :], mask=m, other=0.0).to(tl.float32)
        b_2 = tl.load(p_b2 + o_d, mask=m_d, other=0.0).to(tl.float32)
        if p_kept is not None:
            b_o = tl.where(adapted[:, None], b_o + b_2[None, :], 0.0) + b_u
        else:
            b_o = b_o + b_u + b_2[None, :]
        b_o = tl.where(m, b_o + poison[:, None], 0.0)
        m = owned[:, None] & m_d[None, :]
        if p_residual is not None:
            p = p_residual + (token * residual_stride)[:, None] + o_d[None, :]
            b_o += tl.load(p, mask=m, other=0.0).to(tl.float32)
        tl.store(p_y + (token * d)[:, None] + o_d[None, :], b_o.to(p_y.dtype.element_ty), mask=m)
