"""Kernels: the products of each frame's keys, the states before and after each frame, the outputs of its tokens.

States are transposed here, D x E with the normalizer's D numbers behind, as `linear_attention` has them:

    W_t = a_t (I - c^2 sum_m b_m k_m k_m^T)      a kernel, for rotated keys; again for plain ones, if those differ
    Y_t = c sum_m b_m k_m v_m^T                  the same kernel with values on the right
    X_t = W_t X_(t-1) + Y_t, and back in time    columns of X are independent: a program has some of one head's
    o_n = (X_t + X'_t) q_n                       as in linear attention, from the sum of both states

Bytes, of B H N elements of D: keys 3 times, values, queries and outputs once; W 2 D / S of that, states 4 E / S. At
S = 880 and D = 112 those are small, and the products fit under the reading.
"""

import triton
import triton.language as tl

from diffattn.kernels.linear_attention.triton_fwd import write_outputs
from diffattn.kernels.linear_attention.triton_tiles import (
    dot_state,
    dot_tokens,
    feature_offsets,
    load_rotary,
    load_tile,
    map_elements,
    nothing,
    rotate,
    split,
    tile_start,
    token_offsets,
)

# Arguments that differ from call to call: a kernel made for each value would be compiled again and again.
COUNTS = ["n_heads", "T", "S"]


@triton.jit
def frame_program(n_heads, T):
    """(sample, frame, head) of this program. Heads vary fastest: they lie side by side in memory."""
    i_p = tl.program_id(0)
    return i_p // n_heads // T, i_p // n_heads % T, i_p % n_heads


