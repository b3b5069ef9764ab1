"""Triton kernels for grouped-query attention, backward: rows' sums, then dq, then dk and dv, each its own kernel.

dk and dv of one key block are summed over all query heads of its group inside one program, so no atomics.
"""

import torch
import triton
import triton.language as tl

from diffattn.kernels.gqa_attention.triton import (
    ADDITIVE_MASK,
    block,
    block_loads,
    dot_precision,
    load_block,
    mask_has_rows,
    mask_kind,
    mask_strides,
    masked_scores,
    prob_shift,
)


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
    if M_full < M:
        b_dq = _dq_step(
            b_dq, b_q, b_do, b_base, b_rsum, b_delta, gain, i_b, i_kv, M_full, p_k, p_v, p_mask, m_r, scale_log2, M,
            stride_kb, stride_km, stride_kh, stride_kd, stride_vb, stride_vm, stride_vh, stride_ve, stride_mask_m,
            D, E, BD, BE, BM, MASK, MASK_ROWS, True, PRECISION, TMA, WIDE,
        )  # fmt: skip
    b_dq *= scale / (gain * tl.exp2(tl.full([1, 1], SHIFT, dtype=tl.float32)))
    o_out = ((i_b * N + o_n) * (Hkv * G) + o_h)[:, None] * D + o_d[None, :]
    tl.store(p_dq + o_out, b_dq.to(p_dq.dtype.element_ty), mask=m_q)


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


# Of dq and of dk and dv: (rows, keys, warps, stages), by whether elements take 4 bytes and by padded head dim.
_CONFIGS = {
    (False, 16): ((128, 64, 4, 3), (64, 128, 4, 3)),
    (False, 32): ((128, 64, 4, 3), (64, 128, 4, 3)),
    (False, 64): ((128, 64, 8, 3), (64, 128, 8, 3)),
    (False, 128): ((128, 64, 8, 2), (64, 128, 8, 2)),
    (False, 256): ((64, 32, 8, 1), (32, 64, 8, 1)),
    (True, 16): ((64, 64, 4, 2), (64, 64, 4, 2)),
    (True, 32): ((64, 64, 4, 2), (64, 64, 4, 2)),
    (True, 64): ((64, 32, 4, 2), (32, 64, 4, 2)),
    (True, 128): ((32, 32, 4, 1), (32, 32, 4, 1)),
    (True, 256): ((16, 16, 4, 1), (16, 16, 4, 1)),
}


def _configs(dtype, width, mask_has_rows):
    dq, dkv = _CONFIGS[(dtype.itemsize == 4, width)]
    if not mask_has_rows:
        return dq, dkv
    # A mask tile takes registers and shared memory of its own: halve the block that the loop runs over.
    return (dq[0], max(16, dq[1] // 2), dq[2], 2), (max(16, dkv[0] // 2), dkv[1], dkv[2], 2)


def _gain(grad, v):
    """A power of two, on the device, that keeps float16 dS inside float16: |dS| <= 2 max|dO| max|V| E."""
    bound = torch.linalg.vector_norm(grad, float("inf")).float() * torch.linalg.vector_norm(v, float("inf")).float()
    return torch.exp2(torch.floor(-torch.log2((bound * (2 * v.shape[-1])).clamp_min(1e-30))))


def gqa_attention_bwd(grad, q, k, v, mask, out, stats, residual, scale, configs=None):
    """Launch the backward kernels: dq, dk and dv, contiguous, in the dtype of q.

    Args: as the operator `diffattn::gqa_attention_backward`. configs: (rows, keys, warps, stages) of dq and of
        dk and dv.
    """
    B, N, H, D = q.shape
    M, Hkv, E = v.shape[1:]
    dq, dk, dv = q.new_empty(B, N, H, D), q.new_empty(B, M, Hkv, D), q.new_empty(B, M, Hkv, E)
    if out.numel() == 0 or v.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    BD, BE = block(D), block(E)
    dq_config, dkv_config = configs or _configs(q.dtype, max(BD, BE), mask_has_rows(mask))
    gained = q.dtype == torch.float16
    additive = mask_kind(mask) == ADDITIVE_MASK
    base, delta = q.new_empty((2, B, H, N), dtype=torch.float32)
    p_mask = q if mask is None else mask
    sizes = (scale, N, M, Hkv, H // Hkv)
    strides = (*q.stride(), *k.stride(), *v.stride(), *grad.stride(), *mask_strides(mask))
    constants = {
        "D": D,
        "E": E,
        "BD": BD,
        "BE": BE,
        "MASK": mask_kind(mask),
        "MASK_ROWS": mask_has_rows(mask),
        "GAINED": gained,
        "SHIFT": prob_shift(q.dtype),
        "PRECISION": dot_precision(q.dtype),
    }
    with torch.cuda.device_of(q):
        gain = _gain(grad, v) if gained else stats
        gqa_attention_rows_bwd_kernel[(triton.cdiv(N, 64) * B * H,)](
            out,
            residual,
            grad,
            stats[0],
            stats[1],
            gain,
            base,
            delta,
            N,
            H,
            *grad.stride(),
            E=E,
            BE=BE,
            BN=64,
            ADDITIVE=additive,
            RESIDUAL=residual.numel() > 0,
            GAINED=gained,
            SHIFT=prob_shift(q.dtype),
        )
        rest = (base, stats[1], delta, gain)
        rows, keys, warps, stages = dq_config
        (k_arg, v_arg), loads = block_loads((k, keys, BD), (v, keys, BE))
        gqa_attention_dq_bwd_kernel[(triton.cdiv(H // Hkv * N, rows) * B * Hkv,)](
            q,
            k_arg,
            v_arg,
            p_mask,
            grad,
            *rest,
            dq,
            *sizes,
            *strides,
            **constants,
            **loads,
            BN=rows,
            BM=keys,
            num_warps=warps,
            num_stages=stages,
        )
        rows, keys, warps, stages = dkv_config
        (q_arg, grad_arg), loads = block_loads((q, rows, BD), (grad, rows, BE))
        gqa_attention_dkv_bwd_kernel[(triton.cdiv(M, keys) * B * Hkv,)](
            q_arg,
            k,
            v,
            p_mask,
            grad_arg,
            *rest,
            dk,
            dv,
            *sizes,
            *strides,
            **constants,
            **loads,
            BN=rows,
            BM=keys,
            num_warps=warps,
            num_stages=stages,
        )
    return dq, dk, dv
