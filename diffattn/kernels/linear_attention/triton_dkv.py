"""The backward of keys and values: the equations are in triton_dq.py."""

import triton
import triton.language as tl

from diffattn.kernels.linear_attention.triton_tiles import (
    COUNTS,
    dot_parts,
    feature_offsets,
    load_rotary,
    load_tile,
    load_tokens,
    map_elements,
    map_gradient,
    program_part,
    rotate,
    split,
    state_offsets,
    store_tile,
    tile_start,
    token_offsets,
    zero_of_products,
)


@triton.jit(do_not_specialize=COUNTS)
def linear_attention_dkv_bwd_kernel(
    p_k,
    p_v,
    p_cos,
    p_sin,
    p_state,
    p_dstate,
    p_correction,
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
    PACK: tl.constexpr,
    MAP: tl.constexpr,
    ROTARY: tl.constexpr,
    ALIGN: tl.constexpr,
    PARTS: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    CORRECT: tl.constexpr,
    TURNED: tl.constexpr,
    EDGE: tl.constexpr,
    APART: tl.constexpr,
    STAGES: tl.constexpr,
):
    """DK, DV: dk and dv of `chunk` blocks of keys of PACK heads. CORRECT: their part of c, written to p_dk.

    p_dstate holds the gradients of S and, but for "softmax", z; p_correction, for "softmax" alone, the correction c.
    TURNED, EDGE: as for the queries.
    """
    i_b, i_h, i_chunk, first, last = program_part(n_heads, n_chunks, chunk, tl.cdiv(M, BM), PACK)
    i_head = (i_b * n_heads + i_h).to(tl.int64)
    RAW: tl.constexpr = MAP == "relu" or MAP is None
    PAD_D: tl.constexpr = D * PACK != BD
    PAD_E: tl.constexpr = E * PACK % BE != 0
    o_m = tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    o_e = tl.arange(0, BE)
    m_d = (o_d < D * PACK)[None, :]
    SIZE: tl.constexpr = D * E if MAP == "softmax" else D * E + D
    p_dstate += i_head * SIZE
    r_state, m_state = state_offsets(o_d, o_e, SIZE, D, E, PACK)
    b_s = tl.load(p_dstate + r_state, mask=m_state, other=0.0)
    high, low = split(b_s, PARTS)
    if MAP == "softmax":
        log_sum = tl.load(p_state + i_head * (D * E + D) + D * E + o_d, mask=o_d < D, other=float("inf"))
    if CORRECT:
        correction = tl.zeros((BM, BD), tl.float32)
    if DK and MAP == "softmax":
        dnormalizer = -tl.load(p_correction + i_head * D + o_d, mask=o_d < D, other=0.0)
    elif DK:
        dnormalizer = tl.load(p_dstate + D * E + o_d // D * SIZE + o_d % D, mask=o_d < D * PACK, other=0.0)
    r_k = token_offsets(o_m, stride_km, ALIGN)[:, None]
    r_k = r_k + feature_offsets(o_d, stride_kh, stride_kd, D, PACK, ALIGN)[None, :]
    r_vm = token_offsets(o_m, stride_vm, ALIGN)[:, None]
    r_dk = o_m.to(tl.int64)[:, None] * (n_heads * D) + o_d[None, :]
    r_dv = o_m.to(tl.int64)[:, None] * (n_heads * E)
    zero = zero_of_products(BM, BD, p_k.dtype.element_ty) if DK or CORRECT else 0.0
    for i_block in tl.range(first, last, num_stages=STAGES):
        start = i_block * BM
        m_m = (o_m < M - start)[:, None]
        row = i_b.to(tl.int64) * M + start
        b_pk = tile_start(p_k, i_b, i_h, start, stride_kb, stride_kh, stride_km, ALIGN)
        b_pv = tile_start(p_v, i_b, i_h, start, stride_vb, stride_vh, stride_vm, ALIGN)
        # rows past the end have v = 0: what they would add to c is 0
        b_k = load_tokens(b_pk, r_k, m_d, m_m, PAD_D, EDGE, TURNED)
        mapped = map_elements(b_k, MAP, zero)  # [BM, BD]
        if MAP == "softmax":
            mapped = tl.exp(mapped - log_sum[None, :])
        rotated = mapped
        if ROTARY:
            cos = load_rotary(p_cos, o_m, start, M - start, i_b, stride_cb, stride_cm, stride_cd, D, BD, ROTARY)
            sin = load_rotary(p_sin, o_m, start, M - start, i_b, stride_cb, stride_cm, stride_cd, D, BD, ROTARY)
            rotated = rotate(mapped, cos, sin)
        dmapped = tl.zeros((BM, BD), tl.float32)
        if DK and ROTARY == 0:
            dmapped += dnormalizer[None, :]
        for i_e in range(tl.cdiv(E * PACK, BE)):
            o_i = i_e * BE + o_e
            m_e = (o_i < E * PACK)[None, :]
            if BE < E:
                r_state, m_state = state_offsets(o_d, o_i, 0, D, E, 1)
                b_s = tl.load(p_dstate + r_state, mask=m_state, other=0.0)
                high, low = split(b_s, PARTS)
            if DV:
                b_dv = dot_parts(rotated, high, low, M, RAW and ROTARY == 0, PARTS, APART)  # [BM, BE]
                store_tile(p_dv + (row * n_heads + i_h) * E, b_dv, r_dv + o_i[None, :], m_e, m_m, PAD_E, EDGE)
            if DK or CORRECT:
                r_v = r_vm + feature_offsets(o_i, stride_vh, stride_ve, E, PACK, ALIGN)[None, :]
                b_v = load_tile(b_pv, r_v, m_e, m_m, PAD_E, EDGE, 0.0)
                dmapped += dot_parts(b_v.to(tl.float32), tl.trans(high), tl.trans(low), M, True, PARTS, APART)
        if ROTARY and (DK or CORRECT):
            dmapped = rotate(dmapped, cos, -sin)
            if DK:
                dmapped += dnormalizer[None, :]
        if CORRECT:
            correction += mapped * dmapped
        if DK:
            b_dk = mapped * dmapped if MAP == "softmax" else map_gradient(mapped, mapped, dmapped, MAP)
            store_tile(p_dk + (row * n_heads + i_h) * D, b_dk, r_dk, m_d, m_m, PAD_D, EDGE)

    if CORRECT:
        tl.store(p_dk + (i_head * n_chunks + i_chunk) * D + o_d, tl.sum(correction, 0), mask=o_d < D)
