"""The walk over tokens with no decay or one number a token: a tile of BN tokens at a time, the state in registers.

With `triton_tiles.py`'s names, for the tokens of one tile, G_n the sum of g up to n and G that of the whole tile:

o_n = exp(G_n) q_n S + sum_(m <= n) exp(G_n - G_m) (q_n . k_m) v_m,   S <- exp(G) S + sum_m exp(G - G_m) k_m v_m^T

Bytes: q, k and v are read and o is written once, the least possible, where heads and samples fill the device. Where
they do not, tokens are cut in segments whose states come first, which reads k and v twice.

Both ways: with L_n the sum of g up to n from the other end, and S' the state of all later tiles, that is

o_n = exp(G_n) q_n S + exp(L_n) q_n S' + sum_m exp(min(G_n - G_m, L_n - L_m)) (q_n . k_m) v_m

of which exactly the wrong difference is above 0, and at m = n none. A walk back over k and v alone writes S' for each
tile, once for all query heads of a head of k and v; then a walk forth reads it with the tile. In bfloat16 the states
take D / BN of the bytes of v, so twice as many bytes are moved as one way, with D = BN.
"""

import triton
import triton.language as tl

from diffattn.kernels.causal_linear_attention.triton_tiles import (
    COUNTS,
    load_mapped,
    load_rows,
    load_state,
    load_sums,
    product,
    row_index,
    store_state,
    tile_offsets,
    walk_program,
    weight,
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
    p_tiles,
    p_tails,
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
    WAYS: tl.constexpr,
    STRICT: tl.constexpr,
    NORM: tl.constexpr,
    WEIGH: tl.constexpr,
    BIAS: tl.constexpr,
    RATE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    OUT: tl.constexpr,
    INIT: tl.constexpr,
    SAVE: tl.constexpr,
    TILES: tl.constexpr,
    ALIGN: tl.constexpr,
    PARTS: tl.constexpr,
    ROUND: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One head of one sample over `segment` tokens: OUT writes outputs, SAVE the state after them.

    WAYS: 0, from the first token to the last; 1, from the last to the first; 2, the first, with what the second would
    give on top: with OUT, the second is STRICT, and its states before the tiles are in p_tiles and p_tails; else its
    states after segments are written as well, past all of the first. TILES: write the state before each tile there,
    in the dtype that products read it in, and what follows it in float32.

    INIT: the walk starts from the state in p_in. `block` is 1 here. p_g: what `causal_linear_attention_sums_kernel`
    wrote; stride_gn is the distance from high to low parts, stride_gd that from one way to the other where both are.
    ROUND: operands of products are rounded to the dtype of the data where they are not exact, as the output will be.
    """
    dtype: tl.constexpr = p_q.dtype.element_ty
    ALL: tl.constexpr = tl.PropagateNan.ALL
    EXACT_Q: tl.constexpr = MAP_Q != "elu1"
    EXACT_K: tl.constexpr = MAP_K != "elu1"
    EXACT_V: tl.constexpr = MAP_V != "elu1"
    TAIL: tl.constexpr = 1 if NORM else (2 if BIAS else 0)
    RAW: tl.constexpr = ROUND and not NORM
    i_b, i_h, i_s = walk_program(tl.program_id(0), n_heads, n_segments)
    n_heads_all = tl.num_programs(0) // n_segments
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    o_e = tl.program_id(1) * BE + tl.arange(0, BE)
    # states are those of heads of k and v
    i_head = (i_b * n_heads + i_h) // group_k
    i_state = (i_head * n_segments + i_s).to(tl.int64)
    state, tail = load_state(p_in, i_state, o_d, o_e, D, E, INIT, TAIL)
    if WAYS == 2:
        # of the other way, where only states are asked for
        state_back, tail_back, passed = state, tail, 1.0
    n_rows = n_heads_all.to(tl.int64) * N
    r_q = tile_offsets(o_n, o_d, stride_qn, stride_qd, D, False, ALIGN)
    r_k = tile_offsets(o_n, o_d, stride_kn, stride_kd, D, False, ALIGN)
    r_v = tile_offsets(o_n, o_e, stride_vn, stride_vd, E, False, ALIGN)
    r_x = tile_offsets(o_n, o_e, stride_xn, stride_xd, E, False, ALIGN)
    if DECAY:
        all_g = 0.0
        p_g += i_b.to(tl.int64) * stride_gb + (i_h // group_g).to(tl.int64) * stride_gh
        if WAYS == 1:
            p_g += stride_gd
    # how many tokens a token comes after another one, on this way
    after = (o_n[:, None] - o_n[None, :]) * (-1 if WAYS == 1 else 1)
    seen = after > 0 if STRICT or RATE else after >= 0
    # tiles of this program, [low, high)
    low_tile = (n_segments - 1 - i_s if WAYS == 1 else i_s) * (segment // BN)
    high_tile = tl.minimum(low_tile + segment // BN, tl.cdiv(N, BN))
    for i_tile in tl.range(low_tile, high_tile, num_stages=STAGES):
        tile = low_tile + high_tile - 1 - i_tile if WAYS == 1 else i_tile
        start = tile * BN
        m_n = o_n < N - start
        m_d = m_n[:, None] & (o_d < D)[None, :]
        m_e = m_n[:, None] & (o_e < E)[None, :]
        b_k = load_mapped(
            p_k, i_b, i_h // group_k, start, N, stride_kb, stride_kh, stride_kn, r_k, m_d, MAP_K, False, ALIGN, RAW
        )
        b_v = load_mapped(
            p_v, i_b, i_h // group_k, start, N, stride_vb, stride_vh, stride_vn, r_v, m_e, MAP_V, False, ALIGN, ROUND
        )
        if DECAY:
            p_sums = p_g + tile * (BN + 1)
            high, low = load_sums(p_sums + o_n, stride_gn, ROUND)
            total_high, total_low = load_sums(p_sums + BN, stride_gn, ROUND)
            if WAYS == 2:
                back_high, back_low = load_sums(p_sums + stride_gd + o_n, stride_gn, ROUND)
            kept = weight(total_high + total_low, ROUND)
            to_state = weight((total_high - high) + (total_low - low), ROUND)
            all_g += total_high + total_low
        if WEIGH:
            b_a = load_rows(p_a, i_b, i_h, start, N, n_heads, o_n, m_n, False)
        if BIAS:
            b_b = load_rows(p_b, i_b, i_h, start, N, n_heads, o_n, m_n, False)
        i_tile_state = i_head.to(tl.int64) * tl.cdiv(N, BN) + tile
        if TILES:
            store_tile(p_tiles, p_tails, i_tile_state, state, tail, o_d, o_e, D, E, TAIL)
        if OUT:
            b_q = load_mapped(
                p_q, i_b, i_h // group_q, start, N, stride_qb, stride_qh, stride_qn, r_q, m_d, MAP_Q, False, ALIGN, RAW
            )
            scores = product(b_q, tl.trans(b_k), EXACT_Q, EXACT_K, PARTS, dtype)  # [BN, BN]
            if DECAY:
                from_state = high + low
            if WAYS == 2:
                later, tail_later = load_tile_state(p_tiles, p_tails, i_tile_state, o_d, o_e, D, E, TAIL)
                others = product(b_q, later, EXACT_Q, ROUND, PARTS, dtype)
                if DECAY:
                    # of both states in one sum: what only e^-60 or 2^-60 would be left of may count that much
                    more = (back_high - high) + (back_low - low)
                    others *= weight(tl.minimum(more, 60.0, ALL), ROUND)[:, None]
                    from_state = tl.maximum(from_state, back_high + back_low - 60.0, ALL)
                others = product(b_q, state, EXACT_Q, ROUND, PARTS, dtype, others)
            else:
                others = product(b_q, state, EXACT_Q, ROUND, PARTS, dtype)  # [BN, BE]
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
                own = None
            if DECAY:
                others *= weight(from_state, ROUND)[:, None]
                pairs = high[:, None] - high[None, :]
                if not ROUND:
                    pairs += low[:, None] - low[None, :]
                if WAYS == 2:
                    pairs_back = back_high[:, None] - back_high[None, :]
                    if not ROUND:
                        pairs_back += back_low[:, None] - back_low[None, :]
                    pairs = tl.minimum(pairs, pairs_back, ALL)
                scores *= weight(pairs, ROUND)
            if WAYS != 2:
                scores = tl.where(seen, scores, 0.0)
            if NORM:
                denominator = tl.sum(b_q * tail[None, :], 1)
                if WAYS == 2:
                    denominator_back = tl.sum(b_q * tail_later[None, :], 1)
                    if DECAY:
                        denominator_back *= weight(tl.minimum(more, 60.0, ALL), ROUND)
                    denominator += denominator_back
                if DECAY:
                    denominator *= weight(from_state, ROUND)
                denominator += tl.sum(scores, 1)
            others = product(scores, b_v, ROUND, EXACT_V, PARTS, dtype, others)
            rows = row_index(i_b, i_h, start, N, n_heads, o_n, False)
            if NORM:
                inverse = 1.0 / (denominator + eps)
                others *= inverse[:, None]
                if RESIDUAL:
                    if tl.program_id(1) == 0:
                        tl.store(p_inverse + rows, inverse, mask=m_n)
            write_output(
                p_o, p_residual, p_x, p_rate, others, own, rows, i_b, i_h // group_q, start, N, n_rows, o_e, m_e,
                stride_xb, stride_xh, stride_xn, r_x, E, X, MAP_X, RATE, RESIDUAL, False, ALIGN,
            )  # fmt: skip
        if WAYS == 2 and DECAY and not OUT:
            b_w = passed * weight((total_high - back_high) + (total_low - back_low), ROUND)
            state_back = product(
                tl.trans(b_k * b_w[:, None]), b_v, False, EXACT_V, PARTS, dtype, state_back
            ) + nothing(N)
            if NORM:
                tail_back += tl.sum(b_k * b_w[:, None], 0)
            passed *= kept
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
            state = product(tl.trans(b_k * b_w[:, None]), b_v, False, EXACT_V, PARTS, dtype, state) + nothing(N)
        else:
            state = product(tl.trans(b_k), b_v, EXACT_K, EXACT_V, PARTS, dtype, state) + nothing(N)
    if SAVE:
        store_state(p_out, i_state, state, tail, o_d, o_e, D, E, TAIL)
        if DECAY and not OUT:
            store_total(p_total, i_state, all_g, ROUND)
        if WAYS == 2:
            # segments, too, are in the order of the walk
            i_state = (n_heads_all // group_k + i_head + 1).to(tl.int64) * n_segments - 1 - i_s
            if DECAY:
                store_state(p_out, i_state, state_back, tail_back, o_d, o_e, D, E, TAIL)
                store_total(p_total, i_state, all_g, ROUND)
            else:
                store_state(p_out, i_state, state, tail, o_d, o_e, D, E, TAIL)


@triton.jit
def store_total(p_total, i_state, g, BASE_2: tl.constexpr):
    if tl.program_id(1) == 0:
        tl.store(p_total + i_state, g * 0.6931471805599453 if BASE_2 else g)


@triton.jit
def store_tile(p_tiles, p_tails, i_tile, state, tail, o_d, o_e, D: tl.constexpr, E: tl.constexpr, TAIL: tl.constexpr):
    p_tiles += i_tile * (D * E) + o_d[:, None] * E + o_e[None, :]
    tl.store(p_tiles, state.to(p_tiles.dtype.element_ty), mask=(o_d < D)[:, None] & (o_e < E)[None, :])
    if TAIL == 1:
        if tl.program_id(1) == 0:
            tl.store(p_tails + i_tile * D + o_d, tail, mask=o_d < D)


@triton.jit
def load_tile_state(p_tiles, p_tails, i_tile, o_d, o_e, D: tl.constexpr, E: tl.constexpr, TAIL: tl.constexpr):
    p_tiles += i_tile * (D * E) + o_d[:, None] * E + o_e[None, :]
    state = tl.load(p_tiles, mask=(o_d < D)[:, None] & (o_e < E)[None, :], other=0.0)
    tail = 0.0
    if TAIL == 1:
        tail = tl.load(p_tails + i_tile * D + o_d, mask=o_d < D, other=0.0)
    return state, tail
