"""Forward kernels for heads of more than 64 features, and for rotated heads, but for "softmax".

Pieces. A head of 160 features is read as two tiles side by side, 128 + 64: padded to the next power of two, 5 of 8
parts of the arithmetic would be on padding. Along the values a state is cut among programs where it is too large.

Keys. S^T = v^T phi(k): the values are the left operand as they lie in shared memory, and phi(k) goes through it to be
the right one. It is computed in the layout in which it was loaded, in which pairs that rotate lie in one thread and a
sum over tokens needs no other thread before the end.

Queries are mapped and rotated in the layout of the product's left operand, where the pairs lie in one thread too.

bfloat16 and "elu1", not rotated. A key is two parts, relu(k), exact, and exp(min(k, 0)), rounded: the error is that of
one rounding where k < 0 and none elsewhere. A query is rounded once: numerator and denominator see the same one.
Together they change the error of o in bfloat16 from 1.66e-3 to 1.69e-3, at most 2e-3 where all keys are below -10.

bfloat16, rotated. A key is two parts. A query is rounded once: with random angles the error of o is 2.3e-3 instead of
1.66e-3, with a model's, where most pairs turn slowly, 1.7e-3 to 2.2e-3. A second part would be a third product, and
for 112 features the products, not the memory, would set the time.

Rotary tables. All heads read them: in float32 they are twice the bytes of k. For bfloat16 data they come as float16,
cos and sin side by side like the pairs they rotate, which adds 2e-5 to the error.
"""

import triton
import triton.language as tl

from diffattn.kernels.linear_attention.triton_tiles import (
    COUNTS,
    feature_offsets,
    load_tile,
    map_elements,
    nothing,
    program_part,
    rotate,
    split,
    store_tile,
    tile_start,
    token_offsets,
)


