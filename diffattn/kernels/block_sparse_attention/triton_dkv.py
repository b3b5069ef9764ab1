"""Triton kernel for the gradients of the keys and values of block-sparse attention."""

import triton
import triton.language as tl

from diffattn.kernels.block_sparse_attention.triton import COUNTS, hide_far, list_of, load_places, nothing
from diffattn.kernels.gqa_attention.triton import load_block


@triton.jit
def _dkv_step(
    b_dk,
    b_dv,
    b_k,
    b_v,
    b_bias,
    b_y,
    b_x,
    b_w,
    gain,
    i_b,
    i_h,
    i_n,
    p_q,
    p_do,
    p_places,
    p_base,
    p_rsum,
    p_delta,
    scale,
    N,
    H,
    L,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_qd,
    stride_db,
    stride_dn,
    stride_dh,
    stride_de,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    BN: tl.constexpr,
    CHECK: tl.constexpr,
    PLACED: tl.constexpr,
    BIASED: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One tile of queries. CHECK: not every pair attends, or the tile reaches past the last query."""
    o_n = i_n + tl.arange(0, BN)
    m_n = o_n < N
    b_q = load_block(
        p_q, i_b, i_h, i_n, N, stride_qb, stride_qn, stride_qh, stride_qd, D, BD, BN, CHECK, TMA, WIDE
    )  # [BN, BD]
    b_do = load_block(
        p_do, i_b, i_h, i_n, N, stride_db, stride_dn, stride_dh, stride_de, E, BE, BN, CHECK, TMA, WIDE
    )  # [BN, BE]
    o_stats = (i_b * H + i_h) * N + o_n
    b_delta = tl.load(p_delta + o_stats, mask=m_n, other=0.0)
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BM, BN]
    if PRODUCT:
        # Queries past the last, and their output gradients, are zeros.
        b_p = b_s
    else:
        b_s *= scale
        if BIASED:
            b_s += b_bias[:, None]
        if CHECK and PLACED:
            b_qy, b_qx, b_qw = load_places(p_places, o_n, N)
            b_s = hide_far(b_s, b_y, b_x, b_w, b_qy, b_qx, b_qw)
        # An infinite base makes the probabilities of rows past the last query 0.
        b_base = tl.load(p_base + o_stats, mask=m_n, other=float("inf"))
        b_p = tl.exp2(b_s - b_base[None, :])
        if BIASED:
            b_p *= tl.load(p_rsum + o_stats, mask=m_n, other=0.0)[None, :]
    b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
    b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
    if PRODUCT:
        b_ds = b_dp + b_delta[None, :]
    else:
        b_ds = b_p * (b_dp * gain - b_delta[None, :])
    b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION) + nothing(L)
    return b_dk, b_dv


@triton.jit(do_not_specialize=COUNTS)
def block_sparse_attention_dkv_bwd_kernel(
    p_q,
    p_k,
    p_v,
    p_do,
    p_index,
    p_full,
    p_count,
    p_q_places,
    p_k_places,
    p_bias,
    p_base,
    p_rsum,
    p_delta,
    p_gain,
    p_dk,
    p_dv,
    scale,
    N,
    M,
    H,
    G,
    L,
    n_tiles,
    n_blocks,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_qd,
    stride_kb,
    stride_km,
    stride_kh,
    stride_kd,
    stride_vb,
    stride_vm,
    stride_vh,
    stride_ve,
    stride_db,
    stride_dn,
    stride_dh,
    stride_de,
    stride_list_b,
    stride_list_h,
    stride_bias_b,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PLACED: tl.constexpr,
    BIASED: tl.constexpr,
    PRODUCT: tl.constexpr,
    GAINED: tl.constexpr,
    SHIFT: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One tile of BM keys against the blocks of queries that attend to its block of KEYS, of every head in the group.

    Tiles are transposed, [BM, BN]. The lists are those of `lists_of_queries`, each L long: head n_blocks + block.
    """
    i_tile = n_tiles - 1 - tl.program_id(0) % n_tiles
    i_bh = (tl.program_id(0) // n_tiles).to(tl.int64)
    Hkv = H // G
    i_b = i_bh // Hkv
    i_kv = i_bh % Hkv

    first = i_tile.to(tl.int64) * BM
    b_k = load_block(
        p_k, i_b, i_kv, first, M, stride_kb, stride_km, stride_kh, stride_kd, D, BD, BM, True, False, True
    )  # [BM, BD]
    b_v = load_block(
        p_v, i_b, i_kv, first, M, stride_vb, stride_vm, stride_vh, stride_ve, E, BE, BM, True, False, True
    )  # [BM, BE]
    o_m = first + tl.arange(0, BM)
    m_m = o_m < M
    gain = 1.0
    if GAINED:
        gain = tl.load(p_gain)
    b_bias = m_m.to(tl.float32)
    b_y = b_bias
    b_x = b_bias
    b_w = b_bias
    if BIASED:
        b_bias = tl.load(p_bias + i_b * stride_bias_b + o_m, mask=m_m, other=float("-inf"))
    if PLACED:
        b_y, b_x, b_w = load_places(p_k_places, o_m, M)
    scale_log2 = scale * 1.4426950408889634

    b_dk = tl.zeros([BM, BD], dtype=tl.float32)
    b_dv = tl.zeros([BM, BE], dtype=tl.float32)
    i_list, full, count = list_of(
        i_b, i_kv, i_tile // (KEYS // BM), p_full, p_count, stride_list_b, stride_list_h, False
    )
    p_index += i_list * L
    PARTS: tl.constexpr = ROWS // BN
    for i in range(0, full * PARTS):
        i_block = tl.load(p_index + i // PARTS)
        i_h = i_kv * G + i_block // n_blocks
        i_n = i_block % n_blocks * ROWS + i % PARTS * BN
        b_dk, b_dv = _dkv_step(
            b_dk, b_dv, b_k, b_v, b_bias, b_y, b_x, b_w, gain, i_b, i_h, i_n, p_q, p_do, p_q_places, p_base, p_rsum,
            p_delta, scale_log2, N, H, L,
            stride_qb, stride_qn, stride_qh, stride_qd, stride_db, stride_dn, stride_dh, stride_de,
            D, E, BD, BE, BN, False, PLACED, BIASED, PRODUCT, PRECISION, TMA, WIDE,
        )  # fmt: skip
    for i in range(full * PARTS, count * PARTS):
        i_block = tl.load(p_index + i // PARTS)
        i_h = i_kv * G + i_block // n_blocks
        i_n = i_block % n_blocks * ROWS + i % PARTS * BN
        b_dk, b_dv = _dkv_step(
            b_dk, b_dv, b_k, b_v, b_bias, b_y, b_x, b_w, gain, i_b, i_h, i_n, p_q, p_do, p_q_places, p_base, p_rsum,
            p_delta, scale_log2, N, H, L,
            stride_qb, stride_qn, stride_qh, stride_qd, stride_db, stride_dn, stride_dh, stride_de,
            D, E, BD, BE, BN, True, PLACED, BIASED, PRODUCT, PRECISION, TMA, WIDE,
        )  # fmt: skip

    unshift = tl.exp2(tl.full([1, 1], -SHIFT, dtype=tl.float32))
    b_dv *= unshift
    b_dk *= scale / gain * unshift
    if PRODUCT:
        b_dv *= scale
    o_kv = ((i_b * M + o_m) * Hkv + i_kv)[:, None]
    o_d = tl.arange(0, BD)[None, :]
    o_e = tl.arange(0, BE)[None, :]
    tl.store(p_dk + o_kv * D + o_d, b_dk.to(p_dk.dtype.element_ty), mask=m_m[:, None] & (o_d < D))
    tl.store(p_dv + o_kv * E + o_e, b_dv.to(p_dv.dtype.element_ty), mask=m_m[:, None] & (o_e < E))
