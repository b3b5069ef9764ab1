"""Backward kernels. With d_n the denominator, g_n the gradient of o_n and t_n = S g_n:

dS = sum_n (q_n / d_n) g_n^T          q, k: mapped and rotated; u, w: mapped, not rotated
dz = sum_n dd_n u_n                   dd_n = -(q_n . t_n) / d_n^2  (o is not needed: g_n . o_n = q_n . t_n / d_n)
du_n = unrotate(t_n) / d_n + dd_n z
dw_m = unrotate(dS v_m) + dz,  dv_m = dS^T k_m

For "softmax" d_n = 1 and dz is replaced by the correction c of the softmax over tokens:
dk_m = w_m (unrotate(dS v_m) - c), c = sum_m w_m unrotate(dS v_m), which without rotation is the row sum of S dS.

Bytes: the queries' kernel reads q and g and writes dq, the keys' reads k and v and writes dk and dv: 7 B H N D
elements for D = E. Wide heads leave no registers to do two things at once: there dq and dS, dk and dv are kernels
apart, which read q, g and k again, 10 in all.
"""

import triton
import triton.language as tl

from diffattn.kernels.linear_attention.triton_tiles import (
    COUNTS,
    dot_state,
    dot_tokens,
    feature_offsets,
    load_rotary,
    load_tile,
    map_elements,
    map_gradient,
    map_query,
    nothing,
    program_part,
    rotate,
    split,
    state_offsets,
    store_tile,
    tile_start,
    token_offsets,
)


