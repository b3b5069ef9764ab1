"""The walk over steps of `block` tokens that see one another, any decay: the keys of a step, then its readers.

With `triton_tiles.py`'s names, for a step t: S <- exp(g_t) S, then S <- S + sum of k_m v_m^T over its tokens, then
o_n = q_n S for them. With POST the decay comes last.

Bytes as in `triton_walk.py`, for steps of at least 16 tokens: a tile holds tokens of one step.
"""

import triton
import triton.language as tl

from diffattn.kernels.causal_linear_attention.triton_tiles import (
    COUNTS,
    limit_decay,
    load_mapped,
    load_output,
    load_rows,
    load_state,
    product,
    row_index,
    store_state,
    tile_offsets,
    token_at,
    walk_program,
    write_output,
)
from diffattn.kernels.linear_attention.triton_tiles import dot_state, nothing, split


@triton.jit
def decay_state(state, tail, kept, DECAY: tl.constexpr, TAIL: tl.constexpr):
    """exp(g) S: g is a number (1), or one for each key (2) or value feature (3). So is the tail's, by its kind."""
    if DECAY == 1:
        state, tail = state * kept, tail * kept
    if DECAY == 2:
        state = state * kept[:, None]
        if TAIL == 1:
            tail = tail * kept
    if DECAY == 3:
        state = state * kept[None, :]
        if TAIL == 2:
            tail = tail * kept
    return state, tail


