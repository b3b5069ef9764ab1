"""Forward kernels: the output from the state, and all in one for few tokens.

Bytes: the state reads k and v, the output reads q and writes o: 4 B H N D elements for D = E, and no fewer are
possible. benchmarks/NOTES.md has what each version took.
"""

import triton
import triton.language as tl

from diffattn.kernels.linear_attention.triton_state import sum_keys
from diffattn.kernels.linear_attention.triton_tiles import (
    COUNTS,
    dot_state,
    dot_tokens,
    feature_offsets,
    load_rotary,
    load_tile,
    map_query,
    program_part,
    rotate,
    split,
    state_offsets,
    store_tile,
    tile_start,
    token_offsets,
)


@triton.jit
def write_outputs(
    p_q,
    p_cos,
    p_sin,
    p_o,
    state,
    normalizer,
    i_b,
    i_h,
    o_e,
    first,
    last,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_qd,
    stride_cb,
    stride_cn,
    stride_cd,
    N,
    n_heads,
    eps,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    BN: tl.constexpr,
    PACK: tl.constexpr,
    MAP: tl.constexpr,
    ROTARY: tl.constexpr,
    ALIGN: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """o_n = (rot(phi(q_n)) S) / (phi(q_n) . z + eps) for blocks `first` to `last` of the queries of PACK heads."""
    RAW: tl.constexpr = MAP == "relu" or MAP is None
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    m_d = (o_d < D * PACK)[None, :]
    m_e = (o_e < E * PACK)[None, :]
    PAD_D: tl.constexpr = D * PACK != BD
    PAD_E: tl.constexpr = E * PACK % BE != 0
    r_q = token_offsets(o_n, stride_qn, ALIGN)[:, None]
    r_q = r_q + feature_offsets(o_d, stride_qh, stride_qd, D, PACK, ALIGN)[None, :]
    r_o = o_n.to(tl.int64)[:, None] * (n_heads * E) + o_e[None, :]
    high, low = split(state, PARTS)
    if MAP != "softmax" and ROTARY == 0:
        # The denominator is a product too, a column for each head: a sum over features would cross threads.
        o_j = tl.arange(0, 16)
        own = (o_d // D)[:, None] == o_j[None, :]
        z_high, z_low = split(tl.where(own | (PACK == 1), normalizer[:, None], 0.0), PARTS)
        # and another brings it to the head's features
        spread = (o_j[:, None] == (o_e // E)[None, :]).to(p_q.dtype.element_ty)
    whole = tl.maximum(tl.minimum(last, N // BN), first)
    for EDGE in tl.static_range(2):
        for i_block in tl.range(whole if EDGE else first, last if EDGE else whole, num_stages=1 if EDGE else STAGES):
            start = i_block * BN
            m_n = (o_n < N - start)[:, None]
            b_pq = tile_start(p_q, i_b, i_h, start, stride_qb, stride_qh, stride_qn, ALIGN)
            b_q = load_tile(b_pq, r_q, m_d, m_n, PAD_D, EDGE, 0.0)
            mapped = map_query(b_q, m_d, MAP, PAD_D)  # [BN, BD]
            rotated = mapped
            if ROTARY:
                cos = load_rotary(p_cos, o_n, start, N - start, i_b, stride_cb, stride_cn, stride_cd, D, BD, ROTARY)
                sin = load_rotary(p_sin, o_n, start, N - start, i_b, stride_cb, stride_cn, stride_cd, D, BD, ROTARY)
                rotated = rotate(mapped, cos, sin)
            b_o = dot_state(rotated, high, low, RAW and ROTARY == 0, PARTS)  # [BN, BE]
            if MAP != "softmax":
                if ROTARY:
                    denominator = tl.sum(mapped * normalizer[None, :], 1)
                else:
                    denominator = dot_state(mapped, z_high, z_low, RAW, PARTS)  # [BN, 16]
                if PACK == 1 and ROTARY == 0:
                    denominator = tl.sum(denominator, 1) * 0.0625
                inverse = 1.0 / (denominator + eps)
                if PACK == 1:
                    b_o *= inverse[:, None]
                else:
                    b_o *= dot_tokens(inverse, spread, tl.zeros((BN, BE), tl.float32), False, PARTS)
            b_po = p_o + ((i_b.to(tl.int64) * N + start) * n_heads + i_h) * E
            store_tile(b_po, b_o, r_o, m_e, m_n, PAD_E, EDGE)


@triton.jit(do_not_specialize=[*COUNTS, "group"])
def linear_attention_output_fwd_kernel(
    p_q,
    p_cos,
    p_sin,
    p_state,
    p_o,
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
    PACK: tl.constexpr,
    MAP: tl.constexpr,
    ROTARY: tl.constexpr,
    ALIGN: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The output of `chunk` blocks of queries of PACK heads, from the state of their key/value heads. With PACK > 1
    there is one of those for each query head."""
    i_b, i_h, _, first, last = program_part(n_heads, n_chunks, chunk, tl.cdiv(N, BN), PACK)
    o_d = tl.arange(0, BD)
    o_e = tl.program_id(1) * BE + tl.arange(0, BE)
    SIZE: tl.constexpr = D * E + D
    p_state += ((i_b * n_heads + i_h) // group).to(tl.int64) * SIZE
    r_state, m_state = state_offsets(o_d, o_e, SIZE, D, E, PACK)
    state = tl.load(p_state + r_state, mask=m_state, other=0.0)
    normalizer = tl.load(p_state + D * E + o_d // D * SIZE + o_d % D, mask=o_d < D * PACK, other=0.0)
    write_outputs(
        p_q, p_cos, p_sin, p_o, state, normalizer, i_b, i_h, o_e, first, last,
        stride_qb, stride_qn, stride_qh, stride_qd, stride_cb, stride_cn, stride_cd, N, n_heads, eps,
        D, E, BD, BE, BN, PACK, MAP, ROTARY, ALIGN, PARTS, STAGES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_heads"])
def linear_attention_fused_fwd_kernel(
    p_q,
    p_k,
    p_v,
    p_o,
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
    N,
    M,
    n_heads,
    eps,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    BN: tl.constexpr,
    MAP: tl.constexpr,
    ALIGN: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """All of a head in one program, the state in registers: for few tokens, where a launch costs as much as they."""
    i_b, i_h, _, _, _ = program_part(n_heads, 1, 0, 0, 1)
    o_d = tl.arange(0, BD)
    o_e = tl.arange(0, BE)
    state, normalizer, _ = sum_keys(
        p_k, p_v, p_k, p_k, 0.0, i_b, i_h, o_e, 0, tl.cdiv(M, BN), stride_kb, stride_km, stride_kh, stride_kd,
        stride_vb, stride_vm, stride_vh, stride_ve, 0, 0, 0, M,
        D, E, BD, BE, BN, 1, MAP, 0, ALIGN, PARTS, False, STAGES,
    )  # fmt: skip
    _, m_state = state_offsets(o_d, o_e, 0, D, E, 1)
    write_outputs(
        p_q, p_q, p_q, p_o, tl.where(m_state, state, 0.0), tl.where(o_d < D, normalizer, 0.0), i_b, i_h, o_e,
        0, tl.cdiv(N, BN), stride_qb, stride_qn, stride_qh, stride_qd, 0, 0, 0, N, n_heads, eps,
        D, E, BD, BE, BN, 1, MAP, 0, ALIGN, PARTS, STAGES,
    )  # fmt: skip