@triton.jit
def load_piece(
    p,
    o_n,
    m_n,
    stride_n,
    stride_d,
    FIRST: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    EDGE: tl.constexpr,
    PAD: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Features FIRST to FIRST + W of D, [tokens, W]."""
    o_d = FIRST + tl.arange(0, W)
    offsets = token_offsets(o_n, stride_n, ALIGN)[:, None] + feature_offsets(o_d, 0, stride_d, D, 1, ALIGN)[None, :]
    return load_tile(p, offsets, (o_d < D)[None, :], m_n[:, None], FIRST + W > D, EDGE, PAD)


@triton.jit
def load_turns(
    p, o_n, m_n, i_b, start, stride_b, FIRST: tl.constexpr, W: tl.constexpr, D: tl.constexpr, EDGE: tl.constexpr
):
    """cos and sin of a piece's pairs, side by side, [tokens, W]."""
    ALIGN: tl.constexpr = 16 if D % 16 == 0 else 8 if D % 8 == 0 else 2
    b_p = tile_start(p, i_b, i_b, start, stride_b, 0, D, ALIGN)
    return load_piece(b_p, o_n, m_n, D, 1, FIRST, W, D, EDGE, 0.0, ALIGN)


@triton.jit
def turn(x, turns):
    """Rotate the pairs of x."""
    cos, sin = tl.split(tl.reshape(turns.to(tl.float32), (x.shape[0], x.shape[1] // 2, 2)))
    return rotate(x, cos, sin)


@triton.jit
def dot_values(b_vt, x, acc, EXACT: tl.constexpr, PARTS: tl.constexpr):
    """acc + v^T x for x [BM, W] float32. EXACT: x has the bits of the data."""
    if EXACT:
        if PARTS == "tf32x3":
            acc = tl.dot(b_vt, x, acc, input_precision="tf32x3")
        else:
            acc = tl.dot(b_vt, x.to(b_vt.dtype), acc)
    elif PARTS == "tf32x3":
        acc = tl.dot(b_vt, x, acc, input_precision="tf32x3")
    else:
        high, low = split(x, PARTS)
        if PARTS == "tf32":
            b_vt = b_vt.to(tl.float32)
        acc = tl.dot(b_vt, high, acc, input_precision="tf32")
        acc = tl.dot(b_vt, low, acc, input_precision="tf32")
    return acc


@triton.jit
def add_keys(b_k, b_vt, turns, state, total, M, MAP: tl.constexpr, ROTARY: tl.constexpr, PARTS: tl.constexpr):
    """(state + v^T rot(phi(k)) [BE, W], total + phi(k) [BM, W])."""
    if MAP == "elu1" and PARTS == "bf16" and not ROTARY:
        x = b_k.to(tl.float32)
        above = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        below = tl.exp2(tl.minimum(x, 0.0) * 1.4426950408889634)
        total += above + below
        state = dot_values(b_vt, above, state, True, PARTS)
        state = dot_values(b_vt, below, state, True, PARTS)
    else:
        mapped = map_elements(b_k, MAP)
        total += mapped
        if ROTARY:
            mapped = turn(mapped, turns)
        state = dot_values(b_vt, mapped, state, MAP != "elu1" and not ROTARY, PARTS)
    if b_vt.dtype != tl.bfloat16:
        # float16 and float32 values may be products' left operands from registers, see triton_tiles.py
        state += nothing(M)
    return state, total


@triton.jit
def store_state(p_part, state, total, o_e, FIRST: tl.constexpr, W: tl.constexpr, D: tl.constexpr, E: tl.constexpr):
    o_d = FIRST + tl.arange(0, W)
    m_d = o_d < D
    tl.store(p_part + o_d[None, :] * E + o_e[:, None], state, mask=m_d[None, :] & (o_e < E)[:, None])
    if tl.program_id(1) == 0:
        tl.store(p_part + D * E + o_d, tl.sum(total, 0), mask=m_d)


@triton.jit(do_not_specialize=COUNTS)
def linear_attention_pieces_state_fwd_kernel(
    p_k,
    p_v,
    p_turns,
    p_parts,
    stride_kb,
    stride_km,
    stride_kh,
    stride_kd,
    stride_vb,
    stride_vm,
    stride_vh,
    stride_ve,
    stride_tb,
    M,
    n_heads,
    n_chunks,
    chunk,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BD2: tl.constexpr,
    BE: tl.constexpr,
    BM: tl.constexpr,
    MAP: tl.constexpr,
    ROTARY: tl.constexpr,
    ALIGN: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """S and z over `chunk` blocks of keys of a head to parts (b, h, i_chunk): S (D x E), z (D)."""
    i_b, i_h, i_chunk, first, last = program_part(n_heads, n_chunks, chunk, tl.cdiv(M, BM), 1)
    PAD: tl.constexpr = float("-inf") if MAP == "elu1" else 0.0
    o_m = tl.arange(0, BM)
    o_e = tl.program_id(1) * BE + tl.arange(0, BE)
    r_v = token_offsets(o_m, stride_vm, ALIGN)[:, None]
    r_v = r_v + feature_offsets(o_e, stride_vh, stride_ve, E, 1, ALIGN)[None, :]
    state = tl.zeros((BE, BD), tl.float32)
    total = tl.zeros((BM, BD), tl.float32)
    if BD2 > 0:
        state_2 = tl.zeros((BE, BD2), tl.float32)
        total_2 = tl.zeros((BM, BD2), tl.float32)
    # whole blocks without row masks, then the one that may reach past the end
    whole = tl.maximum(tl.minimum(last, M // BM), first)
    for EDGE in tl.static_range(2):
        for i_block in tl.range(whole if EDGE else first, last if EDGE else whole, num_stages=1 if EDGE else STAGES):
            start = i_block * BM
            m_m = o_m < M - start
            b_pk = tile_start(p_k, i_b, i_h, start, stride_kb, stride_kh, stride_km, ALIGN)
            b_pv = tile_start(p_v, i_b, i_h, start, stride_vb, stride_vh, stride_vm, ALIGN)
            b_vt = tl.trans(load_tile(b_pv, r_v, (o_e < E)[None, :], m_m[:, None], E % BE != 0, EDGE, 0.0))
            b_k = load_piece(b_pk, o_m, m_m, stride_km, stride_kd, 0, BD, D, EDGE, PAD, ALIGN)
            turns = b_k
            if ROTARY:
                turns = load_turns(p_turns, o_m, m_m, i_b, start, stride_tb, 0, BD, D, EDGE)
            state, total = add_keys(b_k, b_vt, turns, state, total, M, MAP, ROTARY, PARTS)
            if BD2 > 0:
                b_k = load_piece(b_pk, o_m, m_m, stride_km, stride_kd, BD, BD2, D, EDGE, PAD, ALIGN)
                turns = b_k
                if ROTARY:
                    turns = load_turns(p_turns, o_m, m_m, i_b, start, stride_tb, BD, BD2, D, EDGE)
                state_2, total_2 = add_keys(b_k, b_vt, turns, state_2, total_2, M, MAP, ROTARY, PARTS)
    p_part = p_parts + ((i_b * n_heads + i_h).to(tl.int64) * n_chunks + i_chunk) * (D * E + D)
    store_state(p_part, state, total, o_e, 0, BD, D, E)
    if BD2 > 0:
        store_state(p_part, state_2, total_2, o_e, BD, BD2, D, E)


@triton.jit
def load_state(
    p_state,
    FIRST_D: tl.constexpr,
    WD: tl.constexpr,
    first_e,
    WE: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The parts of S for a piece of q and a piece of o."""
    o_d = FIRST_D + tl.arange(0, WD)
    o_e = first_e + tl.arange(0, WE)
    mask = (o_d < D)[:, None] & (o_e < E)[None, :]
    return split(tl.load(p_state + o_d[:, None] * E + o_e[None, :], mask=mask, other=0.0), PARTS)


@triton.jit
def load_normalizer(
    p_z, FIRST: tl.constexpr, W: tl.constexpr, D: tl.constexpr, ROTARY: tl.constexpr, PARTS: tl.constexpr
):
    """What `add_denominator` takes: the parts of z in each of 16 columns, or z itself."""
    o_d = FIRST + tl.arange(0, W)
    z = tl.load(p_z + o_d, mask=o_d < D, other=0.0)
    if ROTARY:
        high = z
        low = z
    else:
        high, low = split(tl.broadcast_to(z[:, None], (W, 16)), PARTS)
    return high, low


@triton.jit
def dot_piece(x, high, low, acc, EXACT: tl.constexpr, PARTS: tl.constexpr):
    """acc + x (high + low) for x [BN, W] float32. EXACT: x has the bits of the data, or may be rounded to them."""
    if PARTS == "tf32x3":
        acc = tl.dot(x, high, acc, input_precision="tf32x3")
    elif PARTS == "tf32x1":
        x, _ = split(x, PARTS)
        acc = tl.dot(x, high, acc, input_precision="tf32")
    elif EXACT:
        x = x.to(high.dtype)
        acc = tl.dot(x, high, acc, input_precision="tf32")
        acc = tl.dot(x, low, acc, input_precision="tf32")
    else:
        x_high, x_low = split(x, PARTS)
        acc = tl.dot(x_high, high, acc, input_precision="tf32")
        acc = tl.dot(x_high, low, acc, input_precision="tf32")
        acc = tl.dot(x_low, high, acc, input_precision="tf32")
    return acc


@triton.jit
def add_denominator(x, z_high, z_low, acc, ROTARY: tl.constexpr, EXACT: tl.constexpr, PARTS: tl.constexpr):
    """acc + phi(q) . z: [BN], or as a product [BN, 16], in each column the whole."""
    if ROTARY:
        # as a product it would have another left operand than the numerator
        acc += tl.sum(x * z_high[None, :], 1)
    else:
        acc = dot_piece(x, z_high, z_low, acc, EXACT, PARTS)
    return acc


@triton.jit(do_not_specialize=[*COUNTS, "group"])
def linear_attention_pieces_output_fwd_kernel(
    p_q,
    p_turns,
    p_state,
    p_o,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_qd,
    stride_tb,
    N,
    n_heads,
    n_chunks,
    chunk,
    group,
    eps,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BD2: tl.constexpr,
    BE: tl.constexpr,
    BN: tl.constexpr,
    MAP: tl.constexpr,
    ROTARY: tl.constexpr,
    ALIGN: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """o_n = (rot(phi(q_n)) S) / (phi(q_n) . z + eps) for `chunk` blocks of queries of a head."""
    i_b, i_h, _, first, last = program_part(n_heads, n_chunks, chunk, tl.cdiv(N, BN), 1)
    # relu(q) and q have the bits of the data; elu1 of bfloat16 is rounded to them
    ROUND: tl.constexpr = MAP != "elu1" or PARTS == "bf16"
    EXACT: tl.constexpr = (ROUND and not ROTARY) or PARTS == "bf16"
    p_state += ((i_b * n_heads + i_h) // group).to(tl.int64) * (D * E + D)
    first_e = tl.program_id(1) * BE
    high, low = load_state(p_state, 0, BD, first_e, BE, D, E, PARTS)
    z_high, z_low = load_normalizer(p_state + D * E, 0, BD, D, ROTARY, PARTS)
    if BD2 > 0:
        high_2, low_2 = load_state(p_state, BD, BD2, first_e, BE, D, E, PARTS)
        z_high_2, z_low_2 = load_normalizer(p_state + D * E, BD, BD2, D, ROTARY, PARTS)
    o_n = tl.arange(0, BN)
    o_e = first_e + tl.arange(0, BE)
    r_o = o_n.to(tl.int64)[:, None] * (n_heads * E)
    whole = tl.maximum(tl.minimum(last, N // BN), first)
    for EDGE in tl.static_range(2):
        for i_block in tl.range(whole if EDGE else first, last if EDGE else whole, num_stages=1 if EDGE else STAGES):
            start = i_block * BN
            m_n = o_n < N - start
            b_pq = tile_start(p_q, i_b, i_h, start, stride_qb, stride_qh, stride_qn, ALIGN)
            x = map_elements(load_piece(b_pq, o_n, m_n, stride_qn, stride_qd, 0, BD, D, EDGE, 0.0, ALIGN), MAP)
            if ROTARY:
                denominator = tl.zeros((BN,), tl.float32)
            else:
                denominator = tl.zeros((BN, 16), tl.float32)
            denominator = add_denominator(x, z_high, z_low, denominator, ROTARY, EXACT, PARTS)
            if ROTARY:
                x = turn(x, load_turns(p_turns, o_n, m_n, i_b, start, stride_tb, 0, BD, D, EDGE))
            b_o = dot_piece(x, high, low, tl.zeros((BN, BE), tl.float32), EXACT, PARTS)
            if BD2 > 0:
                x = map_elements(load_piece(b_pq, o_n, m_n, stride_qn, stride_qd, BD, BD2, D, EDGE, 0.0, ALIGN), MAP)
                denominator = add_denominator(x, z_high_2, z_low_2, denominator, ROTARY, EXACT, PARTS)
                if ROTARY:
                    x = turn(x, load_turns(p_turns, o_n, m_n, i_b, start, stride_tb, BD, BD2, D, EDGE))
                b_o = dot_piece(x, high_2, low_2, b_o, EXACT, PARTS)
            if ROTARY == 0:
                denominator = tl.sum(denominator, 1) * 0.0625
            inverse = (1.0 / (denominator + eps))[:, None]
            b_po = p_o + ((i_b.to(tl.int64) * N + start) * n_heads + i_h) * E
            m_e = (o_e < E)[None, :]
            store_tile(b_po, b_o * inverse, r_o + o_e[None, :], m_e, m_n[:, None], E % BE != 0, EDGE)
