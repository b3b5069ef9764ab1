"""Triton kernel that quantizes queries and keys to int8, and the launch of the attention kernel that reads them.

The scheme is in `reference.gqa_attention_int8_reference`.
"""

import torch
import triton
import triton.language as tl

from diffattn.kernels._launch import cdiv, on_device
from diffattn.kernels.gqa_attention.int8 import rotation_group
from diffattn.kernels.gqa_attention.triton import LOG2E, head_block, load_block
from diffattn.kernels.gqa_attention.triton_fwd import gqa_attention_fwd


@triton.jit
def gqa_attention_quantize_kernel(
    p_x,
    p_mean,
    p_y,
    p_scale,
    gain,
    N,
    H,
    stride_b,
    stride_n,
    stride_h,
    stride_d,
    D: tl.constexpr,
    W: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    GROUP: tl.constexpr,
    TURN: tl.constexpr,
    CENTER: tl.constexpr,
    WIDE: tl.constexpr,
):
    """x, less its mean over tokens, as int8 rows of W and one scale a row; sums of y y' scale scale' are dot products.

    gain: what the scales are multiplied by; its sign goes to y. GROUP: `rotation_group` of D. TURN: at least 16.
    """
    i_n = tl.program_id(0) % tl.cdiv(N, BN)
    i_bh = (tl.program_id(0) // tl.cdiv(N, BN)).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    o_n = i_n.to(tl.int64) * BN + tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    b_x = load_block(
        p_x, i_b, i_h, i_n * BN, N, stride_b, stride_n, stride_h, stride_d, D, BD, BN, True, False, WIDE
    ).to(tl.float32)  # [BN, BD]
    if CENTER:
        b_x -= tl.load(p_mean + i_bh * D + o_d, mask=o_d < D, other=0.0)[None, :]
    if GROUP > 1:
        # Hadamard's matrix, (-1) ** popcount(i & j), once for every group of features in TURN of them.
        o_i = tl.arange(0, TURN)[:, None]
        o_j = tl.arange(0, TURN)[None, :]
        b_odd = o_i & o_j & (GROUP - 1)
        b_odd ^= b_odd >> 4
        b_odd ^= b_odd >> 2
        b_odd ^= b_odd >> 1
        b_turn = tl.where(o_i // GROUP == o_j // GROUP, 1.0 - 2.0 * (b_odd & 1), 0.0)
        b_x = b_x.reshape([BN * BD // TURN, TURN])
        # A product in TF32 reads 10 bits of the mantissa, all that half precision has; centered keys have more, and
        # without the rest one element in twenty would round to the next integer.
        b_high = (b_x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        b_turned = tl.dot(b_high, b_turn, input_precision="tf32")
        if CENTER:
            b_turned = tl.dot(b_x - b_high, b_turn, b_turned, input_precision="tf32")
        b_x = b_turned.reshape([BN, BD])
    # The maximum passes NaN over, the sum does not.
    b_top = tl.max(tl.abs(b_x), 1) + 0.0 * tl.sum(b_x, 1)
    b_y = b_x * (127.0 / tl.where(b_top == 0.0, 1.0, b_top))[:, None]
    b_y = tl.where(gain < 0, -b_y, b_y)
    # Below 2 ** 22 this rounds to the nearest integer, ties to even.
    b_y = (b_y + 12582912.0) - 12582912.0
    m_n = o_n < N
    p_y += ((i_b * N + o_n) * H + i_h)[:, None] * W + o_d[None, :]
    tl.store(p_y, b_y.to(tl.int8), mask=m_n[:, None] & (o_d < W)[None, :])
    tl.store(p_scale + i_bh * (tl.cdiv(N, 4) * 4) + o_n, b_top * (tl.abs(gain) / 127.0), mask=m_n)


def quantize(x, mean=None, gain=1.0):
    """Rows of x (B, N, H, D), less their mean (B, 1, H, D) in float32, rotated, as int8 with a scale for each.

    Returns: (B, N, H, D up to a multiple of 16) int8, zeros past D; (B, H, N up to a multiple of 4) float32.
    """
    B, N, H, D = x.shape
    width = cdiv(D, 16) * 16
    block = head_block(width)
    rows = 64 if block <= 128 else 32
    y = torch.empty((B, N, H, width), dtype=torch.int8, device=x.device)
    scale = torch.empty((B, H, cdiv(N, 4) * 4), dtype=torch.float32, device=x.device)
    with on_device(x):
        gqa_attention_quantize_kernel[(cdiv(N, rows) * B * H,)](
            x,
            x if mean is None else mean,
            y,
            scale,
            gain,
            N,
            H,
            *x.stride(),
            D=D,
            W=width,
            BD=block,
            BN=rows,
            GROUP=rotation_group(D),
            TURN=max(16, rotation_group(D)),
            CENTER=mean is not None,
            WIDE=rows * abs(x.stride(1)) + block * abs(x.stride(3)) >= 2**31,
            num_warps=4,
        )
    return y, scale


def gqa_attention_int8_fwd(q, k, v, mask, scale):
    """Args: as the operator `diffattn::gqa_attention_int8`; mask has 4 axes. Returns: (B, N, H, E)."""
    if q.shape[1] == 0 or k.shape[1] == 0:
        return v.new_zeros(*q.shape[:3], v.shape[-1])
    D = q.shape[-1]
    # The rotation of both multiplies the scores by its group's size.
    q, q_scale = quantize(q, gain=scale * LOG2E / rotation_group(D))
    k, k_scale = quantize(k, k.mean(dim=1, keepdim=True, dtype=torch.float32))
    return gqa_attention_fwd(q, k, v, mask, 1.0, False, row_scales=(q_scale, k_scale))[0]
