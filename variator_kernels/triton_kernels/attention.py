"""grouped_attention: queries meet the keys tile by tile under a running softmax.

A program takes BM rows (attention_scores.py) of one head of keys. It first looks at 32 tiles of
keys at a time, at their biases and bounds, and makes a word of bits of those that one of its
queries may see: the loop walks over these alone, its next tile known without memory, so that its
loads stay in flight. Keys that nobody sees are not read.
"""

import triton.language as tl

from .attention_scores import (
    TILES,
    attention_jit,
    grow,
    load_keys,
    lowest_bit,
    matrix_mask,
    place_of,
    scores,
    seen_tiles,
    start_of,
)


@attention_jit
def attention_kernel(
    p_q, p_k, p_v, p_out, p_bias, p_first, p_last, p_values, p_queries, p_keys, p_pattern,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    bias_row, first_row, last_row, queries_row, keys_row, pattern_row,
    n, count, kv_heads, patterns, pattern_size, head_size, width, origin, scale,
    SHARED: tl.constexpr, HEAD: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HIDES: tl.constexpr, ALIGNED: tl.constexpr, PLACES: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(n * SHARED, BM)
    pid, begin = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BM
    b, kv = (pid // kv_heads).to(tl.int64), (pid % kv_heads).to(tl.int64)
    if p_bias is not None:
        p_bias += b * bias_row
    if p_first is not None:
        p_first += b * first_row
    if p_last is not None:
        p_last += b * last_row
    if p_values is not None:
        p_queries += b * queries_row
        p_keys += b * keys_row
    if p_pattern is not None:
        p_pattern += b * pattern_row
    o_m, o_d = begin + tl.arange(0, BM), tl.arange(0, D)
    m_m = o_m < n * SHARED
    query, head = o_m // SHARED, kv * SHARED + o_m % SHARED
    m_q = matrix_mask(m_m, o_d, HEAD, D)
    o_q = start_of(b, q_row, ALIGNED) + query.to(tl.int64) * q_token + head * q_head
    o_q = o_q[:, None] + o_d[None, :]
    b_q = tl.load(p_q + o_q, mask=m_q, other=0.0)
    p_k += start_of(b, k_row, ALIGNED) + kv * k_head
    p_v += start_of(b, v_row, ALIGNED) + kv * v_head
    base = tl.full([], 0, tl.int64)
    query_place = query
    if p_queries is not None:
        if PLACES == "whole":
            base = tl.load(p_queries + begin // SHARED).to(tl.int64)
        query_place = place_of(tl.load(p_queries + query, mask=m_m, other=0), base, PLACES)
    table_row = (head * head_size).to(tl.int32)

    top = tl.full([BM], float("-inf"), WIDE)
    total = tl.zeros([BM], WIDE)
    b_out = tl.zeros([BM, D], WIDE)
    low, high = begin // SHARED, tl.minimum((begin + BM - 1) // SHARED + 1, n)
    tiles = tl.cdiv(count, BN)
    for at in range(0, tiles, TILES if HIDES else tiles):
        bits, some = tl.full([], 0, tl.int64), tiles
        if HIDES:
            bits, some = seen_tiles(p_bias, p_first, p_last, at, count, low, high, BN)
        for i in range(some):
            tile = i
            if HIDES:
                tile = at + lowest_bit(bits)
                bits &= bits - 1
            o_n = tile * BN + tl.arange(0, BN)
            b_bias, first, last, key_place, row = load_keys(
                p_bias, p_first, p_last, p_keys, p_pattern, o_n, count, base + origin, patterns,
                pattern_size, WIDE, PLACES,
            )  # fmt: skip
            m_n = matrix_mask(b_bias != float("-inf"), o_d, HEAD, D)
            o_key = o_n.to(tl.int64)[:, None]
            b_k = tl.load(p_k + o_key * k_token + o_d[None, :], mask=m_n, other=0.0)
            b_v = tl.load(p_v + o_key * v_token + o_d[None, :], mask=m_n, other=0.0)
            b_qk = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION, out_dtype=WIDE)
            b_s = scores(
                b_qk, scale, b_bias[None, :], first[None, :], last[None, :], key_place[None, :],
                row[None, :], query[:, None], query_place[:, None], table_row[:, None],
                p_first, p_last, p_values, width, origin, PLACES,
            )  # fmt: skip
            # an infinite query times the zeros behind the last key is NaN
            b_s = tl.where((o_n < count)[None, :], b_s, float("-inf"))
            b_p, factor, top, total = grow(b_s, top, total)
            b_out = tl.dot(
                b_p.to(b_v.dtype), b_v, b_out * factor[:, None], input_precision=PRECISION,
                out_dtype=WIDE,
            )  # fmt: skip
    b_out = b_out / tl.where(total == 0.0, 1.0, total)[:, None]
    o_row = ((b * n + query) * kv_heads * SHARED + head) * HEAD
    tl.store(p_out + o_row[:, None] + o_d[None, :], b_out.to(p_out.dtype.element_ty), mask=m_q)