@triton.jit(do_not_specialize=[*COUNTS, "group"])
def linear_attention_dq_bwd_kernel(
    p_grad,
    p_q,
    p_cos,
    p_sin,
    p_state,
    p_dq,
    p_dnormalizer,
    p_dstate,
    stride_gb,
    stride_gn,
    stride_gh,
    stride_ge,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_qd,
    stride_cb,
    stride_cn,
    stride_cd,
    N,
    n_heads,
    n_chunks,
    chunk,
    group,
    eps,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    BN: tl.constexpr,
    MAP: tl.constexpr,
    ROTARY: tl.constexpr,
    ALIGN: tl.constexpr,
    PARTS: tl.constexpr,
    DQ: tl.constexpr,
    DSTATE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """What `chunk` blocks of queries of one head give: DQ, their dq and their part of dz; DSTATE, columns
    program_id(1) BE on of their part of dS. Parts go to (b, h, i_chunk). With both, BE holds all of E."""
    i_b, i_h, i_chunk, first, last = program_part(n_heads, n_chunks, chunk, tl.cdiv(N, BN), 1)
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    o_e = tl.arange(0, BE)
    m_d = (o_d < D)[None, :]
    i_part = (i_b * n_heads + i_h).to(tl.int64) * n_chunks + i_chunk
    p_state += ((i_b * n_heads + i_h) // group).to(tl.int64) * (D * E + D)
    r_q = token_offsets(o_n, stride_qn, ALIGN)[:, None] + feature_offsets(o_d, 0, stride_qd, D, 1, ALIGN)[None, :]
    r_gn = token_offsets(o_n, stride_gn, ALIGN)[:, None]
    r_dq = o_n.to(tl.int64)[:, None] * (n_heads * D) + o_d[None, :]
    if MAP != "softmax":
        normalizer = tl.load(p_state + D * E + o_d, mask=o_d < D, other=0.0)
    if DQ:
        r_state, m_state = state_offsets(o_d, o_e, 0, D, E, 1)
        high, low = split(tl.trans(tl.load(p_state + r_state, mask=m_state, other=0.0)), PARTS)
        dnormalizer = tl.zeros((BN, BD), tl.float32)
    o_se = tl.program_id(1) * BE + o_e
    if DSTATE:
        dstate = tl.zeros((BD, BE), tl.float32)
    # tl.range also prefetches q, which goes into no product; range would not
    whole = tl.maximum(tl.minimum(last, N // BN), first)
    for EDGE in tl.static_range(2):
        for i_block in tl.range(whole if EDGE else first, last if EDGE else whole, num_stages=1 if EDGE else STAGES):
            start = i_block * BN
            m_n = (o_n < N - start)[:, None]
            b_pq = tile_start(p_q, i_b, i_h, start, stride_qb, stride_qh, stride_qn, ALIGN)
            b_pg = tile_start(p_grad, i_b, i_h, start, stride_gb, stride_gh, stride_gn, ALIGN)
            b_q = load_tile(b_pq, r_q, m_d, m_n, D != BD, EDGE, 0.0)
            mapped = map_query(b_q, m_d, MAP, D != BD)  # [BN, BD]
            if ROTARY:
                cos = load_rotary(p_cos, o_n, start, N - start, i_b, stride_cb, stride_cn, stride_cd, D, BD, ROTARY)
                sin = load_rotary(p_sin, o_n, start, N - start, i_b, stride_cb, stride_cn, stride_cd, D, BD, ROTARY)
            if MAP != "softmax":
                inverse = 1.0 / (tl.sum(mapped * normalizer[None, :], 1) + eps)
                if EDGE:
                    # rows past the end would be 0 / 0 with eps = 0
                    inverse = tl.where(o_n < N - start, inverse, 0.0)
            if DQ and BE < E:
                t = tl.zeros((BN, BD), tl.float32)
                for i_e in range(tl.cdiv(E, BE)):
                    r_state, m_state = state_offsets(o_d, i_e * BE + o_e, 0, D, E, 1)
                    b_s = tl.load(p_state + r_state, mask=m_state, other=0.0)
                    high, low = split(tl.trans(b_s), PARTS)
                    r_g = r_gn + feature_offsets(i_e * BE + o_e, 0, stride_ge, E, 1, ALIGN)[None, :]
                    b_g = load_tile(b_pg, r_g, (i_e * BE + o_e < E)[None, :], m_n, True, EDGE, 0.0)
                    t += dot_state(b_g.to(tl.float32), high, low, True, PARTS)
            else:
                r_g = r_gn + feature_offsets(o_se, 0, stride_ge, E, 1, ALIGN)[None, :]
                b_g = load_tile(b_pg, r_g, (o_se < E)[None, :], m_n, E % BE != 0, EDGE, 0.0)
                if DQ:
                    # the added 0: see `map_elements`
                    t = dot_state(b_g.to(tl.float32) + 0.0, high, low, True, PARTS)  # [BN, BD]
            if DQ:
                if ROTARY:
                    t = rotate(t, cos, -sin)
                # a rotation of both sides changes no product: q_n . t_n is u_n . unrotate(t_n)
                if MAP == "softmax":
                    b_dq = mapped * (t - tl.sum(mapped * t, 1)[:, None])
                else:
                    # not inverse^2, which may overflow
                    ddenominator = -tl.sum(mapped * inverse[:, None] * t, 1) * inverse
                    dnormalizer += ddenominator[:, None] * mapped
                    t = t * inverse[:, None] + ddenominator[:, None] * normalizer[None, :]
                    b_dq = map_gradient(b_q, mapped, t, MAP)
                b_pdq = p_dq + ((i_b.to(tl.int64) * N + start) * n_heads + i_h) * D
                store_tile(b_pdq, b_dq, r_dq, m_d, m_n, D != BD, EDGE)
            if DSTATE:
                if MAP != "softmax":
                    mapped *= inverse[:, None]
                if ROTARY:
                    mapped = rotate(mapped, cos, sin)
                dstate = dot_tokens(tl.trans(mapped), b_g, dstate, False, PARTS) + nothing(N)
    if DQ and MAP != "softmax":
        tl.store(p_dnormalizer + i_part * D + o_d, tl.sum(dnormalizer, 0), mask=o_d < D)
    if DSTATE:
        r_state, m_state = state_offsets(o_d, o_se, 0, D, E, 1)
        tl.store(p_dstate + i_part * (D * E) + r_state, dstate, mask=m_state)


@triton.jit(do_not_specialize=COUNTS)
def linear_attention_dkv_bwd_kernel(
    p_k,
    p_v,
    p_cos,
    p_sin,
    p_state,
    p_dstate,
    p_dnormalizer,
    p_dk,
    p_dv,
    stride_kb,
    stride_km,
    stride_kh,
    stride_kd,
    stride_vb,
    stride_vm,
    stride_vh,
    stride_ve,
    stride_cb,
    stride_cm,
    stride_cd,
    M,
    n_heads,
    n_chunks,
    chunk,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    BM: tl.constexpr,
    MAP: tl.constexpr,
    ROTARY: tl.constexpr,
    ALIGN: tl.constexpr,
    PARTS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    CORRECT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """DK, DV: dk and dv of `chunk` blocks of keys of one head. For "softmax" p_dnormalizer holds the correction c.

    CORRECT: their part of c, written to p_dk.
    """
    i_b, i_h, i_chunk, first, last = program_part(n_heads, n_chunks, chunk, tl.cdiv(M, BM), 1)
    i_head = (i_b * n_heads + i_h).to(tl.int64)
    RAW: tl.constexpr = MAP == "relu" or MAP is None
    o_m = tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    o_e = tl.arange(0, BE)
    m_d = (o_d < D)[None, :]
    p_dstate += i_head * (D * E)
    r_state, m_state = state_offsets(o_d, o_e, 0, D, E, 1)
    b_s = tl.load(p_dstate + r_state, mask=m_state, other=0.0)
    high, low = split(b_s, PARTS)
    if MAP == "softmax":
        log_sum = tl.load(p_state + i_head * (D * E + D) + D * E + o_d, mask=o_d < D, other=float("inf"))
    if CORRECT:
        correction = tl.zeros((BM, BD), tl.float32)
    if DK:
        dnormalizer = tl.load(p_dnormalizer + i_head * D + o_d, mask=o_d < D, other=0.0)
    r_k = token_offsets(o_m, stride_km, ALIGN)[:, None] + feature_offsets(o_d, 0, stride_kd, D, 1, ALIGN)[None, :]
    r_vm = token_offsets(o_m, stride_vm, ALIGN)[:, None]
    r_dk = o_m.to(tl.int64)[:, None] * (n_heads * D) + o_d[None, :]
    r_dv = o_m.to(tl.int64)[:, None] * (n_heads * E)
    whole = tl.maximum(tl.minimum(last, M // BM), first)
    for EDGE in tl.static_range(2):
        for i_block in tl.range(whole if EDGE else first, last if EDGE else whole, num_stages=1 if EDGE else STAGES):
            start = i_block * BM
            m_m = (o_m < M - start)[:, None]
            row = i_b.to(tl.int64) * M + start
            b_pk = tile_start(p_k, i_b, i_h, start, stride_kb, stride_kh, stride_km, ALIGN)
            b_pv = tile_start(p_v, i_b, i_h, start, stride_vb, stride_vh, stride_vm, ALIGN)
            # rows past the end have v = 0: what they would add to c is 0
            b_k = load_tile(b_pk, r_k, m_d, m_m, D != BD, EDGE, 0.0)
            mapped = map_elements(b_k, MAP)  # [BM, BD]
            if MAP == "softmax":
                mapped = tl.exp(mapped - log_sum[None, :])
            rotated = mapped
            if ROTARY:
                cos = load_rotary(p_cos, o_m, start, M - start, i_b, stride_cb, stride_cm, stride_cd, D, BD, ROTARY)
                sin = load_rotary(p_sin, o_m, start, M - start, i_b, stride_cb, stride_cm, stride_cd, D, BD, ROTARY)
                rotated = rotate(mapped, cos, sin)
            dmapped = tl.zeros((BM, BD), tl.float32)
            for i_e in range(tl.cdiv(E, BE)):
                m_e = (i_e * BE + o_e < E)[None, :]
                if BE < E:
                    r_state, m_state = state_offsets(o_d, i_e * BE + o_e, 0, D, E, 1)
                    b_s = tl.load(p_dstate + r_state, mask=m_state, other=0.0)
                    high, low = split(b_s, PARTS)
                if DK or CORRECT:
                    r_v = r_vm + feature_offsets(i_e * BE + o_e, 0, stride_ve, E, 1, ALIGN)[None, :]
                    b_v = load_tile(b_pv, r_v, m_e, m_m, E % BE != 0, EDGE, 0.0)
                    dmapped += dot_state(b_v.to(tl.float32), tl.trans(high), tl.trans(low), True, PARTS)
                if DV:
                    b_dv = dot_state(rotated, high, low, RAW and ROTARY == 0, PARTS)  # [BM, BE]
                    r_e = r_dv + (i_e * BE + o_e)[None, :]
                    store_tile(p_dv + (row * n_heads + i_h) * E, b_dv, r_e, m_e, m_m, E % BE != 0, EDGE)
            if ROTARY and (DK or CORRECT):
                dmapped = rotate(dmapped, cos, -sin)
            if CORRECT:
                correction += mapped * dmapped
            if DK:
                if MAP == "softmax":
                    b_dk = mapped * (dmapped - dnormalizer[None, :])
                else:
                    b_dk = map_gradient(b_k, mapped, dmapped + dnormalizer[None, :], MAP)
                store_tile(p_dk + (row * n_heads + i_h) * D, b_dk, r_dk, m_d, m_m, D != BD, EDGE)

    if CORRECT:
        tl.store(p_dk + (i_head * n_chunks + i_chunk) * D + o_d, tl.sum(correction, 0), mask=o_d < D)
