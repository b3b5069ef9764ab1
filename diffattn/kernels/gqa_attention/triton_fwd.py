"""Triton kernels for grouped-query attention, forward: FlashAttention-2 with the query heads of a group packed.

The query heads that share a key/value head are one long list of rows, r = g * N + n, so a tile of rows is full
even for a few queries and a key block is read once for all of them. Sums, the softmax and the accumulator are
float32; every output element is written by one program, so results repeat bit for bit.
"""

import itertools

import torch
import triton
import triton.language as tl

from diffattn._config import config
from diffattn.kernels._autotune import size_class, tuned
from diffattn.kernels._launch import cdiv, on_device
from diffattn.kernels.gqa_attention import hopper
from diffattn.kernels.gqa_attention.triton import (
    LOG2E,
    block_loads,
    dot_precision,
    fitting,
    head_block,
    load_block,
    mask_has_rows,
    mask_kind,
    mask_strides,
    masked_scores,
    prob_shift,
)


@triton.jit
def _fwd_step(
    b_acc,
    b_l,
    b_m,
    b_q,
    i_b,
    i_kv,
    i_m,
    p_k,
    p_v,
    p_mask,
    p_k_scale,
    b_scale,
    m_r,
    scale,
    M,
    stride_kb,
    stride_km,
    stride_kh,
    stride_kd,
    stride_vb,
    stride_vm,
    stride_vh,
    stride_ve,
    stride_mask_m,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    BM: tl.constexpr,
    MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    TAIL: tl.constexpr,
    SHIFT: tl.constexpr,
    PRECISION: tl.constexpr,
    INT8: tl.constexpr,
    TMA: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One block of keys. TAIL: the block reaches past the last key. INT8: b_scale are the scales of the rows."""
    o_m = i_m + tl.arange(0, BM)
    b_k = load_block(
        p_k, i_b, i_kv, i_m, M, stride_kb, stride_km, stride_kh, stride_kd, D, BD, BM, TAIL, TMA, WIDE
    )  # [BM, BD]
    if INT8:
        b_k_scale = tl.load(p_k_scale + o_m, mask=o_m < M, other=0.0) if TAIL else tl.load(p_k_scale + o_m)
        b_x = tl.dot(b_q, tl.trans(b_k)).to(tl.float32) * b_k_scale[None, :] * b_scale[:, None]
        scale = 1.0
    else:
        b_x = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BN, BM]
        if MASK != 0 or TAIL:
            b_x *= scale
            scale = 1.0
    if MASK != 0:
        m_edge = (o_m < M)[None, :]
        if MASK_ROWS:
            m_edge = m_edge & m_r[:, None]
        b_x = masked_scores(b_x, p_mask, o_m[None, :], stride_mask_m, m_edge, MASK)
    if TAIL:
        b_x = tl.where((o_m < M)[None, :], b_x, float("-inf"))
    b_new = tl.maximum(b_m, tl.max(b_x, 1) * scale)
    if MASK != 0:
        # All keys masked so far: any finite number keeps the exponents from being -inf - -inf.
        b_top = tl.where(b_new == float("-inf"), 0.0, b_new)
    else:
        b_top = b_new
    b_p = tl.exp2(b_x * scale - (b_top - SHIFT)[:, None])
    b_old = tl.exp2(b_m - b_top)
    b_l = b_l * b_old + tl.sum(b_p, 1)
    b_acc = b_acc * b_old[:, None]
    b_v = load_block(
        p_v, i_b, i_kv, i_m, M, stride_vb, stride_vm, stride_vh, stride_ve, E, BE, BM, TAIL, TMA, WIDE
    )  # [BM, BE]
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
    return b_acc, b_l, b_new


@triton.jit
def gqa_attention_fwd_kernel(
    p_q,
    p_k,
    p_v,
    p_mask,
    p_o,
    p_residual,
    p_top,
    p_rsum,
    p_q_scale,
    p_k_scale,
    scale,
    N,
    M,
    Hkv,
    G,
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
    stride_mask_b,
    stride_mask_h,
    stride_mask_n,
    stride_mask_m,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    MASK: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    TRAINING: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SHIFT: tl.constexpr,
    PRECISION: tl.constexpr,
    INT8: tl.constexpr,
    TMA: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One tile of BN packed query rows against every key of their head. scale includes log2(e).

    INT8: q and k are int8, with a scale for every row, (B, heads, tokens up to a multiple of 4), that include scale.
    """
    i_row = tl.program_id(0) % tl.cdiv(G * N, BN)
    i_bh = (tl.program_id(0) // tl.cdiv(G * N, BN)).to(tl.int64)
    i_b = i_bh // Hkv
    i_kv = i_bh % Hkv

    o_r = i_row * BN + tl.arange(0, BN)
    m_r = o_r < G * N
    o_h = i_kv * G + o_r // N  # [BN] int64
    o_n = (o_r % N).to(tl.int64)
    o_d = tl.arange(0, BD)
    o_e = tl.arange(0, BE)

    p_q += i_b * stride_qb
    b_q = tl.load(
        p_q + (o_h * stride_qh + o_n * stride_qn)[:, None] + o_d[None, :] * stride_qd,
        mask=m_r[:, None] & (o_d < D)[None, :],
        other=0.0,
    )  # [BN, BD]
    if INT8:
        b_scale = tl.load(p_q_scale + (i_b * Hkv * G + o_h) * (tl.cdiv(N, 4) * 4) + o_n, mask=m_r, other=0.0)  # [BN]
        p_k_scale += i_bh * (tl.cdiv(M, 4) * 4)
    else:
        # The maximum is taken before the scale is applied, so the scale has to be positive.
        b_q = tl.where(scale < 0, -b_q, b_q)
        scale = tl.abs(scale)
        b_scale = scale
    p_mask += i_b * stride_mask_b
    if MASK_ROWS:
        p_mask = p_mask + (o_h * stride_mask_h + o_n * stride_mask_n)[:, None]

    b_acc = tl.zeros([BN, BE], dtype=tl.float32)
    b_l = tl.zeros([BN], dtype=tl.float32)
    b_m = tl.full([BN], float("-inf"), dtype=tl.float32)
    M_full = M // BM * BM
    for i_m in range(0, M_full, BM):
        b_acc, b_l, b_m = _fwd_step(
            b_acc, b_l, b_m, b_q, i_b, i_kv, i_m, p_k, p_v, p_mask, p_k_scale, b_scale, m_r, scale, M,
            stride_kb, stride_km, stride_kh, stride_kd, stride_vb, stride_vm, stride_vh, stride_ve, stride_mask_m,
            D, E, BD, BE, BM, MASK, MASK_ROWS, False, SHIFT, PRECISION, INT8, TMA, WIDE,
        )  # fmt: skip
    # A loop of one turn, not an `if`: Triton 3.6 and 3.7 copy the accumulator for the two branches of an `if` before
    # they wait for the products that are still being added to it.
    for i_m in tl.range(M_full, M, BM, num_stages=1):
        b_acc, b_l, b_m = _fwd_step(
            b_acc, b_l, b_m, b_q, i_b, i_kv, i_m, p_k, p_v, p_mask, p_k_scale, b_scale, m_r, scale, M,
            stride_kb, stride_km, stride_kh, stride_kd, stride_vb, stride_vm, stride_vh, stride_ve, stride_mask_m,
            D, E, BD, BE, BM, MASK, MASK_ROWS, True, SHIFT, PRECISION, INT8, TMA, WIDE,
        )  # fmt: skip

    # l is 0 in a row with every key masked: its output, and later its gradients, are 0.
    b_rl = tl.where(b_l == 0.0, 0.0, 1.0 / b_l)
    b_acc = b_acc * b_rl[:, None]
    o_out = ((i_b * N + o_n) * (Hkv * G) + o_h)[:, None] * E + o_e[None, :]
    m_out = m_r[:, None] & (o_e < E)[None, :]
    b_o = b_acc.to(p_o.dtype.element_ty)
    tl.store(p_o + o_out, b_o, mask=m_out)
    if RESIDUAL:
        tl.store(p_residual + o_out, (b_acc - b_o.to(tl.float32)).to(p_residual.dtype.element_ty), mask=m_out)
    if TRAINING:
        o_stats = i_bh * (G * N) + o_r
        tl.store(p_top + o_stats, tl.where(b_l == 0.0, 0.0, b_m), mask=m_r)
        tl.store(p_rsum + o_stats, b_rl * tl.exp2(tl.full([BN], SHIFT, dtype=tl.float32)), mask=m_r)


# (rows, keys, warps, stages) by whether elements take 4 bytes and by the padded head dim; the last fits all. They
# fit in 227 KB of shared memory and keep all but a few hundred bytes of a thread's state in registers, on Hopper.
_CONFIGS = {
    (False, 16): (128, 64, 4, 3),
    (False, 32): (128, 64, 4, 3),
    (False, 64): (128, 128, 8, 3),
    (False, 128): (128, 64, 8, 3),
    (False, 256): (64, 64, 8, 2),
    (True, 16): (64, 64, 4, 2),
    (True, 32): (64, 64, 4, 2),
    (True, 64): (64, 32, 4, 2),
    (True, 128): (64, 32, 4, 2),
    (True, 256): (16, 32, 8, 2),
}


def _config(dtype, width, masked, device):
    rows, keys, warps, stages = fitting(_CONFIGS[(dtype.itemsize == 4, width)], dtype, width, device)
    # A mask tile takes registers and shared memory of its own.
    return (rows, max(16, keys // 2), warps, 2) if masked else (rows, keys, warps, stages)


def gqa_attention_fwd(q, k, v, mask, scale, training, launch=None, row_scales=None):
    """Launch the forward kernel.

    Args: as the operator `diffattn::gqa_attention`; mask has 4 axes. launch: (rows, keys, warps, stages).
            row_scales: where q and k are int8, the scales of their rows as `triton_int8.quantize` makes them; D and
            the width of v may then differ by what int8 rows are padded.
    Returns: out (B, N, H, E); with `training` also stats (2, B, H, N) float32, which hold each row's maximum in
        log2 units and the reciprocal of its sum, and, in half precision, the residual that rounding took from
        out, in the dtype of out. Else both are None.
    """
    if not training and launch is None and hopper.takes(q, k, v, mask, scale, row_scales):
        return hopper.hopper_fwd(q, k, v, mask, scale, row_scales), None, None
    B, N, H, D = q.shape
    M, Hkv, E = v.shape[1:]
    G = H // Hkv
    out = v.new_empty(B, N, H, E)
    stats = v.new_empty((2, B, H, N), dtype=torch.float32) if training else None
    residual = torch.empty_like(out) if training and v.dtype.itemsize < 4 else None
    if out.numel() == 0:
        return out, stats, residual
    # Products of int8 take 32 features at a time.
    width = head_block(D, E, 16 if row_scales is None else 32)
    if launch is None:
        launch = _config(v.dtype, width, mask is not None, v.device)
        if config.autotune:
            key = (width, str(v.dtype), mask_kind(mask), mask_has_rows(mask), training, row_scales is not None)
            launch = tuned(
                "gqa_attention forward",
                (*key, size_class(G * N), size_class(M), size_class(B * Hkv)),
                launch,
                itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3)),
                lambda choice: gqa_attention_fwd(q, k, v, mask, scale, training, choice, row_scales),
            )
    rows, keys, warps, stages = launch
    # A few queries do not fill the tile.
    rows = min(rows, head_block(G * N))
    (k_arg, v_arg), loads = block_loads((k, keys, width), (v, keys, width))
    with on_device(q):
        gqa_attention_fwd_kernel[(cdiv(G * N, rows) * B * Hkv,)](
            q,
            k_arg,
            v_arg,
            q if mask is None else mask,
            out,
            out if residual is None else residual,
            stats[0] if training else out,
            stats[1] if training else out,
            *(row_scales or (out, out)),
            scale * LOG2E,
            N,
            M,
            Hkv,
            G,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *mask_strides(mask),
            D=D,
            E=E,
            BD=width,
            BE=width,
            BN=rows,
            BM=keys,
            MASK=mask_kind(mask),
            MASK_ROWS=mask_has_rows(mask),
            TRAINING=training,
            RESIDUAL=residual is not None,
            SHIFT=prob_shift(v.dtype),
            PRECISION=dot_precision(v.dtype),
            INT8=row_scales is not None,
            **loads,
            num_warps=warps if rows >= 64 else 4,
            num_stages=stages,
        )
    return out, stats, residual
