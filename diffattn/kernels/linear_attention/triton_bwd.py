"""Backward kernels. With d_n the denominator, g_n the gradient of o_n and t_n = S g_n:

dS = sum_n (q_n / d_n) g_n^T          q, k: mapped and rotated; u, w: mapped, not rotated
dz = sum_n dd_n u_n                   dd_n = -(q_n . t_n) / d_n^2  (o is not needed: g_n . o_n = q_n . t_n / d_n)
du_n = unrotate(t_n) / d_n + dd_n z
dw_m = unrotate(dS v_m) + dz,  dv_m = dS^T k_m

For "softmax" d_n = 1 and dz is replaced by the correction c of the softmax over tokens:
dk_m = w_m (unrotate(dS v_m) - c), c = sum_m w_m unrotate(dS v_m), which without rotation is the row sum of S dS.
"""

import triton
import triton.language as tl

from diffattn.kernels.linear_attention.triton_fwd import COUNTS
from diffattn.kernels.linear_attention.triton_tiles import (
    dot_state,
    dot_tokens,
    load_rotary,
    load_state,
    load_tile,
    map_elements,
    map_gradient,
    map_query,
    rotate,
    row_start,
    split_state,
    store_tile,
)


@triton.jit(do_not_specialize=[*COUNTS, "group"])
def linear_attention_dq_bwd_kernel(
    p_grad,
    p_q,
    p_cos,
    p_sin,
    p_state,
    p_dq,
    p_parts,
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
    STAGES: tl.constexpr,
):
    """dq of `chunk` blocks of queries of one head, and their part of dz, written to part (b, h, i_chunk)."""
    i_p = tl.program_id(0)
    i_h = i_p % n_heads
    i_chunk = (i_p // n_heads) % n_chunks
    i_b = i_p // n_heads // n_chunks
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    o_e = tl.arange(0, BE)

    PAD: tl.constexpr = float("-inf") if MAP == "elu1" or MAP == "softmax" else 0.0
    p_state += ((i_b * n_heads + i_h) // group).to(tl.int64) * (D * E + D)
    high, low, undo_state = split_state(load_state(p_state, o_d, o_e, D, E), PARTS)
    if MAP != "softmax":
        normalizer = tl.load(p_state + D * E + o_d, mask=o_d < D, other=0.0)
        dnormalizer = tl.zeros((BD,), tl.float32)
    # tl.range also prefetches q, which goes into no product; range would not
    end = tl.minimum(i_chunk * chunk + chunk, tl.cdiv(N, BN))
    for i_block in tl.range(i_chunk * chunk, end, num_stages=STAGES):
        start = i_block * BN
        b_q = row_start(p_q, i_b, i_h, start, stride_qb, stride_qh, stride_qn, ALIGN)
        b_q = load_tile(b_q, o_n, o_d, stride_qn, stride_qd, N - start, D, BD, PAD, ALIGN)
        p_g = row_start(p_grad, i_b, i_h, start, stride_gb, stride_gh, stride_gn, ALIGN)
        t = tl.zeros((BN, BD), tl.float32)
        for i_e in range(tl.cdiv(E, BE)):
            if BE < E:
                high, low, undo_state = split_state(load_state(p_state, o_d, i_e * BE + o_e, D, E), PARTS)
            b_g = load_tile(p_g, o_n, i_e * BE + o_e, stride_gn, stride_ge, N - start, E, BE, 0.0, ALIGN)
            b_t, undo = dot_state(b_g.to(tl.float32), tl.trans(high), tl.trans(low), True, PARTS)
            t += b_t * undo[:, None] * undo_state[None, :]  # [BN, BD]
        if ROTARY:
            cos = load_rotary(p_cos, o_n, start, i_b, stride_cb, stride_cn, stride_cd, N - start, D, BD, ROTARY)
            sin = load_rotary(p_sin, o_n, start, i_b, stride_cb, stride_cn, stride_cd, N - start, D, BD, ROTARY)
            t = rotate(t, cos, -sin)
        # a rotation of both sides changes no product: q_n . t_n is u_n . unrotate(t_n)
        mapped = map_query(b_q, MAP)  # [BN, BD]
        if MAP == "softmax":
            b_dq = mapped * (t - tl.sum(mapped * t, 1)[:, None])
        else:
            inverse = 1.0 / (tl.sum(mapped * normalizer[None, :], 1) + eps)
            # rows past the end would be 0 / 0 with eps = 0
            inverse = tl.where(o_n < N - start, inverse, 0.0)
            # not inverse^2, which may overflow
            ddenominator = -tl.sum(mapped * inverse[:, None] * t, 1) * inverse
            dnormalizer += tl.sum(ddenominator[:, None] * mapped, 0)
            t = t * inverse[:, None] + ddenominator[:, None] * normalizer[None, :]
            b_dq = map_gradient(b_q, mapped, t, MAP)
        out = ((i_b.to(tl.int64) * N + start) * n_heads + i_h) * D
        store_tile(p_dq + out, b_dq, o_n, o_d, n_heads * D, N - start, D, BD)

    if MAP != "softmax":
        p_parts += ((i_b * n_heads + i_h).to(tl.int64) * n_chunks + i_chunk) * D
        tl.store(p_parts + o_d, dnormalizer, mask=o_d < D)


@triton.jit(do_not_specialize=[*COUNTS, "group"])
def linear_attention_dstate_bwd_kernel(
    p_grad,
    p_q,
    p_cos,
    p_sin,
    p_state,
    p_parts,
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
    SUM: tl.constexpr,
):
    """dS over `chunk` blocks of queries of one head, written to part (b, h, i_chunk).

    Not one kernel with dq: there the tile of the gradient goes into two products, and the pipeline keeps too few
    buffers of such a tile (triton-lang/triton#6691); S and dS together also leave wide heads without registers.
    """
    i_p = tl.program_id(0)
    i_h = i_p % n_heads
    i_chunk = (i_p // n_heads) % n_chunks
    i_b = i_p // n_heads // n_chunks
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    o_e = tl.program_id(1) * BE + tl.arange(0, BE)

    PAD: tl.constexpr = float("-inf") if MAP == "elu1" or MAP == "softmax" else 0.0
    if MAP != "softmax":
        p_state += ((i_b * n_heads + i_h) // group).to(tl.int64) * (D * E + D)
        normalizer = tl.load(p_state + D * E + o_d, mask=o_d < D, other=0.0)
    dstate = tl.zeros((BD, BE), tl.float32)
    for i_block in range(i_chunk * chunk, tl.minimum(i_chunk * chunk + chunk, tl.cdiv(N, BN))):
        start = i_block * BN
        b_q = row_start(p_q, i_b, i_h, start, stride_qb, stride_qh, stride_qn, ALIGN)
        b_q = load_tile(b_q, o_n, o_d, stride_qn, stride_qd, N - start, D, BD, PAD, ALIGN)
        b_g = row_start(p_grad, i_b, i_h, start, stride_gb, stride_gh, stride_gn, ALIGN)
        b_g = load_tile(b_g, o_n, o_e, stride_gn, stride_ge, N - start, E, BE, 0.0, ALIGN)
        mapped = map_query(b_q, MAP)  # [BN, BD]
        if MAP != "softmax":
            inverse = 1.0 / (tl.sum(mapped * normalizer[None, :], 1) + eps)
            inverse = tl.where(o_n < N - start, inverse, 0.0)
            mapped *= inverse[:, None]
        if ROTARY:
            cos = load_rotary(p_cos, o_n, start, i_b, stride_cb, stride_cn, stride_cd, N - start, D, BD, ROTARY)
            sin = load_rotary(p_sin, o_n, start, i_b, stride_cb, stride_cn, stride_cd, N - start, D, BD, ROTARY)
            mapped = rotate(mapped, cos, sin)
        dstate = dot_tokens(mapped, b_g, dstate, False, SUM)

    p_parts += ((i_b * n_heads + i_h).to(tl.int64) * n_chunks + i_chunk) * (D * E)
    store_tile(p_parts, dstate, o_d, o_e, E, D, E, BE)


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
    EXACT: tl.constexpr,
    PARTS: tl.constexpr,
    CORRECT: tl.constexpr,
):
    """dk and dv of `chunk` blocks of keys of one head. For "softmax" p_dnormalizer holds the correction c.

    With CORRECT, only their part of c, written to p_dk.
    """
    i_p = tl.program_id(0)
    i_h = i_p % n_heads
    i_chunk = (i_p // n_heads) % n_chunks
    i_b = i_p // n_heads // n_chunks
    i_head = (i_b * n_heads + i_h).to(tl.int64)
    o_m = tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    o_e = tl.arange(0, BE)

    PAD: tl.constexpr = float("-inf") if MAP == "elu1" or MAP == "softmax" else 0.0
    p_dstate += i_head * (D * E)
    high, low, undo_state = split_state(load_state(p_dstate, o_d, o_e, D, E), PARTS)
    if MAP == "softmax":
        log_sum = tl.load(p_state + i_head * (D * E + D) + D * E + o_d, mask=o_d < D, other=float("inf"))
    if CORRECT:
        correction = tl.zeros((BD,), tl.float32)
    else:
        dnormalizer = tl.load(p_dnormalizer + i_head * D + o_d, mask=o_d < D, other=0.0)
    for i_block in range(i_chunk * chunk, tl.minimum(i_chunk * chunk + chunk, tl.cdiv(M, BM))):
        start = i_block * BM
        b_k = row_start(p_k, i_b, i_h, start, stride_kb, stride_kh, stride_km, ALIGN)
        b_k = load_tile(b_k, o_m, o_d, stride_km, stride_kd, M - start, D, BD, PAD, ALIGN)
        b_v = row_start(p_v, i_b, i_h, start, stride_vb, stride_vh, stride_vm, ALIGN)
        mapped = map_elements(b_k, MAP)  # [BM, BD]
        if MAP == "softmax":
            mapped = tl.exp(mapped - log_sum[None, :])
        rotated = mapped
        if ROTARY:
            cos = load_rotary(p_cos, o_m, start, i_b, stride_cb, stride_cm, stride_cd, M - start, D, BD, ROTARY)
            sin = load_rotary(p_sin, o_m, start, i_b, stride_cb, stride_cm, stride_cd, M - start, D, BD, ROTARY)
            rotated = rotate(mapped, cos, sin)
        out = ((i_b.to(tl.int64) * M + start) * n_heads + i_h) * E
        dmapped = tl.zeros((BM, BD), tl.float32)
        for i_e in range(tl.cdiv(E, BE)):
            if BE < E:
                high, low, undo_state = split_state(load_state(p_dstate, o_d, i_e * BE + o_e, D, E), PARTS)
            b_x = load_tile(b_v, o_m, i_e * BE + o_e, stride_vm, stride_ve, M - start, E, BE, 0.0, ALIGN)
            t, undo = dot_state(b_x.to(tl.float32), tl.trans(high), tl.trans(low), True, PARTS)
            dmapped += t * undo[:, None] * undo_state[None, :]
            if not CORRECT:
                b_dv, undo = dot_state(rotated * undo_state[None, :], high, low, EXACT, PARTS)  # [BM, BE]
                store_tile(p_dv + out, b_dv * undo[:, None], o_m, i_e * BE + o_e, n_heads * E, M - start, E, BE)
        if ROTARY:
            dmapped = rotate(dmapped, cos, -sin)
        if CORRECT:
            correction += tl.sum(mapped * dmapped, 0)
        else:
            if MAP == "softmax":
                b_dk = mapped * (dmapped - dnormalizer[None, :])
            else:
                b_dk = map_gradient(b_k, mapped, dmapped + dnormalizer[None, :], MAP)
            out = ((i_b.to(tl.int64) * M + start) * n_heads + i_h) * D
            store_tile(p_dk + out, b_dk, o_m, o_d, n_heads * D, M - start, D, BD)

    if CORRECT:
        tl.store(p_dk + (i_head * n_chunks + i_chunk) * D + o_d, correction, mask=o_d < D)
