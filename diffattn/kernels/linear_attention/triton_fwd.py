"""Forward kernels: the state of a stretch of keys, the sum over stretches, the output."""

import triton
import triton.language as tl

from diffattn.kernels.linear_attention.triton_tiles import (
    dot_state,
    dot_tokens,
    load_rotary,
    load_state,
    load_tile,
    map_elements,
    map_query,
    rotate,
    row_start,
    split_state,
    store_tile,
)

COUNTS = ["n_heads", "n_chunks", "chunk"]


@triton.jit(do_not_specialize=COUNTS)
def linear_attention_state_fwd_kernel(
    p_k,
    p_v,
    p_cos,
    p_sin,
    p_log_sum,
    p_parts,
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
    SUM: tl.constexpr,
    ONLINE: tl.constexpr,
    PART_SIZE: tl.constexpr,
):
    """S and z over `chunk` blocks of keys of one head, written to part (b, h, i_chunk): S (D x E), z (D).

    For "softmax" the keys are mapped by exp(k - log_sum), or if ONLINE by exp(k - max), and the maximum over the
    chunk (D) follows z.
    """
    i_p = tl.program_id(0)
    i_e = tl.program_id(1)
    # heads vary fastest: programs that run together read the same rows of memory
    i_h = i_p % n_heads
    i_chunk = (i_p // n_heads) % n_chunks
    i_b = i_p // n_heads // n_chunks
    o_m = tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    o_e = i_e * BE + tl.arange(0, BE)

    PAD: tl.constexpr = float("-inf") if MAP == "elu1" or MAP == "softmax" else 0.0
    state = tl.zeros((BD, BE), tl.float32)
    key_sum = tl.zeros((BM, BD), tl.float32)
    top = tl.full((BD,), float("-inf"), tl.float32)
    if MAP == "softmax" and not ONLINE:
        log_sum = tl.load(p_log_sum + (i_b * n_heads + i_h) * D + o_d, mask=o_d < D, other=float("inf"))
    for i_block in range(i_chunk * chunk, tl.minimum(i_chunk * chunk + chunk, tl.cdiv(M, BM))):
        start = i_block * BM
        b_k = row_start(p_k, i_b, i_h, start, stride_kb, stride_kh, stride_km, ALIGN)
        b_k = load_tile(b_k, o_m, o_d, stride_km, stride_kd, M - start, D, BD, PAD, ALIGN)
        b_v = row_start(p_v, i_b, i_h, start, stride_vb, stride_vh, stride_vm, ALIGN)
        b_v = load_tile(b_v, o_m, o_e, stride_vm, stride_ve, M - start, E, BE, 0.0, ALIGN)
        mapped = map_elements(b_k, MAP)  # [BM, BD]
        if MAP == "softmax" and not ONLINE:
            mapped = tl.exp(mapped - log_sum[None, :])
        if ONLINE:
            new_top = tl.maximum(top, tl.max(mapped, 0))
            safe = tl.where(new_top == float("-inf"), 0.0, new_top)
            mapped = tl.exp(mapped - safe[None, :])
            shrink = tl.exp(top - safe)
            top = new_top
            state *= shrink[:, None]
            key_sum *= shrink[None, :]
        key_sum += mapped
        if ROTARY:
            cos = load_rotary(p_cos, o_m, start, i_b, stride_cb, stride_cm, stride_cd, M - start, D, BD, ROTARY)
            sin = load_rotary(p_sin, o_m, start, i_b, stride_cb, stride_cm, stride_cd, M - start, D, BD, ROTARY)
            mapped = rotate(mapped, cos, sin)
        state = dot_tokens(mapped, b_v, state, EXACT, SUM)

    p_part = p_parts + ((i_b * n_heads + i_h).to(tl.int64) * n_chunks + i_chunk) * PART_SIZE
    store_tile(p_part, state, o_d, o_e, E, D, E, BE)
    if i_e == 0:
        tl.store(p_part + D * E + o_d, tl.sum(key_sum, 0), mask=o_d < D)
        if ONLINE:
            tl.store(p_part + D * E + D + o_d, top, mask=o_d < D)


@triton.jit(do_not_specialize=["n_parts"])
def linear_attention_reduce_kernel(
    p_parts,
    p_state,
    n_parts,
    D: tl.constexpr,
    E: tl.constexpr,
    SOFTMAX: tl.constexpr,
    SIZE: tl.constexpr,
    PART_SIZE: tl.constexpr,
    BP: tl.constexpr,
    BX: tl.constexpr,
):
    """Sum the parts of each head, SIZE numbers each, always in the same order.

    SOFTMAX: bring the parts to a common maximum, divide S by z and write log z in place of z (+inf where all
    keys are masked, so that exp(k - log z) is 0 there).
    """
    i_head = tl.program_id(0).to(tl.int64)
    o_x = tl.program_id(1) * BX + tl.arange(0, BX)
    o_p = tl.arange(0, BP)
    p_parts += i_head * n_parts * PART_SIZE
    if SOFTMAX:
        o_d = tl.where(o_x < D * E, o_x // E, o_x - D * E)
        top = tl.full((BP, BX), float("-inf"), tl.float32)
        for start in range(0, n_parts, BP):
            mask = (start + o_p[:, None] < n_parts) & (o_x[None, :] < SIZE)
            p_top = p_parts + (start + o_p[:, None]).to(tl.int64) * PART_SIZE + (D * E + D + o_d[None, :])
            top = tl.maximum(top, tl.load(p_top, mask=mask, other=float("-inf")))
        top = tl.max(top, 0)
        safe = tl.where(top == float("-inf"), 0.0, top)
        total = tl.zeros((BP, BX), tl.float32)
    acc = tl.zeros((BP, BX), tl.float32)
    for start in range(0, n_parts, BP):
        mask = (start + o_p[:, None] < n_parts) & (o_x[None, :] < SIZE)
        p_x = p_parts + (start + o_p[:, None]).to(tl.int64) * PART_SIZE + o_x[None, :]
        x = tl.load(p_x, mask=mask, other=0.0)
        if SOFTMAX:
            p_sum = p_parts + (start + o_p[:, None]).to(tl.int64) * PART_SIZE + (D * E + o_d[None, :])
            shrink = tl.exp(tl.load(p_sum + D, mask=mask, other=float("-inf")) - safe[None, :])
            total += shrink * tl.load(p_sum, mask=mask, other=0.0)
            x *= shrink
        acc += x
    out = tl.sum(acc, 0)
    if SOFTMAX:
        total = tl.sum(total, 0)
        divisor = tl.where(total == 0, 1.0, total)
        log_sum = tl.where(total == 0, float("inf"), safe + tl.log(divisor))
        out = tl.where(o_x < D * E, out / divisor, log_sum)
    tl.store(p_state + i_head * SIZE + o_x, out, mask=o_x < SIZE)


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
    MAP: tl.constexpr,
    ROTARY: tl.constexpr,
    ALIGN: tl.constexpr,
    EXACT: tl.constexpr,
    PARTS: tl.constexpr,
):
    """o_n = (rot(phi(q_n)) S) / (phi(q_n) . z + eps) for `chunk` blocks of queries of one head."""
    i_p = tl.program_id(0)
    i_h = i_p % n_heads
    i_chunk = (i_p // n_heads) % n_chunks
    i_b = i_p // n_heads // n_chunks
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    o_e = tl.program_id(1) * BE + tl.arange(0, BE)

    PAD: tl.constexpr = float("-inf") if MAP == "elu1" or MAP == "softmax" else 0.0
    p_state += ((i_b * n_heads + i_h) // group).to(tl.int64) * (D * E + D)
    high, low, undo_state = split_state(load_state(p_state, o_d, o_e, D, E), PARTS)
    normalizer = tl.load(p_state + D * E + o_d, mask=o_d < D, other=0.0)
    for i_block in range(i_chunk * chunk, tl.minimum(i_chunk * chunk + chunk, tl.cdiv(N, BN))):
        start = i_block * BN
        b_q = row_start(p_q, i_b, i_h, start, stride_qb, stride_qh, stride_qn, ALIGN)
        b_q = load_tile(b_q, o_n, o_d, stride_qn, stride_qd, N - start, D, BD, PAD, ALIGN)
        mapped = map_query(b_q, MAP)  # [BN, BD]
        if MAP == "softmax":
            denominator = tl.full((BN,), 1.0, tl.float32)
        else:
            denominator = tl.sum(mapped * normalizer[None, :], 1) + eps
        if ROTARY:
            cos = load_rotary(p_cos, o_n, start, i_b, stride_cb, stride_cn, stride_cd, N - start, D, BD, ROTARY)
            sin = load_rotary(p_sin, o_n, start, i_b, stride_cb, stride_cn, stride_cd, N - start, D, BD, ROTARY)
            mapped = rotate(mapped, cos, sin)
        b_o, undo = dot_state(mapped * undo_state[None, :], high, low, EXACT, PARTS)  # [BN, BE]
        b_o *= (undo / denominator)[:, None]
        out = ((i_b.to(tl.int64) * N + start) * n_heads + i_h) * E
        store_tile(p_o + out, b_o, o_n, o_e, n_heads * E, N - start, E, BE)
