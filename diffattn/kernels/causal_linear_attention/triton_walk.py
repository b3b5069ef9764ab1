"""The walk over tokens with no decay or one number a token: a tile of BN tokens at a time, the state in registers.

With `triton_tiles.py`'s names, for the tokens of one tile, G_n the sum of g up to n and G that of the whole tile:

o_n = exp(G_n) q_n S + sum_(m <= n) exp(G_n - G_m) (q_n . k_m) v_m,   S <- exp(G) S + sum_m exp(G - G_m) k_m v_m^T

Bytes: q, k and v are read and o is written once, the least possible, where heads and samples fill the device. Where
they do not, tokens are cut in segments whose states come first, which reads k and v twice.
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
    row_offsets,
    store_state,
    sum_decay,
    tile_offsets,
    token_at,
    walk_program,
    write_output,
)
from diffattn.kernels.linear_attention.triton_tiles import nothing


@triton.jit(do_not_specialize=COUNTS)
def causal_linear_attention_walk_kernel(
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
    i_b, i_h, i_s = walk_program(n_heads, n_segments)
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
    if DECAY:
        all_g = 0.0
        p_g += i_b.to(tl.int64) * stride_gb + (i_h // group_g).to(tl.int64) * stride_gh
        r_g = row_offsets(o_n, stride_gn, FLIP, 1)
    first = i_s * segment
    last = tl.minimum(first + segment, N)
    for start in tl.range(first, last, BN, num_stages=STAGES):
        m_n = o_n < last - start
        m_d = m_n[:, None] & (o_d < D)[None, :]
        m_e = m_n[:, None] & (o_e < E)[None, :]
        b_k = load_mapped(
            p_k, i_b, i_h // group_k, start, N, stride_kb, stride_kh, stride_kn, r_k, m_d, MAP_K, FLIP, ALIGN
        )
        b_v = load_mapped(
            p_v, i_b, i_h // group_k, start, N, stride_vb, stride_vh, stride_vn, r_v, m_e, MAP_V, FLIP, ALIGN
        )
        if DECAY:
            b_g = p_g + tl.cast(token_at(start, N, FLIP), tl.int64) * stride_gn
            b_g = limit_decay(tl.load(b_g + r_g, mask=m_n, other=0.0))
            high, low, total_high, total_low = sum_decay(b_g, POST)
            kept = tl.exp(total_high + total_low)
            to_state = tl.exp((total_high - high) + (total_low - low))
            all_g += total_high + total_low
        if WEIGH:
            b_a = load_rows(p_a, i_b, i_h, start, N, n_heads, o_n, m_n, FLIP)
        if BIAS:
            b_b = load_rows(p_b, i_b, i_h, start, N, n_heads, o_n, m_n, FLIP)
        if OUT:
            b_q = load_mapped(
                p_q, i_b, i_h // group_q, start, N, stride_qb, stride_qh, stride_qn, r_q, m_d, MAP_Q, FLIP, ALIGN
            )
            scores = product(b_q, tl.trans(b_k), EXACT_Q, EXACT_K, PARTS, dtype)  # [BN, BN]
            others = product(b_q, state, EXACT_Q, False, PARTS, dtype)  # [BN, BE]
            if WEIGH == 1:
                scores *= b_a[:, None]
                others *= b_a[:, None]
                if BIAS:
                    scores += b_b[:, None]
                    others += b_b[:, None] * tail[None, :]
            if WEIGH == 2:
                scores *= b_a[None, :]
                if BIAS:
                    scores += b_b[None, :]
                    others += tail[None, :]
            if RATE and not STRICT:
                # kept apart: it does not decay, and would hide what does
                own = tl.sum(tl.where(o_n[:, None] == o_n[None, :], scores, 0.0), 1)[:, None] * b_v
            else:
                own = 0.0
            seen = o_n[:, None] > o_n[None, :] if STRICT or RATE else o_n[:, None] >= o_n[None, :]
            if DECAY:
                pairs = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
                scores *= tl.exp(tl.minimum(pairs, 0.0))
                others *= tl.exp(high + low)[:, None]
            scores = tl.where(seen, scores, 0.0)
            if NORM:
                denominator = tl.sum(b_q * tail[None, :], 1)
                if DECAY:
                    denominator *= tl.exp(high + low)
                denominator += tl.sum(scores, 1)
            others += product(scores, b_v, False, EXACT_V, PARTS, dtype)
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
                if RESIDUAL:
                    if tl.program_id(1) == 0:
                        tl.store(p_inverse + rows, inverse, mask=m_n)
            write_output(
                p_o, p_residual, p_x, p_rate, others, own, rows, i_b, i_h // group_q, start, N, n_rows, o_e, m_e,
                stride_xb, stride_xh, stride_xn, r_x, E, X, MAP_X, RATE, RESIDUAL, FLIP, ALIGN,
            )  # fmt: skip
        if DECAY:
            b_w = to_state
            state *= kept
            tail *= kept
        else:
            b_w = tl.full((BN,), 1.0, tl.float32)
        if NORM:
            tail += tl.sum(b_k * b_w[:, None], 0)
        if BIAS:
            tail += tl.sum(b_v * (b_w * b_b if WEIGH == 2 else b_w)[:, None], 0)
        if WEIGH == 2:
            b_w *= b_a
        if DECAY or WEIGH == 2:
            state += product(tl.trans(b_k * b_w[:, None]), b_v, False, EXACT_V, PARTS, dtype) + nothing(N)
        else:
            state += product(tl.trans(b_k), b_v, EXACT_K, EXACT_V, PARTS, dtype) + nothing(N)
    if SAVE:
        store_state(p_out, i_state, state, tail, o_d, o_e, D, E, TAIL)
        if DECAY and not OUT:
            if tl.program_id(1) == 0:
                tl.store(p_total + i_state, all_g)