@triton.jit(do_not_specialize=COUNTS)
def causal_linear_attention_frames_kernel(
    p_q,
    p_k,
    p_v,
    p_x,
    p_g,
    p_a,
    p_b,
    p_in,
    p_out,
    p_total,
    p_o,
    p_residual,
    p_inverse,
    p_rate,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_qd,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_kd,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_vd,
    stride_xb,
    stride_xn,
    stride_xh,
    stride_xd,
    stride_gb,
    stride_gn,
    stride_gh,
    stride_gd,
    N,
    n_heads,
    n_segments,
    segment,
    block,
    group_q,
    group_k,
    group_g,
    eps,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    BN: tl.constexpr,
    MAP_Q: tl.constexpr,
    MAP_K: tl.constexpr,
    MAP_V: tl.constexpr,
    MAP_X: tl.constexpr,
    X: tl.constexpr,
    DECAY: tl.constexpr,
    FLIP: tl.constexpr,
    POST: tl.constexpr,
    STRICT: tl.constexpr,
    ADD: tl.constexpr,
    NORM: tl.constexpr,
    WEIGH: tl.constexpr,
    BIAS: tl.constexpr,
    RATE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    OUT: tl.constexpr,
    INIT: tl.constexpr,
    SAVE: tl.constexpr,
    ALIGN: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One head of one sample over `segment` steps: OUT writes outputs, SAVE the state after them.

    INIT: the walk starts from the state in p_in.
    """
    dtype: tl.constexpr = p_q.dtype.element_ty
    EXACT_Q: tl.constexpr = MAP_Q != "elu1"
    EXACT_K: tl.constexpr = MAP_K != "elu1"
    EXACT_V: tl.constexpr = MAP_V != "elu1"
    TAIL: tl.constexpr = 1 if NORM else (2 if BIAS else 0)
    i_b, i_h, i_s = walk_program(tl.program_id(0), n_heads, n_segments)
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    o_e = tl.program_id(1) * BE + tl.arange(0, BE)
    i_state = (i_b * (n_heads // group_k) + i_h // group_k) * n_segments + i_s
    state, tail = load_state(p_in, i_state, o_d, o_e, D, E, INIT, TAIL)
    n_rows = (tl.num_programs(0) // n_segments).to(tl.int64) * N
    r_q = tile_offsets(o_n, o_d, stride_qn, stride_qd, D, FLIP, ALIGN)
    r_k = tile_offsets(o_n, o_d, stride_kn, stride_kd, D, FLIP, ALIGN)
    r_v = tile_offsets(o_n, o_e, stride_vn, stride_vd, E, FLIP, ALIGN)
    r_x = tile_offsets(o_n, o_e, stride_xn, stride_xd, E, FLIP, ALIGN)
    if DECAY == 1:
        all_g = 0.0
    elif DECAY == 2:
        o_g, m_g = o_d, o_d < D
        all_g = tl.zeros((BD,), tl.float32)
    else:
        o_g, m_g = o_e, o_e < E
        all_g = tl.zeros((BE,), tl.float32)
    last = tl.minimum(i_s * segment + segment, N // block)
    for i_t in range(i_s * segment, last):
        if DECAY:
            p_step = p_g + i_b.to(tl.int64) * stride_gb + (i_h // group_g).to(tl.int64) * stride_gh
            p_step += tl.cast(token_at(i_t, N // block, FLIP), tl.int64) * stride_gn
            if DECAY == 1:
                b_g = limit_decay(tl.load(p_step))
            else:
                b_g = limit_decay(tl.load(p_step + o_g * stride_gd, mask=m_g, other=0.0))
            all_g += b_g
            kept = tl.exp(b_g)
            if not POST:
                state, tail = decay_state(state, tail, kept, DECAY, TAIL)
        own, own_tail = tl.zeros((BD, BE), tl.float32), tl.zeros(tail.shape, tl.float32)
        for start in tl.range(0, block, BN, num_stages=STAGES):
            m_n = o_n < block - start
            token = i_t * block + start
            m_d = m_n[:, None] & (o_d < D)[None, :]
            m_e = m_n[:, None] & (o_e < E)[None, :]
            b_k = load_mapped(
                p_k, i_b, i_h // group_k, token, N, stride_kb, stride_kh, stride_kn, r_k, m_d, MAP_K, FLIP, ALIGN
            )
            b_v = load_mapped(
                p_v, i_b, i_h // group_k, token, N, stride_vb, stride_vh, stride_vn, r_v, m_e, MAP_V, FLIP, ALIGN
            )
            if NORM:
                own_tail += tl.sum(b_k, 0)
            if BIAS:
                b_w = b_v
                if WEIGH == 2:
                    b_w *= load_rows(p_b, i_b, i_h, token, N, n_heads, o_n, m_n, FLIP)[:, None]
                own_tail += tl.sum(b_w, 0)
            if WEIGH == 2:
                b_k *= load_rows(p_a, i_b, i_h, token, N, n_heads, o_n, m_n, FLIP)[:, None]
            own += product(tl.trans(b_k), b_v, EXACT_K and WEIGH != 2, EXACT_V, PARTS, dtype) + nothing(N)
        if OUT:
            # what readers take from other steps, and what from their own: apart only where that matters
            if not (STRICT or RATE):
                state, tail = state + own, tail + own_tail
            high, low = split(state, PARTS)
            if RATE and not STRICT:
                own_high, own_low = split(own, PARTS)
            for start in tl.range(0, block, BN, num_stages=STAGES):
                m_n = o_n < block - start
                token = i_t * block + start
                m_d = m_n[:, None] & (o_d < D)[None, :]
                m_e = m_n[:, None] & (o_e < E)[None, :]
                b_q = load_mapped(
                    p_q, i_b, i_h // group_q, token, N, stride_qb, stride_qh, stride_qn, r_q, m_d, MAP_Q, FLIP, ALIGN
                )
                rows = row_index(i_b, i_h, token, N, n_heads, o_n, FLIP)
                others = dot_state(b_q, high, low, EXACT_Q, PARTS)  # [BN, BE]
                mine = 0.0
                if RATE and not STRICT:
                    mine = dot_state(b_q, own_high, own_low, EXACT_Q, PARTS)
                if WEIGH == 1:
                    b_a = load_rows(p_a, i_b, i_h, token, N, n_heads, o_n, m_n, FLIP)[:, None]
                    others *= b_a
                    if RATE and not STRICT:
                        mine *= b_a
                if BIAS:
                    b_b = tl.full((BN, 1), 1.0, tl.float32)
                    if WEIGH == 1:
                        b_b = load_rows(p_b, i_b, i_h, token, N, n_heads, o_n, m_n, FLIP)[:, None]
                    others += b_b * tail[None, :]
                    if RATE and not STRICT:
                        mine += b_b * own_tail[None, :]
                if NORM:
                    denominator = tl.sum(b_q * tail[None, :], 1)
                if ADD:
                    before = load_output(p_o, p_residual, rows, o_e, m_e, E, RESIDUAL)
                    if NORM:
                        other_way = 1.0 / tl.load(p_a + rows, mask=m_n, other=1.0)
                        denominator += other_way
                        before *= other_way[:, None]
                    others += before
                elif NORM:
                    denominator += eps
                if NORM:
                    inverse = 1.0 / denominator
                    others *= inverse[:, None]
                    if RESIDUAL:
                        if tl.program_id(1) == 0:
                            tl.store(p_inverse + rows, inverse, mask=m_n)
                write_output(
                    p_o, p_residual, p_x, p_rate, others, mine, rows, i_b, i_h // group_q, token, N, n_rows, o_e,
                    m_e, stride_xb, stride_xh, stride_xn, r_x, E, X, MAP_X, RATE, RESIDUAL, FLIP, ALIGN,
                )  # fmt: skip
            if STRICT or RATE:
                state, tail = state + own, tail + own_tail
        else:
            state, tail = state + own, tail + own_tail
        if DECAY and POST:
            state, tail = decay_state(state, tail, kept, DECAY, TAIL)
    if SAVE:
        store_state(p_out, i_state, state, tail, o_d, o_e, D, E, TAIL)
        if DECAY and not OUT:
            if DECAY == 1:
                if tl.program_id(1) == 0:
                    tl.store(p_total + i_state, all_g)
            elif DECAY == 2:
                if tl.program_id(1) == 0:
                    tl.store(p_total + i_state.to(tl.int64) * D + o_g, all_g, mask=m_g)
            else:
                tl.store(p_total + i_state.to(tl.int64) * E + o_g, all_g, mask=m_g)
