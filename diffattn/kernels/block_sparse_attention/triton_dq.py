"""Triton kernel for the gradient of the queries of block-sparse attention."""

import triton
import triton.language as tl

from diffattn.kernels.block_sparse_attention.triton import COUNTS, hide_far, list_of, load_places, nothing
from diffattn.kernels.gqa_attention.triton import load_block


@triton.jit
def _dq_step(
    b_dq,
    b_q,
    b_do,
    b_base,
    b_rsum,
    b_delta,
    b_y,
    b_x,
    b_w,
    gain,
    i_b,
    i_kv,
    i_m,
    p_k,
    p_v,
    p_places,
    p_bias,
    scale,
    M,
    K,
    stride_kb,
    stride_km,
    stride_kh,
    stride_kd,
    stride_vb,
    stride_vm,
    stride_vh,
    stride_ve,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    BM: tl.constexpr,
    CHECK: tl.constexpr,
    PLACED: tl.constexpr,
    BIASED: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One tile of keys. CHECK: not every pair attends, or the tile reaches past the last key."""
    o_m = i_m + tl.arange(0, BM)
    b_k = load_block(
        p_k, i_b, i_kv, i_m, M, stride_kb, stride_km, stride_kh, stride_kd, D, BD, BM, CHECK, TMA, WIDE
    )  # [BM, BD]
    b_v = load_block(
        p_v, i_b, i_kv, i_m, M, stride_vb, stride_vm, stride_vh, stride_ve, E, BE, BM, CHECK, TMA, WIDE
    )  # [BM, BE]
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)  # [BN, BM]
    if PRODUCT:
        # Keys past the last are zeros: their gradients are multiplied by them.
        b_ds = b_dp + b_delta[:, None]
    else:
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
        if CHECK:
            if BIASED:
                b_s += tl.load(p_bias + o_m, mask=o_m < M, other=float("-inf"))[None, :]
            if PLACED:
                b_ky, b_kx, b_kw = load_places(p_places, o_m, M)
                b_s = hide_far(b_s, b_y, b_x, b_w, b_ky, b_kx, b_kw)
            b_s = tl.where((o_m < M)[None, :], b_s, float("-inf"))
        b_p = tl.exp2(b_s - b_base[:, None])
        if BIASED:
            b_p *= b_rsum[:, None]
        b_ds = b_p * (b_dp * gain - b_delta[:, None])
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION) + nothing(K)


@triton.jit(do_not_specialize=COUNTS)
def block_sparse_attention_dq_bwd_kernel(
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
    p_dq,
    scale,
    N,
    M,
    H,
    G,
    K,
    n_tiles,
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
    """One tile of BN queries of one head against the blocks that its block of ROWS queries lists.

    scale is the plain one. PRODUCT: delta is the gradient of a row's sum.
    """
    i_tile = n_tiles - 1 - tl.program_id(0) % n_tiles
    i_bh = (tl.program_id(0) // n_tiles).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    i_kv = i_h // G

    o_n = i_tile.to(tl.int64) * BN + tl.arange(0, BN)
    m_n = o_n < N
    o_d = tl.arange(0, BD)
    o_e = tl.arange(0, BE)
    m_q = m_n[:, None] & (o_d < D)[None, :]
    b_q = tl.load(
        p_q + i_b * stride_qb + i_h * stride_qh + (o_n * stride_qn)[:, None] + o_d[None, :].to(tl.int64) * stride_qd,
        mask=m_q,
        other=0.0,
    )  # [BN, BD]
    b_do = tl.load(
        p_do + i_b * stride_db + i_h * stride_dh + (o_n * stride_dn)[:, None] + o_e[None, :].to(tl.int64) * stride_de,
        mask=m_n[:, None] & (o_e < E)[None, :],
        other=0.0,
    )  # [BN, BE]
    o_stats = i_bh * N + o_n
    b_delta = tl.load(p_delta + o_stats, mask=m_n, other=0.0)
    b_base = b_delta
    b_rsum = b_delta
    if not PRODUCT:
        b_base = tl.load(p_base + o_stats, mask=m_n, other=float("inf"))
    if BIASED:
        b_rsum = tl.load(p_rsum + o_stats, mask=m_n, other=0.0)
    gain = 1.0
    if GAINED:
        gain = tl.load(p_gain)
    b_y = b_delta
    b_x = b_delta
    b_w = b_delta
    if PLACED:
        b_y, b_x, b_w = load_places(p_q_places, o_n, N)
    p_bias += i_b * stride_bias_b
    scale_log2 = scale * 1.4426950408889634

    b_dq = tl.zeros([BN, BD], dtype=tl.float32)
    i_list, full, count = list_of(
        i_b, i_h, i_tile // (ROWS // BN), p_full, p_count, stride_list_b, stride_list_h, BIASED
    )
    p_index += i_list * K
    PARTS: tl.constexpr = KEYS // BM
    for i in range(0, full * PARTS):
        i_m = tl.load(p_index + i // PARTS) * KEYS + i % PARTS * BM
        b_dq = _dq_step(
            b_dq, b_q, b_do, b_base, b_rsum, b_delta, b_y, b_x, b_w, gain, i_b, i_kv, i_m, p_k, p_v, p_k_places,
            p_bias, scale_log2, M, K,
            stride_kb, stride_km, stride_kh, stride_kd, stride_vb, stride_vm, stride_vh, stride_ve,
            D, E, BD, BE, BM, False, PLACED, BIASED, PRODUCT, PRECISION, TMA, WIDE,
        )  # fmt: skip
    for i in range(full * PARTS, count * PARTS):
        i_m = tl.load(p_index + i // PARTS) * KEYS + i % PARTS * BM
        b_dq = _dq_step(
            b_dq, b_q, b_do, b_base, b_rsum, b_delta, b_y, b_x, b_w, gain, i_b, i_kv, i_m, p_k, p_v, p_k_places,
            p_bias, scale_log2, M, K,
            stride_kb, stride_km, stride_kh, stride_kd, stride_vb, stride_vm, stride_vh, stride_ve,
            D, E, BD, BE, BM, True, PLACED, BIASED, PRODUCT, PRECISION, TMA, WIDE,
        )  # fmt: skip
    b_dq *= scale / (gain * tl.exp2(tl.full([1, 1], SHIFT, dtype=tl.float32)))
    o_out = ((i_b * N + o_n) * H + i_h)[:, None] * D + o_d[None, :]
    tl.store(p_dq + o_out, b_dq.to(p_dq.dtype.element_ty), mask=m_q)
