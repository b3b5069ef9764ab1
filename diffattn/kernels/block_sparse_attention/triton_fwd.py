"""Triton kernel for block-sparse attention, forward: FlashAttention-2 over a list of blocks of keys.

With PRODUCT weights are the products q.k themselves, not their softmax: the part of a linear attention that is over
the listed blocks. Sums and the accumulator are float32; every output element is written by one program, so results
repeat bit for bit.
"""

import torch
import triton
import triton.language as tl

from diffattn.kernels._launch import on_device
from diffattn.kernels.block_sparse_attention.blocks import number_of_blocks
from diffattn.kernels.block_sparse_attention.triton import (
    COUNTS,
    bias_in_log2,
    fit,
    hide_far,
    list_of,
    list_strides,
    load_places,
    nothing,
)
from diffattn.kernels.gqa_attention.triton import (
    LOG2E,
    block_loads,
    dot_precision,
    fitting,
    head_block,
    load_block,
    prob_shift,
)


@triton.jit
def _fwd_step(
    b_acc,
    b_l,
    b_m,
    b_q,
    b_y,
    b_x,
    b_w,
    i_b,
    i_kv,
    i_m,
    p_k,
    p_v,
    p_places,
    p_bias,
    scale,
    M,
    K,
    stride_kb,
    stride_km,
    stride_kh,
    stride_kd,
    stride_vb,
    stride_vm,
    stride_vh,
    stride_ve,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    BM: tl.constexpr,
    CHECK: tl.constexpr,
    PLACED: tl.constexpr,
    BIASED: tl.constexpr,
    PRODUCT: tl.constexpr,
    SHIFT: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One tile of keys. CHECK: not every pair attends, or the tile reaches past the last key."""
    o_m = i_m + tl.arange(0, BM)
    b_k = load_block(
        p_k, i_b, i_kv, i_m, M, stride_kb, stride_km, stride_kh, stride_kd, D, BD, BM, CHECK, TMA, WIDE
    )  # [BM, BD]
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BN, BM]
    if PRODUCT:
        # Keys past the last are zeros, and so are their weights.
        b_p = b_s
        b_l += tl.sum(b_s, 1)
        b_new = b_m
    else:
        if CHECK:
            b_s *= scale
            scale = 1.0
            if BIASED:
                b_s += tl.load(p_bias + o_m, mask=o_m < M, other=float("-inf"))[None, :]
            if PLACED:
                b_ky, b_kx, b_kw = load_places(p_places, o_m, M)
                b_s = hide_far(b_s, b_y, b_x, b_w, b_ky, b_kx, b_kw)
            b_s = tl.where((o_m < M)[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_m, tl.max(b_s, 1) * scale)
        # All keys hidden so far: any finite number keeps the exponents from being -inf - -inf.
        b_top = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.exp2(b_s * scale - (b_top - SHIFT)[:, None])
        b_old = tl.exp2(b_m - b_top)
        b_l = b_l * b_old + tl.sum(b_p, 1)
        b_acc = b_acc * b_old[:, None]
    b_v = load_block(
        p_v, i_b, i_kv, i_m, M, stride_vb, stride_vm, stride_vh, stride_ve, E, BE, BM, CHECK, TMA, WIDE
    )  # [BM, BE]
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION) + nothing(K)
    return b_acc, b_l, b_new


@triton.jit(do_not_specialize=COUNTS)
def block_sparse_attention_fwd_kernel(
    p_q,
    p_k,
    p_v,
    p_index,
    p_full,
    p_count,
    p_q_places,
    p_k_places,
    p_bias,
    p_o,
    p_residual,
    p_top,
    p_sum,
    scale,
    N,
    M,
    H,
    G,
    K,
    n_tiles,
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
    stride_list_b,
    stride_list_h,
    stride_bias_b,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PLACED: tl.constexpr,
    BIASED: tl.constexpr,
    PRODUCT: tl.constexpr,
    TRAINING: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SHIFT: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One tile of BN queries of one head against the blocks that its block of ROWS queries lists.

    Tiles of keys, BM, and of queries divide the blocks. scale includes log2(e), but for PRODUCT, whose output and sum
    it multiplies.
    """
    # From the last block on: text, which attends to all, stands there, and the longest programs should start first.
    i_tile = n_tiles - 1 - tl.program_id(0) % n_tiles
    i_bh = (tl.program_id(0) // n_tiles).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    i_kv = i_h // G

    o_n = i_tile.to(tl.int64) * BN + tl.arange(0, BN)
    m_n = o_n < N
    o_d = tl.arange(0, BD)
    o_e = tl.arange(0, BE)
    b_q = tl.load(
        p_q + i_b * stride_qb + i_h * stride_qh + (o_n * stride_qn)[:, None] + o_d[None, :].to(tl.int64) * stride_qd,
        mask=m_n[:, None] & (o_d < D)[None, :],
        other=0.0,
    )  # [BN, BD]
    if not PRODUCT:
        # The maximum is taken before the scale is applied, so the scale has to be positive.
        b_q = tl.where(scale < 0, -b_q, b_q)
    gain = tl.abs(scale)
    b_y = m_n.to(tl.float32)
    b_x = b_y
    b_w = b_y
    if PLACED:
        b_y, b_x, b_w = load_places(p_q_places, o_n, N)
    p_bias += i_b * stride_bias_b

    b_acc = tl.zeros([BN, BE], dtype=tl.float32)
    b_l = tl.zeros([BN], dtype=tl.float32)
    b_m = tl.full([BN], float("-inf"), dtype=tl.float32)
    i_list, full, count = list_of(
        i_b, i_h, i_tile // (ROWS // BN), p_full, p_count, stride_list_b, stride_list_h, BIASED
    )
    p_index += i_list * K
    PARTS: tl.constexpr = KEYS // BM
    for i in range(0, full * PARTS):
        i_m = tl.load(p_index + i // PARTS) * KEYS + i % PARTS * BM
        b_acc, b_l, b_m = _fwd_step(
            b_acc, b_l, b_m, b_q, b_y, b_x, b_w, i_b, i_kv, i_m, p_k, p_v, p_k_places, p_bias, gain, M, K,
            stride_kb, stride_km, stride_kh, stride_kd, stride_vb, stride_vm, stride_vh, stride_ve,
            D, E, BD, BE, BM, False, PLACED, BIASED, PRODUCT, SHIFT, PRECISION, TMA, WIDE,
        )  # fmt: skip
    for i in range(full * PARTS, count * PARTS):
        i_m = tl.load(p_index + i // PARTS) * KEYS + i % PARTS * BM
        b_acc, b_l, b_m = _fwd_step(
            b_acc, b_l, b_m, b_q, b_y, b_x, b_w, i_b, i_kv, i_m, p_k, p_v, p_k_places, p_bias, gain, M, K,
            stride_kb, stride_km, stride_kh, stride_kd, stride_vb, stride_vm, stride_vh, stride_ve,
            D, E, BD, BE, BM, True, PLACED, BIASED, PRODUCT, SHIFT, PRECISION, TMA, WIDE,
        )  # fmt: skip

    o_out = ((i_b * N + o_n) * H + i_h)[:, None] * E + o_e[None, :]
    m_out = m_n[:, None] & (o_e < E)[None, :]
    if PRODUCT:
        tl.store(p_o + o_out, (b_acc * scale).to(p_o.dtype.element_ty), mask=m_out)
        tl.store(p_sum + (i_b * N + o_n) * H + i_h, b_l * scale, mask=m_n)
    else:
        # l is 0 in a row with every key hidden: its output, and later its gradients, are 0.
        b_rl = tl.where(b_l == 0.0, 0.0, 1.0 / b_l)
        b_acc = b_acc * b_rl[:, None]
        b_o = b_acc.to(p_o.dtype.element_ty)
        tl.store(p_o + o_out, b_o, mask=m_out)
        if RESIDUAL:
            tl.store(p_residual + o_out, (b_acc - b_o.to(tl.float32)).to(p_residual.dtype.element_ty), mask=m_out)
        if TRAINING:
            o_stats = i_bh * N + o_n
            tl.store(p_top + o_stats, tl.where(b_l == 0.0, 0.0, b_m), mask=m_n)
            tl.store(p_sum + o_stats, b_rl * tl.exp2(tl.full([BN], SHIFT, dtype=tl.float32)), mask=m_n)


# (rows, keys, warps, stages) by whether elements take 4 bytes and by the padded head dim.
_CONFIGS = {
    (False, 16): (128, 64, 4, 3),
    (False, 32): (128, 64, 4, 3),
    (False, 64): (64, 64, 4, 2),
    (False, 128): (64, 64, 4, 2),
    (False, 256): (64, 64, 8, 2),
    (True, 16): (64, 64, 4, 2),
    (True, 32): (64, 64, 4, 2),
    (True, 64): (64, 32, 4, 2),
    (True, 128): (64, 32, 4, 2),
    (True, 256): (16, 32, 8, 2),
}


def _launch(q, k, v, blocks, q_places, k_places, bias, scale, outputs, product, training, config):
    out, residual, top, total = outputs
    B, N, H, D = q.shape
    M, Hkv, E = v.shape[1:]
    width = head_block(D, E)
    config = fitting(config or _CONFIGS[(v.dtype.itemsize == 4, width)], v.dtype, width, q.device)
    rows, keys, warps, stages = fit(config, blocks.rows, blocks.keys)
    (k_arg, v_arg), loads = block_loads((k, keys, width), (v, keys, width))
    bias = bias_in_log2(bias)
    tiles = number_of_blocks(N, rows)
    with on_device(q):
        block_sparse_attention_fwd_kernel[(tiles * B * H,)](
            q,
            k_arg,
            v_arg,
            blocks.index,
            blocks.full,
            blocks.count,
            top if q_places is None else q_places,
            top if k_places is None else k_places,
            top if bias is None else bias,
            out,
            out if residual is None else residual,
            top,
            total,
            scale if product else scale * LOG2E,
            N,
            M,
            H,
            H // Hkv,
            blocks.index.shape[-1],
            tiles,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *list_strides(blocks.count),
            0 if bias is None or bias.shape[0] == 1 else bias.stride(0),
            D=D,
            E=E,
            BD=width,
            BE=width,
            BN=rows,
            BM=keys,
            ROWS=blocks.rows,
            KEYS=blocks.keys,
            PLACED=q_places is not None,
            BIASED=bias is not None,
            PRODUCT=product,
            TRAINING=training,
            RESIDUAL=residual is not None,
            SHIFT=0.0 if product else prob_shift(v.dtype),
            PRECISION=dot_precision(v.dtype),
            **loads,
            num_warps=warps,
            num_stages=stages,
        )


def block_sparse_attention_fwd(q, k, v, blocks, q_places, k_places, bias, scale, training, config=None):
    """Launch the forward kernel.

    Args: as the operator `diffattn::block_sparse_attention`. config: (rows, keys, warps, stages).
    Returns: out (B, N, H, E); with `training` also stats (2, B, H, N) float32, each row's maximum in log2 units and
        the reciprocal of its sum, and, in half precision, the residual that rounding took from out. Else both are
        None.
    """
    B, N, H, _ = q.shape
    out = v.new_empty(B, N, H, v.shape[-1])
    stats = v.new_empty((2, B, H, N), dtype=torch.float32) if training else None
    residual = torch.empty_like(out) if training and v.dtype.itemsize < 4 else None
    if out.numel() > 0:
        top, total = stats if training else (blocks.count, blocks.count)
        outputs = (out, residual, top, total)
        _launch(q, k, v, blocks, q_places, k_places, bias, scale, outputs, False, training, config)
    return out, stats, residual


def block_sparse_sum_fwd(q, k, v, blocks, scale, config=None):
    """scale sum_m (q_n . k_m) v_m, in the dtype of q, and scale sum_m q_n . k_m, (B, N, H) float32."""
    B, N, H, _ = q.shape
    out = v.new_empty(B, N, H, v.shape[-1])
    total = v.new_empty((B, N, H), dtype=torch.float32)
    if out.numel() > 0:
        _launch(q, k, v, blocks, None, None, None, scale, (out, None, total, total), True, False, config)
    return out, total
