"""What the attention kernels share: which keys are seen, scores with biases and terms of distances.

Rows of a tile are pairs of a query and one of the SHARED heads that read the same head of keys:
row ``r`` is query ``r // SHARED``, head ``r % SHARED`` of them. So one query alone fills rows too,
keys are read once for all of them, and their gradients add up within one program.

Positions are whole numbers (PLACES "whole": int32, counted from one of the tile's own) or fp64
("real"), where ``floor(key - query + 0.5)`` is rounded as the reference rounds it.
"""

import triton
import triton.language as tl

# What changes with every request, as in slots.py: sizes, strides of rows, and lists.
attention_jit = triton.jit(
    do_not_specialize=[
        "q_row", "k_row", "v_row", "bias_row", "first_row", "last_row", "queries_row", "keys_row",
        "pattern_row", "n", "count", "patterns", "pattern_size", "head_size", "width", "origin",
    ],
    do_not_specialize_on_alignment=[
        "p_bias", "p_first", "p_last", "p_values", "p_queries", "p_keys", "p_pattern",
        "p_top", "p_inverse", "p_delta", "p_d_bias",
    ],
)  # fmt: skip

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
FAR: tl.constexpr = tl.constexpr(2**30 - 1)
TILES: tl.constexpr = tl.constexpr(32)  # of keys, that one look finds the seen ones of


@triton.jit
def start_of(b, row, ALIGNED: tl.constexpr):
    """Where row ``b`` begins; ALIGNED: at multiples of 16, so that loads can be wide."""
    start = b * row
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    return start


@triton.jit
def matrix_mask(m_rows, o_d, HEAD: tl.constexpr, D: tl.constexpr):
    """Of rows and columns; where no column is padding, of the rows alone."""
    m = m_rows[:, None]
    if D != HEAD:
        m = m & (o_d < HEAD)[None, :]
    return m


@triton.jit
def seen_tiles(p_bias, p_first, p_last, at, count, low, high, BN: tl.constexpr):
    """Of the tiles ``at .. at + TILES - 1``: bit i is set if one of the queries ``low .. high - 1``
    may see a key of the i-th; and how many bits are set."""
    o_n = (at + tl.arange(0, TILES))[:, None] * BN + tl.arange(0, BN)[None, :]
    inside = o_n < count
    seen = inside
    if p_bias is not None:
        seen = seen & (tl.load(p_bias + o_n, mask=inside, other=0.0) != float("-inf"))
    if p_first is not None:
        seen = seen & (tl.load(p_first + o_n, mask=inside, other=0) < high)
    if p_last is not None:
        seen = seen & (tl.load(p_last + o_n, mask=inside, other=0) > low)
    some = tl.max(seen.to(tl.int32), 1)
    bits = tl.sum(some.to(tl.int64) << tl.arange(0, TILES).to(tl.int64), 0)
    return bits, tl.sum(some, 0)


@triton.jit
def lowest_bit(bits):
    """Its place: the exponent of the number that it alone makes."""
    return ((bits & -bits).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def within_32_bits(bound):
    """No tensor has more queries."""
    return tl.minimum(tl.maximum(bound, -(2**31)), 2**31 - 1).to(tl.int32)


@triton.jit
def place_of(position, base, PLACES: tl.constexpr):
    """As scores take it. Further than FAR from ``base``, a whole number is as good as FAR."""
    if PLACES == "whole":
        place = tl.minimum(tl.maximum(position.to(tl.int64) - base, -FAR), FAR).to(tl.int32)
    else:
        place = position.to(tl.float64)
    return place


@triton.jit
def load_keys(
    p_bias, p_first, p_last, p_keys, p_pattern, o_n, count, base, patterns, pattern_size,
    WIDE: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Bias, first, last, place and row of the table of keys ``o_n``; the bias is -inf of those that
    nobody sees. What was not given has some value that nobody uses."""
    m_n = o_n < count
    b_bias = tl.where(m_n, 0.0, float("-inf")).to(WIDE)
    if p_bias is not None:
        b_bias = tl.load(p_bias + o_n, mask=m_n, other=float("-inf")).to(WIDE)
    first = o_n
    last = o_n
    place = o_n
    row = o_n
    if p_first is not None:
        first = within_32_bits(tl.load(p_first + o_n, mask=m_n, other=0))
    if p_last is not None:
        last = within_32_bits(tl.load(p_last + o_n, mask=m_n, other=0))
    if p_keys is not None:
        place = place_of(tl.load(p_keys + o_n, mask=m_n, other=0), base, PLACES)
        row = tl.zeros_like(o_n)
    if p_pattern is not None:
        pattern = tl.load(p_pattern + o_n, mask=m_n, other=0)
        # Nobody checked numbers on a device: a wrong one gives NaN, and reads nothing outside.
        wrong = (pattern < 0) | (pattern >= patterns)
        b_bias = tl.where(wrong & (b_bias != float("-inf")), float("nan"), b_bias)
        row = tl.where(wrong, 0, pattern).to(tl.int32) * pattern_size
    return b_bias, first, last, place, row


@triton.jit
def scores(
    b_qk, scale, b_bias, first, last, key_place, row, query, query_place, head, p_first, p_last,
    p_values, width, origin, PLACES: tl.constexpr,
):  # fmt: skip
    """``scale · q·k + bias + term``, -inf where a query does not see a key. Of keys and queries
    one runs along the first axis, the other along the second: each comes as ``[., 1]`` or
    ``[1, .]``."""
    b_s = b_qk * scale + b_bias
    if p_values is not None:
        if PLACES == "whole":
            column = tl.minimum(tl.maximum(key_place - query_place, 0), width - 1)
        else:
            distance = tl.floor(key_place - query_place + 0.5)
            distance = tl.where(distance == distance, distance, 0.0) - origin
            column = tl.minimum(tl.maximum(distance, 0.0), (width - 1).to(tl.float64)).to(tl.int32)
        b_s += tl.load(p_values + (row + head + column))
    if p_first is not None:
        b_s = tl.where(query < first, float("-inf"), b_s)
    if p_last is not None:
        b_s = tl.where(query >= last, float("-inf"), b_s)
    return b_s


@triton.jit
def exponentials(b_s, top):
    """``exp(b_s - top)``: the difference first, so that large scores lose nothing."""
    return tl.exp2((b_s - top) * LOG2E)


@triton.jit
def grow(b_s, top, total):
    """A running softmax, one tile further: weights relative to the new top, what old sums are to
    be multiplied with, new top and total. -inf as top: nothing seen yet."""
    top_now = tl.maximum(top, tl.max(b_s, 1))
    safe = tl.where(top_now == float("-inf"), 0.0, top_now)
    b_p = exponentials(b_s, safe[:, None])
    factor = exponentials(top, safe)
    return b_p, factor, top_now, total * factor + tl.sum(b_p, 1)
