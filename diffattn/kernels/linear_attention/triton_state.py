"""The state of a stretch of keys, S and z, and the sum over stretches."""

import triton
import triton.language as tl

from diffattn.kernels.linear_attention.triton_tiles import (
    COUNTS,
    dot_tokens,
    feature_offsets,
    load_rotary,
    load_tile,
    map_elements,
    nothing,
    program_part,
    rotate,
    state_offsets,
    tile_start,
    token_offsets,
)


@triton.jit
def sum_keys(
    p_k,
    p_v,
    p_cos,
    p_sin,
    log_sum,
    i_b,
    i_h,
    o_e,
    first,
    last,
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
    ONLINE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """(S [BD, BE], z [BD], maximum [BD]) of blocks `first` to `last` of the keys of PACK heads from i_h on."""
    # phi(k) has the bits of k
    RAW: tl.constexpr = MAP == "relu" or MAP is None
    PAD: tl.constexpr = float("-inf") if MAP == "elu1" or MAP == "softmax" else 0.0
    o_m = tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    m_d = o_d < D * PACK
    m_e = o_e < E * PACK
    PAD_D: tl.constexpr = D * PACK != BD
    PAD_E: tl.constexpr = E * PACK % BE != 0
    r_km = token_offsets(o_m, stride_km, ALIGN)
    r_kd = feature_offsets(o_d, stride_kh, stride_kd, D, PACK, ALIGN)
    r_v = token_offsets(o_m, stride_vm, ALIGN)[:, None]
    r_v = r_v + feature_offsets(o_e, stride_vh, stride_ve, E, PACK, ALIGN)[None, :]
    state = tl.zeros((BD, o_e.shape[0]), tl.float32)
    if ROTARY:
        total = tl.zeros((BM, BD), tl.float32)
    else:
        # z 16 times: as a product with ones it needs no second copy of phi(k) in another layout
        total = tl.zeros((BD, 16), tl.float32)
        ones = tl.full((BM, 16), 1.0, p_v.dtype.element_ty)
    top = tl.full((BD,), float("-inf"), tl.float32)
    # whole blocks without row masks, then the one that may reach past the end
    whole = tl.maximum(tl.minimum(last, M // BM), first)
    for EDGE in tl.static_range(2):
        for i_block in tl.range(whole if EDGE else first, last if EDGE else whole, num_stages=1 if EDGE else STAGES):
            start = i_block * BM
            m_m = o_m < M - start
            b_pk = tile_start(p_k, i_b, i_h, start, stride_kb, stride_kh, stride_km, ALIGN)
            b_pv = tile_start(p_v, i_b, i_h, start, stride_vb, stride_vh, stride_vm, ALIGN)
            b_v = load_tile(b_pv, r_v, m_e[None, :], m_m[:, None], PAD_E, EDGE, 0.0)
            if ROTARY:
                # the pairs that rotate have to lie along the last axis
                r_k = r_km[:, None] + r_kd[None, :]
                b_k = load_tile(b_pk, r_k, m_d[None, :], m_m[:, None], PAD_D, EDGE, PAD)
                mapped = map_elements(b_k, MAP)  # [BM, BD]
                if MAP == "softmax":
                    mapped = tl.exp(mapped - log_sum[None, :])
                cos = load_rotary(p_cos, o_m, start, M - start, i_b, stride_cb, stride_cm, stride_cd, D, BD, ROTARY)
                sin = load_rotary(p_sin, o_m, start, M - start, i_b, stride_cb, stride_cm, stride_cd, D, BD, ROTARY)
                total += mapped
                rotated = tl.trans(rotate(mapped, cos, sin))
                state = dot_tokens(rotated, b_v, state, False, PARTS) + nothing(M)
            else:
                # loaded as [BD, BM] the keys are mapped in the registers that they are multiplied from
                r_k = r_kd[:, None] + r_km[None, :]
                b_k = load_tile(b_pk, r_k, m_d[:, None], m_m[None, :], PAD_D, EDGE, PAD)
                mapped = map_elements(b_k, MAP)  # [BD, BM]
                if ONLINE:
                    new_top = tl.maximum(top, tl.max(mapped, 1))
                    safe = tl.where(new_top == float("-inf"), 0.0, new_top)
                    mapped = tl.exp(mapped - safe[:, None])
                    shrink = tl.exp(top - safe)
                    top = new_top
                    state *= shrink[:, None]
                    total *= shrink[:, None]
                state = dot_tokens(mapped, b_v, state, RAW, PARTS)
                total = dot_tokens(mapped, ones, total, RAW, PARTS) + nothing(M)
    if ROTARY:
        normalizer = tl.sum(total, 0)
    else:
        normalizer = tl.sum(total, 1) * 0.0625
    return state, normalizer, top


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
    PACK: tl.constexpr,
    MAP: tl.constexpr,
    ROTARY: tl.constexpr,
    ALIGN: tl.constexpr,
    PARTS: tl.constexpr,
    ONLINE: tl.constexpr,
    PART_SIZE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """S and z over `chunk` blocks of keys of PACK heads, written to parts (b, h, i_chunk): S (D x E), z (D).

    For "softmax" the keys are mapped by exp(k - log_sum), or if ONLINE by exp(k - max), and the maximum over the
    chunk (D) follows z.
    """
    i_b, i_h, i_chunk, first, last = program_part(n_heads, n_chunks, chunk, tl.cdiv(M, BM), PACK)
    o_d = tl.arange(0, BD)
    o_e = tl.program_id(1) * BE + tl.arange(0, BE)
    log_sum = 0.0
    if MAP == "softmax" and not ONLINE:
        log_sum = tl.load(p_log_sum + (i_b * n_heads + i_h) * D + o_d, mask=o_d < D, other=float("inf"))
    state, normalizer, top = sum_keys(
        p_k, p_v, p_cos, p_sin, log_sum, i_b, i_h, o_e, first, last, stride_kb, stride_km, stride_kh, stride_kd,
        stride_vb, stride_vm, stride_vh, stride_ve, stride_cb, stride_cm, stride_cd, M,
        D, E, BD, BE, BM, PACK, MAP, ROTARY, ALIGN, PARTS, ONLINE, STAGES,
    )  # fmt: skip
    p_part = p_parts + ((i_b * n_heads + i_h).to(tl.int64) * n_chunks + i_chunk) * PART_SIZE
    r_state, m_state = state_offsets(o_d, o_e, n_chunks * PART_SIZE, D, E, PACK)
    tl.store(p_part + r_state, state, mask=m_state)
    if tl.program_id(1) == 0:
        m_d = o_d < D * PACK
        r_z = o_d // D * (n_chunks * PART_SIZE) + o_d % D
        tl.store(p_part + D * E + r_z, normalizer, mask=m_d)
        if ONLINE:
            tl.store(p_part + D * E + D + r_z, top, mask=m_d)


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
