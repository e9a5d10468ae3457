"""Gradients of grouped_attention, without atomics: of queries, then of keys, values and biases.

Nothing is saved in the forward pass. The kernel over queries first walks over the keys for each
row's softmax, its top and total (a logarithm of the total plus the top would lose the bits of large
scores), and for ``Σ p dp`` (``dO·O`` of a rounded O would not cancel where one weight is nearly 1),
then again for dQ. It leaves these to the kernel over keys, whose tile of keys stays while all rows
of all its queries' heads pass by.
"""

import triton.language as tl

from .attention_scores import (
    TILES,
    attention_jit,
    exponentials,
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
def query_gradient_kernel(
    p_q, p_k, p_v, p_d_out, p_dq, p_top, p_inverse, p_delta,
    p_bias, p_first, p_last, p_values, p_queries, p_keys, p_pattern,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    bias_row, first_row, last_row, queries_row, keys_row, pattern_row,
    n, count, kv_heads, patterns, pattern_size, head_size, width, origin, scale,
    SHARED: tl.constexpr, HEAD: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HIDES: tl.constexpr, ALIGNED: tl.constexpr, PLACES: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``d_out`` and ``dq`` are contiguous; ``top``, ``inverse`` and ``delta`` have a row's
    number each, ``[B, H_kv, n * SHARED]``."""
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
    o_out = (((b * n + query) * kv_heads * SHARED + head) * HEAD)[:, None] + o_d[None, :]
    b_do = tl.load(p_d_out + o_out, mask=m_q, other=0.0)
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
    delta = tl.zeros([BM], WIDE)
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
            b_s = scores(
                tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION, out_dtype=WIDE), scale,
                b_bias[None, :], first[None, :], last[None, :], key_place[None, :],
                row[None, :], query[:, None], query_place[:, None], table_row[:, None],
                p_first, p_last, p_values, width, origin, PLACES,
            )  # fmt: skip
            # an infinite query times the zeros behind the last key is NaN
            b_s = tl.where((o_n < count)[None, :], b_s, float("-inf"))
            b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION, out_dtype=WIDE)
            b_p, factor, top, total = grow(b_s, top, total)
            delta = delta * factor + tl.sum(b_p * b_dp, 1)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.where(total == 0.0, 1.0, total)  # of no key: all exponentials are 0
    inverse, delta = 1.0 / total, delta / total
    o_row = pid.to(tl.int64) * n * SHARED + o_m
    tl.store(p_top + o_row, top, mask=m_m)
    tl.store(p_inverse + o_row, inverse, mask=m_m)
    tl.store(p_delta + o_row, delta, mask=m_m)

    b_dq = tl.zeros([BM, D], WIDE)
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
            b_s = scores(
                tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION, out_dtype=WIDE), scale,
                b_bias[None, :], first[None, :], last[None, :], key_place[None, :],
                row[None, :], query[:, None], query_place[:, None], table_row[:, None],
                p_first, p_last, p_values, width, origin, PLACES,
            )  # fmt: skip
            # an infinite query times the zeros behind the last key is NaN
            b_s = tl.where((o_n < count)[None, :], b_s, float("-inf"))
            b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION, out_dtype=WIDE)
            b_p = exponentials(b_s, top[:, None]) * inverse[:, None]
            b_ds = (b_p * (b_dp - delta[:, None])).to(b_k.dtype)
            b_dq = tl.dot(b_ds, b_k, b_dq, input_precision=PRECISION, out_dtype=WIDE)
    tl.store(p_dq + o_out, (b_dq * scale).to(p_dq.dtype.element_ty), mask=m_q)


@attention_jit
def key_gradient_kernel(
    p_q, p_k, p_v, p_d_out, p_top, p_inverse, p_delta, p_dk, p_dv, p_d_bias,
    p_bias, p_first, p_last, p_values, p_queries, p_keys, p_pattern,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    bias_row, first_row, last_row, queries_row, keys_row, pattern_row,
    n, count, kv_heads, patterns, pattern_size, head_size, width, origin, scale,
    SHARED: tl.constexpr, HEAD: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HIDES: tl.constexpr, ALIGNED: tl.constexpr, PLACES: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``dk`` and ``dv`` are contiguous; ``d_bias`` is a part ``[B, H_kv, G]`` of each head of keys.
    Keys lie along the first axis of all tiles, so that no tile is turned before a product."""
    blocks = tl.cdiv(count, BN)
    pid, begin = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BN
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
    o_n, o_d = begin + tl.arange(0, BN), tl.arange(0, D)
    base = tl.full([], 0, tl.int64)
    if PLACES == "whole":
        base = tl.load(p_keys + begin).to(tl.int64)
    b_bias, first, last, key_place, row = load_keys(
        p_bias, p_first, p_last, p_keys, p_pattern, o_n, count, base + origin, patterns,
        pattern_size, WIDE, PLACES,
    )  # fmt: skip
    seen = b_bias != float("-inf")
    m_n = matrix_mask(seen, o_d, HEAD, D)
    o_key = o_n.to(tl.int64)[:, None]
    p_k += start_of(b, k_row, ALIGNED) + kv * k_head
    p_v += start_of(b, v_row, ALIGNED) + kv * v_head
    b_k = tl.load(p_k + o_key * k_token + o_d[None, :], mask=m_n, other=0.0)
    b_v = tl.load(p_v + o_key * v_token + o_d[None, :], mask=m_n, other=0.0)
    # The queries that may see one of the keys.
    low, high = 0, n
    if HIDES:
        high = tl.max(tl.where(seen, n, 0), 0)
        if p_first is not None:
            low = tl.maximum(tl.min(tl.where(seen, first, n), 0), 0)
        if p_last is not None:
            high = tl.minimum(tl.max(tl.where(seen, last, 0), 0), n)
    p_q += start_of(b, q_row, ALIGNED)
    p_d_out += b * n * kv_heads * SHARED * HEAD
    o_rows = pid.to(tl.int64) * n * SHARED

    b_dk = tl.zeros([BN, D], WIDE)
    b_dv = tl.zeros([BN, D], WIDE)
    d_bias = tl.zeros([BN], WIDE)
    for at in range(low * SHARED // BM * BM, high * SHARED, BM):
        o_m = at + tl.arange(0, BM)
        m_m = o_m < n * SHARED
        query, head = o_m // SHARED, kv * SHARED + o_m % SHARED
        m_q = matrix_mask(m_m, o_d, HEAD, D)
        o_q = (query.to(tl.int64) * q_token + head * q_head)[:, None] + o_d[None, :]
        b_q = tl.load(p_q + o_q, mask=m_q, other=0.0)
        o_do = ((query.to(tl.int64) * kv_heads * SHARED + head) * HEAD)[:, None] + o_d[None, :]
        b_do = tl.load(p_d_out + o_do, mask=m_q, other=0.0)
        query_place = query
        if p_queries is not None:
            query_place = place_of(tl.load(p_queries + query, mask=m_m, other=0), base, PLACES)
        b_s = scores(
            tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION, out_dtype=WIDE), scale,
            b_bias[:, None], first[:, None], last[:, None], key_place[:, None], row[:, None],
            query[None, :], query_place[None, :], (head * head_size).to(tl.int32)[None, :],
            p_first, p_last, p_values, width, origin, PLACES,
        )  # fmt: skip
        # Rows behind the last one: infinitely far below the top, so without weight.
        top = tl.load(p_top + o_rows + o_m, mask=m_m, other=float("inf"))
        inverse = tl.load(p_inverse + o_rows + o_m, mask=m_m, other=0.0)
        delta = tl.load(p_delta + o_rows + o_m, mask=m_m, other=0.0)
        b_p = exponentials(b_s, top[None, :]) * inverse[None, :]
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION, out_dtype=WIDE)
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION, out_dtype=WIDE)
        b_ds = b_p * (b_dp - delta[None, :])
        if p_d_bias is not None:
            d_bias += tl.sum(b_ds, 1)
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION, out_dtype=WIDE)
    inside = matrix_mask(o_n < count, o_d, HEAD, D)
    o_out = (((b * count + o_n) * kv_heads + kv) * HEAD)[:, None] + o_d[None, :]
    tl.store(p_dk + o_out, (b_dk * scale).to(p_dk.dtype.element_ty), mask=inside)
    tl.store(p_dv + o_out, b_dv.to(p_dv.dtype.element_ty), mask=inside)
    if p_d_bias is not None:
        tl.store(p_d_bias + pid.to(tl.int64) * count + o_n, d_bias, mask=o_n < count)
