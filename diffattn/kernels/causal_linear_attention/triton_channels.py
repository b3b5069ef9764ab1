"""The walk over tokens with a decay per channel: BN tokens at a time, the state in registers.

The weight of a pair of tokens is another one in every channel, so pairs of one tile make no matrix product. Those s
tokens apart are taken together: with k and v read s tokens back, and the decay in between summed up as s grows. No
exponent is above 0, where products of exp(G) and exp(-G) would overflow. Pairs further apart meet in the state.

The decay is on the features of the keys (DECAY 2) or, in the gradients of those, of the values (3).
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
    sum_decay,
    tile_offsets,
    token_at,
    walk_program,
    write_output,
)
from diffattn.kernels.linear_attention.triton_tiles import nothing


@triton.jit(do_not_specialize=COUNTS)
def causal_linear_attention_channels_kernel(
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
    """One head of one sample over `segment` tokens: OUT writes outputs, SAVE the state after them.

    INIT: the walk starts from the state in p_in. `block` is 1 here.
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
    if DECAY == 2:
        o_g, m_c = o_d, o_d < D
        r_g = tile_offsets(o_n, o_d, stride_gn, stride_gd, D, FLIP, 1)
    else:
        o_g, m_c = o_e, o_e < E
        r_g = tile_offsets(o_n, o_e, stride_gn, stride_gd, E, FLIP, 1)
    all_g = tl.zeros(o_g.shape, tl.float32)
    p_g += i_b.to(tl.int64) * stride_gb + (i_h // group_g).to(tl.int64) * stride_gh
    first = i_s * segment
    last = tl.minimum(first + segment, N)
    for start in tl.range(first, last, BN, num_stages=STAGES):
        m_n = o_n < last - start
        m_d = m_n[:, None] & (o_d < D)[None, :]
        m_e = m_n[:, None] & (o_e < E)[None, :]
        m_g = m_n[:, None] & m_c[None, :]
        b_k = load_mapped(
            p_k, i_b, i_h // group_k, start, N, stride_kb, stride_kh, stride_kn, r_k, m_d, MAP_K, FLIP, ALIGN
        )
        b_v = load_mapped(
            p_v, i_b, i_h // group_k, start, N, stride_vb, stride_vh, stride_vn, r_v, m_e, MAP_V, FLIP, ALIGN
        )
        b_pg = p_g + tl.cast(token_at(start, N, FLIP), tl.int64) * stride_gn
        high, low, total_high, total_low = sum_decay(limit_decay(tl.load(b_pg + r_g, mask=m_g, other=0.0)), POST)
        kept = tl.exp(total_high + total_low)
        to_state = tl.exp((total_high[None, :] - high) + (total_low[None, :] - low))
        all_g += total_high + total_low
        if OUT:
            b_q = load_mapped(
                p_q, i_b, i_h // group_q, start, N, stride_qb, stride_qh, stride_qn, r_q, m_d, MAP_Q, FLIP, ALIGN
            )
            if WEIGH == 1:
                b_a = load_rows(p_a, i_b, i_h, start, N, n_heads, o_n, m_n, FLIP)
                if BIAS:
                    b_b = load_rows(p_b, i_b, i_h, start, N, n_heads, o_n, m_n, FLIP)
            if DECAY == 2:
                from_state = b_q * tl.exp(high + low)
                others = product(from_state, state, False, False, PARTS, dtype)  # [BN, BE]
            else:
                others = product(b_q, state, EXACT_Q, False, PARTS, dtype)
            if WEIGH == 1:
                others *= b_a[:, None]
            if BIAS:
                others += b_b[:, None] * tail[None, :] if WEIGH == 1 else tail[None, :]
            if DECAY == 3:
                others *= tl.exp(high + low)
            if NORM:
                denominator = tl.sum(from_state * tail[None, :], 1)
            own = tl.zeros((BN, BE), tl.float32)
            span = tl.zeros(high.shape, tl.float32)
            for shift in range(1 if STRICT else 0, BN):
                m_s = (m_n & (o_n >= shift))[:, None]
                # rows above the tile's first are masked: their tokens belong to the state
                back = start - shift
                s_k = load_mapped(
                    p_k, i_b, i_h // group_k, back, N, stride_kb, stride_kh, stride_kn, r_k,
                    m_s & (o_d < D)[None, :], MAP_K, FLIP, ALIGN,
                )  # fmt: skip
                s_v = load_mapped(
                    p_v, i_b, i_h // group_k, back, N, stride_vb, stride_vh, stride_vn, r_v,
                    m_s & (o_e < E)[None, :], MAP_V, FLIP, ALIGN,
                )  # fmt: skip
                if shift > 0:
                    # between a token and the one `shift` before it lies one more step
                    s_pg = p_g + tl.cast(token_at(back if POST else back + 1, N, FLIP), tl.int64) * stride_gn
                    span += limit_decay(tl.load(s_pg + r_g, mask=m_s & m_c[None, :], other=0.0))
                if DECAY == 2:
                    score = tl.sum(b_q * s_k * tl.exp(span), 1)
                else:
                    score = tl.sum(b_q * s_k, 1)
                    s_v *= tl.exp(span)
                if NORM:
                    denominator += score
                if WEIGH == 1:
                    score *= b_a
                    if BIAS:
                        score += b_b
                if WEIGH == 2:
                    m_r = m_n & (o_n >= shift)
                    score *= load_rows(p_a, i_b, i_h, back, N, n_heads, o_n, m_r, FLIP)
                    if BIAS:
                        score += load_rows(p_b, i_b, i_h, back, N, n_heads, o_n, m_r, FLIP)
                if shift == 0:
                    own = score[:, None] * s_v
                else:
                    others += score[:, None] * s_v
            rows = row_index(i_b, i_h, start, N, n_heads, o_n, FLIP)
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
                own *= inverse[:, None]
                if RESIDUAL:
                    if tl.program_id(1) == 0:
                        tl.store(p_inverse + rows, inverse, mask=m_n)
            write_output(
                p_o, p_residual, p_x, p_rate, others, own, rows, i_b, i_h // group_q, start, N, n_rows, o_e, m_e,
                stride_xb, stride_xh, stride_xn, r_x, E, X, MAP_X, RATE, RESIDUAL, FLIP, ALIGN,
            )  # fmt: skip
        if DECAY == 2:
            b_k *= to_state
            state *= kept[:, None]
            if NORM:
                tail = tail * kept + tl.sum(b_k, 0)
        else:
            b_v *= to_state
            state *= kept[None, :]
            if BIAS:
                b_w = b_v
                if WEIGH == 2:
                    b_w *= load_rows(p_b, i_b, i_h, start, N, n_heads, o_n, m_n, FLIP)[:, None]
                tail = tail * kept + tl.sum(b_w, 0)
        if WEIGH == 2:
            b_k *= load_rows(p_a, i_b, i_h, start, N, n_heads, o_n, m_n, FLIP)[:, None]
        exact_k: tl.constexpr = EXACT_K and WEIGH != 2 and DECAY != 2
        state += product(tl.trans(b_k), b_v, exact_k, EXACT_V and DECAY != 3, PARTS, dtype) + nothing(N)
    if SAVE:
        store_state(p_out, i_state, state, tail, o_d, o_e, D, E, TAIL)
        if not OUT:
            if DECAY == 2:
                if tl.program_id(1) == 0:
                    tl.store(p_total + i_state.to(tl.int64) * D + o_g, all_g, mask=m_c)
            else:
                tl.store(p_total + i_state.to(tl.int64) * E + o_g, all_g, mask=m_c)
