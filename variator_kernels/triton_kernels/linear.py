"""A matrix product with the activation, and the gate, applied before its one write."""

import triton
import triton.language as tl


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """An FFN's inner activation in fp32. NaN stays NaN: maximum(x, 0) would lose it."""
    if ACTIVATION == "relu":
        x = tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        x = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-x))
    return x


@triton.jit
def load_tile(
    source, o_row, o_column, rows, columns, stride,
    BR: tl.constexpr, BC: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """A tile of a row-major matrix, zeros outside: ``source`` is a descriptor or a pointer."""
    if TMA:
        b = source.load([o_row, o_column])
    else:
        o_r = o_row + tl.arange(0, BR)
        o_c = o_column + tl.arange(0, BC)
        p = source + o_r.to(tl.int64)[:, None] * stride + o_c[None, :]
        b = tl.load(p, mask=(o_r < rows)[:, None] & (o_c < columns)[None, :], other=0.0)
    return b


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    a, w, w_gate, p_bias, p_gate_bias, out,
    rows, columns, inner, a_stride, w_stride, gate_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, TMA: tl.constexpr, PERSISTENT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``out = act(a · wᵀ + bias) [* (a · w_gateᵀ + gate_bias)]``, ``a [rows, inner]``.

    Tiles are walked in bands of GROUP row tiles, so that neighbours share operands in L2.
    """
    row_tiles, column_tiles = tl.cdiv(rows, BM), tl.cdiv(columns, BN)
    band = GROUP * column_tiles
    for tile in tl.range(
        tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=PERSISTENT
    ):
        first = tile // band * GROUP
        height = tl.minimum(row_tiles - first, GROUP)
        o_m = (first + tile % band % height) * BM
        o_n = tile % band // height * BN
        b_acc = tl.zeros([BM, BN], tl.float32)
        if GATED:
            b_gate = tl.zeros([BM, BN], tl.float32)
        for o in range(0, inner, BK):
            b_a = load_tile(a, o_m, o, rows, inner, a_stride, BM, BK, TMA)
            b_w = load_tile(w, o_n, o, columns, inner, w_stride, BN, BK, TMA)
            b_acc = tl.dot(b_a, b_w.T, b_acc, input_precision=PRECISION)
            if GATED:
                b_w = load_tile(w_gate, o_n, o, columns, inner, gate_stride, BN, BK, TMA)
                b_gate = tl.dot(b_a, b_w.T, b_gate, input_precision=PRECISION)
        o_c = o_n + tl.arange(0, BN)
        m_c = o_c < columns
        if p_bias is not None:
            b_acc += tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
        b_acc = activate(b_acc, ACTIVATION)
        if GATED:
            if p_gate_bias is not None:
                b_gate += tl.load(p_gate_bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
            b_acc *= b_gate
        if TMA:
            out.store([o_m, o_n], b_acc.to(out.dtype))
        else:
            o_r = o_m + tl.arange(0, BM)
            p = out + o_r.to(tl.int64)[:, None] * columns + o_c[None, :]
            b_out = b_acc.to(out.dtype.element_ty)
            tl.store(p, b_out, mask=(o_r < rows)[:, None] & m_c[None, :])
