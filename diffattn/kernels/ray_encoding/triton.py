"""The Triton kernel and its launcher.

Each feature of the result is a sum of up to four features beside it: by a row of the token's matrix in the first half,
by cos and -sin or sin in the second. These coefficients are loaded once and serve all heads of a token.

Bytes: x is read and y is written once; what a feature has from its neighbours comes from the first-level cache.
"""

import torch
import triton
import triton.language as tl

from diffattn.kernels._launch import cdiv, on_device, power_of_2, rotary_tables

TOKENS = 8  # of one program
WARPS = 4


@triton.jit(do_not_specialize=["N", "n_heads"])
def ray_encoding_kernel(
    p_x,
    p_m,
    p_cos,
    p_sin,
    p_y,
    p_growth,
    stride_xb,
    stride_xn,
    stride_xh,
    stride_xd,
    stride_mb,
    stride_mn,
    stride_mr,
    stride_mc,
    stride_cb,
    stride_cn,
    stride_cd,
    N,
    n_heads,
    scale,
    D: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    ROTARY: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """All heads of BN tokens of one sample."""
    HALF: tl.constexpr = D // 2
    i_b = tl.program_id(1).to(tl.int64)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    m_n, m_d = (o_n < N)[:, None], (o_d < D)[None, :]
    first, second = (o_d < HALF)[None, :], ((o_d >= HALF) & (o_d < D))[None, :]
    o_n = o_n.to(tl.int64)

    r_m = p_m + i_b * stride_mb + o_n[:, None] * stride_mn + (o_d % 4)[None, :] * stride_mr
    by_0 = tl.load(r_m, mask=m_n & first, other=0.0).to(tl.float32)
    by_1 = tl.load(r_m + stride_mc, mask=m_n & first, other=0.0).to(tl.float32)
    by_2 = tl.load(r_m + 2 * stride_mc, mask=m_n & first, other=0.0).to(tl.float32)
    by_3 = tl.load(r_m + 3 * stride_mc, mask=m_n & first, other=0.0).to(tl.float32)
    four = o_d // 4 * 4
    d_0, d_1 = tl.where(o_d < HALF, four, o_d), tl.where(o_d < HALF, four + 1, o_d ^ 1)
    if ROTARY:
        r_c = i_b * stride_cb + o_n[:, None] * stride_cn + ((o_d - HALF) // 2)[None, :] * stride_cd
        sin = tl.load(p_sin + r_c, mask=m_n & second, other=0.0).to(tl.float32)
        by_0 += tl.load(p_cos + r_c, mask=m_n & second, other=0.0).to(tl.float32)
        by_1 += tl.where((o_d % 2 == 0)[None, :], -sin, sin)
    else:
        by_0 += tl.where(second, 1.0, 0.0)

    p_x += i_b * stride_xb + o_n[:, None] * stride_xn
    rows = i_b * N + o_n
    for i_h in range(n_heads):
        p_head = p_x + tl.cast(i_h, tl.int64) * stride_xh
        y = by_0 * tl.load(p_head + d_0[None, :] * stride_xd, mask=m_n & m_d, other=0.0).to(tl.float32)
        y += by_1 * tl.load(p_head + d_1[None, :] * stride_xd, mask=m_n & m_d, other=0.0).to(tl.float32)
        y += by_2 * tl.load(p_head + (four + 2)[None, :] * stride_xd, mask=m_n & first, other=0.0).to(tl.float32)
        y += by_3 * tl.load(p_head + (four + 3)[None, :] * stride_xd, mask=m_n & first, other=0.0).to(tl.float32)
        y *= scale
        if LIMIT:
            x = tl.load(p_head + o_d[None, :] * stride_xd, mask=m_n & m_d, other=0.0).to(tl.float32) * scale
            before, after = tl.sum(x * x, 1), tl.sum(y * y, 1)
            factor = tl.minimum(tl.sqrt((before / D + 1e-6) / (after / D + 1e-6)), 1.0)
            y *= factor[:, None]
            before = tl.maximum(tl.sqrt(before), 1e-6)
            ratio = tl.maximum(tl.sqrt(after) * factor, 1e-6) / before
            tl.store(p_growth + rows * n_heads + i_h, ratio * ratio, mask=o_n < N)
        p_out = p_y + (rows[:, None] * n_heads + i_h) * D + o_d[None, :]
        tl.store(p_out, y.to(p_y.dtype.element_ty), mask=m_n & m_d)


def ray_encoding_fwd(x, matrices, cos, sin, scale, limit):
    """(y, growth), the latter (B, N, H) with `limit`, else empty."""
    B, N, H, D = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    growth = torch.empty(x.shape[:3] if limit else (0,), dtype=torch.float32, device=x.device)
    if y.numel() == 0:
        return y, growth
    tables, strides = (x, x), (0, 0, 0)
    if cos is not None:
        tables, strides = rotary_tables(cos, sin)
    with on_device(x):
        ray_encoding_kernel[(cdiv(N, TOKENS), B)](
            x, matrices, *tables, y, growth, *x.stride(), *matrices.stride(), *strides, N, H, scale,
            D=D, BD=power_of_2(D), BN=TOKENS, ROTARY=cos is not None, LIMIT=limit, num_warps=WARPS,
        )  # fmt: skip
    return y, growth
