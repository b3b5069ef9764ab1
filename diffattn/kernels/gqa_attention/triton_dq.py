"""Triton kernels for the gradient of the queries: what every row of queries needs, then dq."""

import triton
import triton.language as tl

from diffattn.kernels.gqa_attention.triton import load_block, masked_scores


@triton.jit
def gqa_attention_rows_bwd_kernel(
    p_o,
    p_residual,
    p_do,
    p_top,
    p_rsum,
    p_gain,
    p_base,
    p_delta,
    N,
    H,
    stride_db,
    stride_dn,
    stride_dh,
    stride_de,
    E: tl.constexpr,
    BE: tl.constexpr,
    BN: tl.constexpr,
    ADDITIVE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GAINED: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """delta = gain * sum_e o do, and what to subtract from a row's scores before exp2."""
    i_n = tl.program_id(0) % tl.cdiv(N, BN)
    i_bh = (tl.program_id(0) // tl.cdiv(N, BN)).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    o_n = i_n.to(tl.int64) * BN + tl.arange(0, BN)
    o_e = tl.arange(0, BE)
    m_n = o_n < N
    m_out = m_n[:, None] & (o_e < E)[None, :]
    o_out = ((i_b * N + o_n) * H + i_h)[:, None] * E + o_e[None, :]
    b_o = tl.load(p_o + o_out, mask=m_out, other=0.0).to(tl.float32)
    if RESIDUAL:
        b_o += tl.load(p_residual + o_out, mask=m_out, other=0.0).to(tl.float32)
    b_do = tl.load(
        p_do + i_b * stride_db + i_h * stride_dh + o_n[:, None] * stride_dn + o_e[None, :] * stride_de,
        mask=m_out,
        other=0.0,
    ).to(tl.float32)
    b_delta = tl.sum(b_o * b_do, 1)
    if GAINED:
        b_delta *= tl.load(p_gain)
    b_base = tl.load(p_top + i_bh * N + o_n, mask=m_n, other=0.0)
    if not ADDITIVE:
        # log2 of 0, a row with every key masked, makes its base infinite and its probabilities 0.
        b_base -= tl.log2(tl.load(p_rsum + i_bh * N + o_n, mask=m_n, other=1.0))
    tl.store(p_base + i_bh * N + o_n, b_base - SHIFT, mask=m_n)
    tl.store(p_delta + i_bh * N + o_n, b_delta, mask=m_n)


@triton.jit
def _dq_step(
    b_dq,
    b_q,
    b_do,
    b_base,
    b_rsum,
    b_delta,
    gain,
    i_b,
    i_kv,
    i_m,
    p_k,
    p_v,
    p_mask,
    m_r,
    scale,
    M,
    stride_kb,
    stride_km,
    stride_kh,
    stride_kd,
    stride_vb,
    stride_vm,
    stride_vh,
    stride_ve,
    stride_mask_m,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    BM: tl.constexpr,
    MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One block of keys. TAIL: the block reaches past the last key."""
    o_m = i_m + tl.arange(0, BM)
    b_k = load_block(
        p_k, i_b, i_kv, i_m, M, stride_kb, stride_km, stride_kh, stride_kd, D, BD, BM, TAIL, TMA, WIDE
    )  # [BM, BD]
    b_v = load_block(
        p_v, i_b, i_kv, i_m, M, stride_vb, stride_vm, stride_vh, stride_ve, E, BE, BM, TAIL, TMA, WIDE
    )  # [BM, BE]
    b_x = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale  # [BN, BM]
    if MASK != 0:
        m_edge = (o_m < M)[None, :]
        if MASK_ROWS:
            m_edge = m_edge & m_r[:, None]
        b_x = masked_scores(b_x, p_mask, o_m[None, :], stride_mask_m, m_edge, MASK)
    if TAIL:
        b_x = tl.where((o_m < M)[None, :], b_x, float("-inf"))
    b_p = tl.exp2(b_x - b_base[:, None])
    if MASK == 2:
        b_p *= b_rsum[:, None]
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
    b_ds = b_p * (b_dp * gain - b_delta[:, None])
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)


@triton.jit
def gqa_attention_dq_bwd_kernel(
    p_q,
    p_k,
    p_v,
    p_mask,
    p_do,
    p_base,
    p_rsum,
    p_delta,
    p_gain,
    p_dq,
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
    """One tile of packed query rows against every key. scale is the plain one."""
    i_row = tl.program_id(0) % tl.cdiv(G * N, BN)
    i_bh = (tl.program_id(0) // tl.cdiv(G * N, BN)).to(tl.int64)
    i_b = i_bh // Hkv
    i_kv = i_bh % Hkv

    o_r = i_row * BN + tl.arange(0, BN)
    m_r = o_r < G * N
    o_h = i_kv * G + o_r // N
    o_n = (o_r % N).to(tl.int64)
    o_d = tl.arange(0, BD)
    o_e = tl.arange(0, BE)
    m_q = m_r[:, None] & (o_d < D)[None, :]
    b_q = tl.load(
        p_q + i_b * stride_qb + (o_h * stride_qh + o_n * stride_qn)[:, None] + o_d[None, :] * stride_qd,
        mask=m_q,
        other=0.0,
    )  # [BN, BD]
    b_do = tl.load(
        p_do + i_b * stride_db + (o_h * stride_dh + o_n * stride_dn)[:, None] + o_e[None, :] * stride_de,
        mask=m_r[:, None] & (o_e < E)[None, :],
        other=0.0,
    )  # [BN, BE]
    o_stats = i_bh * (G * N) + o_r
    b_base = tl.load(p_base + o_stats, mask=m_r, other=float("inf"))
    b_delta = tl.load(p_delta + o_stats, mask=m_r, other=0.0)
    b_rsum = b_base
    if MASK == 2:
        b_rsum = tl.load(p_rsum + o_stats, mask=m_r, other=0.0)
    gain = 1.0
    if GAINED:
        gain = tl.load(p_gain)

    p_mask += i_b * stride_mask_b
    if MASK_ROWS:
        p_mask = p_mask + (o_h * stride_mask_h + o_n * stride_mask_n)[:, None]
    scale_log2 = scale * 1.4426950408889634
    b_dq = tl.zeros([BN, BD], dtype=tl.float32)
    M_full = M // BM * BM
    for i_m in range(0, M_full, BM):
        b_dq = _dq_step(
            b_dq, b_q, b_do, b_base, b_rsum, b_delta, gain, i_b, i_kv, i_m, p_k, p_v, p_mask, m_r, scale_log2, M,
            stride_kb, stride_km, stride_kh, stride_kd, stride_vb, stride_vm, stride_vh, stride_ve, stride_mask_m,
            D, E, BD, BE, BM, MASK, MASK_ROWS, False, PRECISION, TMA, WIDE,
        )  # fmt: skip
    # A loop of one turn, not an `if`, as in the forward kernel.
    for i_m in tl.range(M_full, M, BM, num_stages=1):
        b_dq = _dq_step(
            b_dq, b_q, b_do, b_base, b_rsum, b_delta, gain, i_b, i_kv, i_m, p_k, p_v, p_mask, m_r, scale_log2, M,
            stride_kb, stride_km, stride_kh, stride_kd, stride_vb, stride_vm, stride_vh, stride_ve, stride_mask_m,
            D, E, BD, BE, BM, MASK, MASK_ROWS, True, PRECISION, TMA, WIDE,
        )  # fmt: skip
    b_dq *= scale / (gain * tl.exp2(tl.full([1, 1], SHIFT, dtype=tl.float32)))
    o_out = ((i_b * N + o_n) * (Hkv * G) + o_h)[:, None] * D + o_d[None, :]
    tl.store(p_dq + o_out, b_dq.to(p_dq.dtype.element_ty), mask=m_q)