@triton.jit(do_not_specialize=COUNTS)
def frame_delta_rule_products_kernel(
    p_k,
    p_v,
    p_beta,
    p_kept,
    p_cos,
    p_sin,
    p_w,
    p_y,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_kd,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_vd,
    stride_bb,
    stride_bn,
    stride_bh,
    stride_ab,
    stride_at,
    stride_ah,
    stride_cb,
    stride_cn,
    stride_cd,
    T,
    S,
    n_heads,
    scale,
    D: tl.constexpr,
    E: tl.constexpr,
    SIZE: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    BN: tl.constexpr,
    VALUES: tl.constexpr,
    SUM: tl.constexpr,
    ROTARY: tl.constexpr,
    ALIGN: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Y of one frame and head with VALUES, else W. SUM: and the normalizer's part of Y.

    p_v has what is on the right, of E features: values, or keys again. SIZE: of a frame's state.
    """
    dtype: tl.constexpr = p_k.dtype.element_ty
    i_b, i_t, i_h = frame_program(n_heads, T)
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    o_e = tl.arange(0, BE)
    m_d = (o_d < D)[None, :]
    m_e = (o_e < E)[None, :]
    r_k = token_offsets(o_n, stride_kn, ALIGN)[:, None] + feature_offsets(o_d, 0, stride_kd, D, 1, ALIGN)[None, :]
    r_v = token_offsets(o_n, stride_vn, ALIGN)[:, None] + feature_offsets(o_e, 0, stride_vd, E, 1, ALIGN)[None, :]
    p_beta += i_b.to(tl.int64) * stride_bb + i_h.to(tl.int64) * stride_bh
    acc = tl.zeros((BD, BE), tl.float32)
    total = tl.zeros((BN, BD), tl.float32)
    for start in tl.range(0, S, BN, num_stages=STAGES):
        m_n = o_n < S - start
        token = i_t * S + start
        b_pk = tile_start(p_k, i_b, i_h, token, stride_kb, stride_kh, stride_kn, ALIGN)
        b_k = map_elements(load_tile(b_pk, r_k, m_d, m_n[:, None], BD != D, True, 0.0), None)  # [BN, BD]
        if ROTARY:
            cos = load_rotary(p_cos, o_n, token, S - start, i_b, stride_cb, stride_cn, stride_cd, D, BD, ROTARY)
            sin = load_rotary(p_sin, o_n, token, S - start, i_b, stride_cb, stride_cn, stride_cd, D, BD, ROTARY)
            b_k = rotate(b_k, cos, sin)
        b_beta = tl.load(p_beta + (token + o_n).to(tl.int64) * stride_bn, mask=m_n, other=0.0).to(tl.float32)
        weighted = b_k * b_beta[:, None]
        if SUM:
            total += weighted
        if VALUES:
            b_pv = tile_start(p_v, i_b, i_h, token, stride_vb, stride_vh, stride_vn, ALIGN)
            right = load_tile(b_pv, r_v, m_e, m_n[:, None], BE != E, True, 0.0)
        else:
            # rotated keys are rounded, as stock rounds them: an error that the sum over tokens averages out
            right = b_k.to(dtype)
        acc = dot_tokens(tl.trans(weighted), right, acc, False, PARTS) + nothing(S)
    i_frame = ((i_b * T + i_t) * n_heads + i_h).to(tl.int64)
    if VALUES:
        tl.store(p_y + i_frame * SIZE + o_d[:, None] * E + o_e[None, :], acc * scale, mask=(o_d < D)[:, None] & m_e)
    else:
        b_kept = tl.load(
            p_kept + i_b.to(tl.int64) * stride_ab + i_t.to(tl.int64) * stride_at + i_h.to(tl.int64) * stride_ah
        ).to(tl.float32)
        one = tl.where(o_d[:, None] == o_e[None, :], 1.0, 0.0)
        b_w = b_kept * (one - acc * (scale * scale))
        tl.store(p_w + i_frame * (D * D) + o_d[:, None] * D + o_e[None, :], b_w, mask=(o_d < D)[:, None] & m_e)
    if SUM:
        tl.store(p_y + i_frame * SIZE + SIZE - D + o_d, tl.sum(total, 0) * scale, mask=o_d < D)


@triton.jit(do_not_specialize=[*COUNTS, "n_frames"])
def frame_delta_rule_scan_kernel(
    p_w,
    p_y,
    p_x,
    T,
    n_heads,
    n_frames,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    APART: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BE columns of one head's states, in the direction of program_id(2): 0 up to each frame with it, 1 from the last
    frame down to it without it. Behind the columns of S comes the normalizer, one column; APART: with the second W.
    """
    SIZE: tl.constexpr = D * E + D
    i_b, i_h = tl.program_id(0) // n_heads, tl.program_id(0) % n_heads
    back = tl.program_id(2)
    last = (E + BE - 1) // BE  # the normalizer's block
    of_z = tl.program_id(1) == last
    o_d = tl.arange(0, BD)
    o_e = tl.program_id(1) * BE + tl.arange(0, BE)
    m_x = (o_d < D)[:, None] & (o_e < tl.where(of_z, last * BE + 1, E))[None, :]
    r_x = tl.where(of_z, D * E + o_d[:, None] + 0 * o_e[None, :], o_d[:, None] * E + o_e[None, :])
    r_w = o_d[:, None] * D + o_d[None, :]
    m_w = (o_d < D)[:, None] & (o_d < D)[None, :]
    if APART:
        p_w += of_z.to(tl.int64) * n_frames * (D * D)
    p_x += back.to(tl.int64) * n_frames * SIZE

    first = back * (T - 1)
    i_frame = ((i_b * T + first) * n_heads + i_h).to(tl.int64)
    starts = (o_d < tl.where(back == 0, D, 0))[:, None]  # by rows: Triton 3.9 interprets no scalar mask
    x = tl.load(p_y + i_frame * SIZE + r_x, mask=m_x & starts, other=0.0)
    tl.store(p_x + i_frame * SIZE + r_x, x, mask=m_x)
    for i in tl.range(1, T, num_stages=STAGES):
        step = tl.where(back == 1, T - i, i)
        i_frame = ((i_b * T + step) * n_heads + i_h).to(tl.int64)
        b_w = tl.load(p_w + i_frame * (D * D) + r_w, mask=m_w, other=0.0)
        b_y = tl.load(p_y + i_frame * SIZE + r_x, mask=m_x, other=0.0)
        high, low = split(x, PARTS)
        x = dot_state(b_w, high, low, False, PARTS) + b_y
        i_frame = ((i_b * T + step - back) * n_heads + i_h).to(tl.int64)
        tl.store(p_x + i_frame * SIZE + r_x, x, mask=m_x)


@triton.jit(do_not_specialize=[*COUNTS, "n_frames"])
def frame_delta_rule_output_kernel(
    p_q,
    p_cos,
    p_sin,
    p_x,
    p_o,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_qd,
    stride_cb,
    stride_cn,
    stride_cd,
    T,
    S,
    n_heads,
    n_frames,
    eps,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    BN: tl.constexpr,
    NORM: tl.constexpr,
    ROTARY: tl.constexpr,
    ALIGN: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BE features of the outputs of one frame and head. Without NORM eps is 1, and is divided by."""
    SIZE: tl.constexpr = D * E + D
    i_b, i_t, i_h = frame_program(n_heads, T)
    o_d = tl.arange(0, BD)
    o_e = tl.program_id(1) * BE + tl.arange(0, BE)
    i_frame = ((i_b * T + i_t) * n_heads + i_h).to(tl.int64)
    other = n_frames.to(tl.int64) * SIZE
    p_x += i_frame * SIZE
    r_x = o_d[:, None] * E + o_e[None, :]
    m_x = (o_d < D)[:, None] & (o_e < E)[None, :]
    state = tl.load(p_x + r_x, mask=m_x, other=0.0) + tl.load(p_x + other + r_x, mask=m_x, other=0.0)
    normalizer = tl.zeros((BD,), tl.float32)
    if NORM:
        p_z = p_x + D * E + o_d
        normalizer = tl.load(p_z, mask=o_d < D, other=0.0) + tl.load(p_z + other, mask=o_d < D, other=0.0)
    token = (i_t * S).to(tl.int64)
    i_b = i_b.to(tl.int64)
    table = i_b * stride_cb + token * stride_cn
    write_outputs(
        p_q + i_b * stride_qb + token * stride_qn, p_cos + table, p_sin + table,
        p_o + (i_b * T * S + token) * n_heads * E, state, normalizer, i_h * 0, i_h, o_e, 0, tl.cdiv(S, BN),
        stride_qb, stride_qn, stride_qh, stride_qd, stride_cb, stride_cn, stride_cd, S, n_heads, eps,
        D, E, BD, BE, BN, 1, None, ROTARY, ALIGN, PARTS, STAGES,
    )  # fmt: skip
