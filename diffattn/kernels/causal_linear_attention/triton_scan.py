"""Small kernels: the states before segments from those of segments, few tokens one by one, a quotient's gradient."""

import triton
import triton.language as tl

from diffattn.kernels.causal_linear_attention.triton_tiles import limit_decay
from diffattn.kernels.linear_attention.triton_tiles import map_elements


@triton.jit(do_not_specialize=["n_segments"])
def causal_linear_attention_scan_kernel(
    p_parts,
    p_total,
    p_in,
    p_out,
    n_segments,
    D: tl.constexpr,
    E: tl.constexpr,
    SIZE: tl.constexpr,
    DECAY: tl.constexpr,
    INIT: tl.constexpr,
    SAVE: tl.constexpr,
    BX: tl.constexpr,
):
    """Replace what each segment adds to the state by the state before it, and write the last one to p_out.

    p_total holds the sums of g: a number a segment (DECAY 1), or one for each key (2) or value feature (3).
    """
    i_head = tl.program_id(0).to(tl.int64)
    o_x = tl.program_id(1) * BX + tl.arange(0, BX)
    m_x = o_x < SIZE
    if DECAY == 2:
        o_g = tl.where(o_x < D * E, o_x // E, o_x - D * E)
    elif DECAY == 3:
        o_g = tl.where(o_x < D * E, o_x % E, o_x - D * E)
    else:
        o_g = o_x * 0
    N_G: tl.constexpr = D if DECAY == 2 else (E if DECAY == 3 else 1)
    state = tl.zeros((BX,), tl.float32)
    if INIT:
        state = tl.load(p_in + i_head * SIZE + o_x, mask=m_x, other=0.0)
    for i_s in range(n_segments):
        i_part = i_head * n_segments + i_s
        part = tl.load(p_parts + i_part * SIZE + o_x, mask=m_x, other=0.0)
        tl.store(p_parts + i_part * SIZE + o_x, state, mask=m_x)
        if DECAY:
            state *= tl.exp(tl.load(p_total + i_part * N_G + o_g, mask=m_x, other=0.0))
        state += part
    if SAVE:
        tl.store(p_out + i_head * SIZE + o_x, state, mask=m_x)


@triton.jit
def store_sums(p_sums, g, between, BN: tl.constexpr, WAYS: tl.constexpr, POST: tl.constexpr):
    total = tl.sum(g, 0)
    forth = tl.cumsum(g, 0)
    if WAYS != 1:
        tl.store(p_sums + tl.arange(0, BN), forth - g if POST else forth)
        tl.store(p_sums + BN, total)
    if WAYS:
        p_sums += between * (WAYS - 1)
        back = total - forth
        tl.store(p_sums + tl.arange(0, BN), back if POST else back + g)
        tl.store(p_sums + BN, total)


@triton.jit(do_not_specialize=["N", "n_heads"])
def causal_linear_attention_sums_kernel(
    p_g,
    p_sums,
    stride_b,
    stride_n,
    stride_h,
    N,
    n_heads,
    BN: tl.constexpr,
    WAYS: tl.constexpr,
    POST: tl.constexpr,
    ROUND: tl.constexpr,
):
    """Sums of g up to each token of a tile (with POST, up to the one before), then that of the whole tile: BN + 1
    numbers a tile, of high parts and, a plane of the tensor later, of low parts.

    WAYS: 0, from the first token on; 1, from the last on; 2, the one and, after it in memory, the other.
    ROUND: one part, in units of log2: within a tile float32 tells weights apart to 1e-4, bfloat16 to 4e-3.
    """
    # One axis of programs: a grid's second one ends at 65535, which samples times heads may pass.
    n_tiles = tl.cdiv(N, BN)
    i_tile, i_bh = tl.program_id(0) % n_tiles, tl.program_id(0) // n_tiles
    i_b, i_h = i_bh // n_heads, i_bh % n_heads
    o_n = i_tile * BN + tl.arange(0, BN)
    p_g += i_b.to(tl.int64) * stride_b + i_h.to(tl.int64) * stride_h
    b_g = limit_decay(tl.load(p_g + o_n.to(tl.int64) * stride_n, mask=o_n < N, other=0.0))
    plane = tl.num_programs(0).to(tl.int64) * (BN + 1)
    p_sums += tl.program_id(0).to(tl.int64) * (BN + 1)
    if ROUND:
        store_sums(p_sums, b_g * 1.4426950408889634, plane, BN, WAYS, POST)
    else:
        high = tl.floor(b_g * 1024.0) * 0.0009765625
        store_sums(p_sums, high, 2 * plane, BN, WAYS, POST)
        store_sums(p_sums + plane, b_g - high, 2 * plane, BN, WAYS, POST)


@triton.jit
def add_token(state, z, b_k, b_v):
    return state + b_k[:, None] * b_v[None, :], z + b_k


@triton.jit
def write_token(p_o, offsets, mask, state, z, b_q, eps, NORM: tl.constexpr):
    o = tl.sum(b_q[:, None] * state, 0)
    if NORM:
        o /= tl.sum(b_q * z, 0) + eps
    tl.store(p_o + offsets, o.to(p_o.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["steps", "block", "n_heads", "group"])
def causal_linear_attention_recurrent_kernel(
    p_q,
    p_k,
    p_v,
    p_g,
    p_in,
    p_out,
    p_o,
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
    stride_gb,
    stride_gn,
    stride_gh,
    stride_gd,
    steps,
    block,
    n_heads,
    group,
    eps,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    MAP: tl.constexpr,
    DECAY: tl.constexpr,
    NORM: tl.constexpr,
    INIT: tl.constexpr,
    SAVE: tl.constexpr,
    ONE: tl.constexpr,
):
    """The recurrence as written, one token after the other, for one key/value head and its `group` query heads.

    A program owns columns of S, so p_in and p_out may be the same; with NORM it owns all of them, and z.
    DECAY: 1 a number a step, 2 one for each key feature. ONE: block and group are 1. `n_heads` counts key/value heads.
    """
    i_b, i_h = tl.program_id(0) // n_heads, tl.program_id(0) % n_heads
    o_d = tl.arange(0, BD)
    o_e = tl.program_id(1) * BE + tl.arange(0, BE)
    m_d, m_e = o_d < D, o_e < E
    m_s = m_d[:, None] & m_e[None, :]
    PAD: tl.constexpr = float("-inf") if MAP == "elu1" else 0.0
    SIZE: tl.constexpr = D * E + (D if NORM else 0)
    r_state = tl.program_id(0).to(tl.int64) * SIZE + o_d[:, None] * E + o_e[None, :]
    r_z = tl.program_id(0).to(tl.int64) * SIZE + D * E + o_d
    state, z = tl.zeros((BD, BE), tl.float32), tl.zeros((BD,), tl.float32)
    if INIT:
        state = tl.load(p_in + r_state, mask=m_s, other=0.0)
        if NORM:
            z = tl.load(p_in + r_z, mask=m_d, other=0.0)
    p_q += i_b.to(tl.int64) * stride_qb
    p_k += i_b.to(tl.int64) * stride_kb + i_h.to(tl.int64) * stride_kh
    p_v += i_b.to(tl.int64) * stride_vb + i_h.to(tl.int64) * stride_vh
    p_g += i_b.to(tl.int64) * stride_gb + i_h.to(tl.int64) * stride_gh
    for i_t in range(steps):
        step = tl.cast(i_t, tl.int64)
        if ONE:
            # everything a token needs is under way before the state is waited for: a step is nothing but latency
            row = (i_b.to(tl.int64) * steps + step) * n_heads + i_h
            b_k = map_elements(tl.load(p_k + step * stride_kn + o_d * stride_kd, mask=m_d, other=PAD), MAP)
            b_v = tl.load(p_v + step * stride_vn + o_e * stride_vd, mask=m_e, other=0.0).to(tl.float32)
            b_q = tl.load(p_q + step * stride_qn + i_h.to(tl.int64) * stride_qh + o_d * stride_qd, mask=m_d, other=PAD)
            b_q = map_elements(b_q, MAP)
        if DECAY == 1:
            kept = tl.exp(limit_decay(tl.load(p_g + step * stride_gn)))
            state, z = state * kept, z * kept
        if DECAY == 2:
            b_g = tl.load(p_g + step * stride_gn + o_d * stride_gd, mask=m_d, other=0.0)
            kept = tl.exp(limit_decay(b_g))
            state, z = state * kept[:, None], z * kept
        if ONE:
            state, z = add_token(state, z, b_k, b_v)
            write_token(p_o, row * E + o_e, m_e, state, z, b_q, eps, NORM)
        else:
            for i_m in range(block):
                token = step * block + i_m
                b_k = map_elements(tl.load(p_k + token * stride_kn + o_d * stride_kd, mask=m_d, other=PAD), MAP)
                b_v = tl.load(p_v + token * stride_vn + o_e * stride_vd, mask=m_e, other=0.0).to(tl.float32)
                state, z = add_token(state, z, b_k, b_v)
            for i_m in range(block):
                token = step * block + i_m
                for i_g in range(group):
                    head = (i_h * group + i_g).to(tl.int64)
                    b_q = tl.load(p_q + token * stride_qn + head * stride_qh + o_d * stride_qd, mask=m_d, other=PAD)
                    row = (i_b.to(tl.int64) * steps * block + token) * n_heads * group + head
                    write_token(p_o, row * E + o_e, m_e, state, z, map_elements(b_q, MAP), eps, NORM)
    if SAVE:
        tl.store(p_out + r_state, state, mask=m_s)
        if NORM:
            tl.store(p_out + r_z, z, mask=m_d)


@triton.jit(do_not_specialize=["N", "n_heads"])
def causal_linear_attention_quotient_kernel(
    p_grad,
    p_o,
    p_residual,
    p_inverse,
    p_b,
    stride_gb,
    stride_gn,
    stride_gh,
    stride_ge,
    N,
    n_heads,
    E: tl.constexpr,
    BE: tl.constexpr,
    BN: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """The gradient of the denominator, -(g_n . o_n) / d_n. o comes in two parts: rounded, it would be off by more than
    what is left where this nearly cancels with the numerator's gradient."""
    n_tiles = tl.cdiv(N, BN)
    i_tile, i_bh = tl.program_id(0) % n_tiles, tl.program_id(0) // n_tiles
    i_b, i_h = i_bh // n_heads, i_bh % n_heads
    o_n = i_tile * BN + tl.arange(0, BN)
    o_e = tl.arange(0, BE)
    m_n = o_n < N
    m = m_n[:, None] & (o_e < E)[None, :]
    rows = (i_b.to(tl.int64) * N + o_n) * n_heads + i_h
    p_grad += i_b.to(tl.int64) * stride_gb + i_h.to(tl.int64) * stride_gh
    grad = tl.load(p_grad + o_n.to(tl.int64)[:, None] * stride_gn + o_e[None, :] * stride_ge, mask=m, other=0.0)
    o = tl.load(p_o + rows[:, None] * E + o_e[None, :], mask=m, other=0.0).to(tl.float32)
    if RESIDUAL == 2:
        o += tl.load(p_residual + rows[:, None] * E + o_e[None, :], mask=m, other=0.0).to(tl.float32)
    inverse = tl.load(p_inverse + rows, mask=m_n, other=0.0)
    tl.store(p_b + rows, -tl.sum(grad.to(tl.float32) * o, 1) * inverse, mask=m_n)
