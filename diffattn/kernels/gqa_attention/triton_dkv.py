"""Triton kernel for the gradients of the keys and values."""

import triton
import triton.language as tl

from diffattn.kernels.gqa_attention.triton import load_block, masked_scores


@triton.jit
def gqa_attention_dkv_bwd_kernel(
    p_q,
    p_k,
    p_v,
    p_mask,
    p_do,
    p_base,
    p_rsum,
    p_delta,
    p_gain,
    p_dk,
    p_dv,
    scale,
    N,
    M,
    Hkv,
    G,
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
    stride_mask_b,
    stride_mask_h,
    stride_mask_n,
    stride_mask_m,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    GAINED: tl.constexpr,
    SHIFT: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One block of keys against every query of every head in the group; tiles are transposed, [BM, BN]."""
    i_blk = tl.program_id(0) % tl.cdiv(M, BM)
    i_bh = (tl.program_id(0) // tl.cdiv(M, BM)).to(tl.int64)
    i_b = i_bh // Hkv
    i_kv = i_bh % Hkv

    first = i_blk.to(tl.int64) * BM
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
    p_mask += i_b * stride_mask_b
    scale_log2 = scale * 1.4426950408889634

    b_dk = tl.zeros([BM, BD], dtype=tl.float32)
    b_dv = tl.zeros([BM, BE], dtype=tl.float32)
    blocks = tl.cdiv(N, BN)
    for i in range(0, G * blocks):
        i_h = i_kv * G + i // blocks
        i_n = i % blocks * BN
        o_n = i_n + tl.arange(0, BN)
        m_n = o_n < N
        b_q = load_block(
            p_q, i_b, i_h, i_n, N, stride_qb, stride_qn, stride_qh, stride_qd, D, BD, BN, True, TMA, WIDE
        )  # [BN, BD]
        b_do = load_block(
            p_do, i_b, i_h, i_n, N, stride_db, stride_dn, stride_dh, stride_de, E, BE, BN, True, TMA, WIDE
        )  # [BN, BE]
        o_stats = (i_b * (Hkv * G) + i_h) * N + o_n
        # An infinite base makes the probabilities of rows past the last query 0.
        b_base = tl.load(p_base + o_stats, mask=m_n, other=float("inf"))
        b_delta = tl.load(p_delta + o_stats, mask=m_n, other=0.0)
        b_x = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale_log2  # [BM, BN]
        if MASK != 0:
            p_row = p_mask
            m_edge = m_m[:, None]
            if MASK_ROWS:
                p_row = p_mask + i_h * stride_mask_h + (o_n.to(tl.int64) * stride_mask_n)[None, :]
                m_edge = m_edge & m_n[None, :]
            b_x = masked_scores(b_x, p_row, o_m[:, None], stride_mask_m, m_edge, MASK)
        b_p = tl.exp2(b_x - b_base[None, :])
        if MASK == 2:
            b_p *= tl.load(p_rsum + o_stats, mask=m_n, other=0.0)[None, :]
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        b_ds = b_p * (b_dp * gain - b_delta[None, :])
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)

    unshift = tl.exp2(tl.full([1, 1], -SHIFT, dtype=tl.float32))
    b_dv *= unshift
    b_dk *= scale / gain * unshift
    o_kv = ((i_b * M + o_m) * Hkv + i_kv)[:, None]
    o_d = tl.arange(0, BD)[None, :]
    o_e = tl.arange(0, BE)[None, :]
    tl.store(p_dk + o_kv * D + o_d, b_dk.to(p_dk.dtype.element_ty), mask=m_m[:, None] & (o_d < D))
    tl.store(p_dv + o_kv * E + o_e, b_dv.to(p_dv.dtype.element_ty), mask=m_m[:, None] & (o_e < E))
