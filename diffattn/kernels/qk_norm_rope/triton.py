"""The Triton kernel for RMS norm and rotary embedding of queries and keys, one launch for both, and its launcher.

A program holds a tile of T tokens and HB heads, features innermost, so that a thread loads 16 bytes. With a norm for
each head, the heads of the tile are in a thread's registers: it reads cos and sin once for all of them. With a norm
across heads the program walks over all heads of its tokens twice, the second time out of the L1 cache.

Features enter the arithmetic as two planes, the first and the second of each pair, whether pairs are neighbours (one
load, split in registers) or half a head apart (two loads; a third plane then has the features that do not rotate).
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from diffattn.kernels._launch import Step, cdiv, on_device, power_of_2, rotary_tables


@triton.jit
def offsets(BLOCK: tl.constexpr, HALVES: tl.constexpr):
    """0 to BLOCK - 1 along the features.

    HALVES: the compiler sees 4 in a row and not more, since cos and sin are loaded by 4 and the threads should then
    hold the same features of everything. In bfloat16 they would hold 8, and tiles would change hands.
    """
    o_d = tl.arange(0, BLOCK)
    if HALVES:
        o_d = o_d // 4 * 4 + o_d % 4
    return o_d[None, None, :]


@triton.jit
def load_plane(p, n: tl.constexpr, BLOCK: tl.constexpr, HALVES: tl.constexpr, m_row):
    """The first n features of rows, float32, padded with zeros."""
    o_d = offsets(BLOCK, HALVES)
    if n == BLOCK:
        b_x = tl.load(p + o_d, mask=m_row, other=0.0)
    else:
        b_x = tl.load(p + o_d, mask=m_row & (o_d < n), other=0.0)
    return b_x.to(tl.float32)


@triton.jit
def load_planes(p, m_row, D: tl.constexpr, R: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr, HALVES: tl.constexpr):
    """First of each pair, second of each pair, and, where BC > 0, the features outside both."""
    if HALVES:
        b_a = load_plane(p, R // 2, BD // 2, HALVES, m_row)
        b_b = load_plane(p + R // 2, R // 2, BD // 2, HALVES, m_row)
    else:
        b_x = load_plane(p, D, BD, HALVES, m_row)
        b_a, b_b = tl.split(tl.reshape(b_x, (b_x.shape[0], b_x.shape[1], BD // 2, 2)))
    b_c = b_a
    if BC > 0:
        b_c = load_plane(p + R, D - R, BC, HALVES, m_row)
    return b_a, b_b, b_c


@triton.jit
def store_plane(p, b_x, n: tl.constexpr, BLOCK: tl.constexpr, HALVES: tl.constexpr, m_row):
    o_d = offsets(BLOCK, HALVES)
    if n == BLOCK:
        tl.store(p + o_d, b_x.to(p.dtype.element_ty), mask=m_row)
    else:
        tl.store(p + o_d, b_x.to(p.dtype.element_ty), mask=m_row & (o_d < n))


@triton.jit
def store_planes(
    p, b_a, b_b, b_c, m_row, D: tl.constexpr, R: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr, HALVES: tl.constexpr
):
    """The inverse of `load_planes`."""
    if HALVES:
        store_plane(p, b_a, R // 2, BD // 2, HALVES, m_row)
        store_plane(p + R // 2, b_b, R // 2, BD // 2, HALVES, m_row)
    else:
        b_x = tl.reshape(tl.join(b_a, b_b), (b_a.shape[0], b_a.shape[1], BD))
        store_plane(p, b_x, D, BD, HALVES, m_row)
    if BC > 0:
        store_plane(p + R, b_c, D - R, BC, HALVES, m_row)


@triton.jit
def sum_squares(b_a, b_b, b_c, BC: tl.constexpr):
    """Over the features, which stay as an axis of 1."""
    total = tl.sum(b_a * b_a + b_b * b_b, 2)[:, :, None]
    if BC > 0:
        total += tl.sum(b_c * b_c, 2)[:, :, None]
    return total


@triton.jit
def norm_rope_tile(
    p_x,
    p_w,
    p_cos,
    p_sin,
    p_o,
    eps,
    N,
    stride_b,
    stride_n,
    stride_h,
    stride_tb,
    stride_tn,
    stride_td,
    i_program,
    H: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    BD: tl.constexpr,
    BC: tl.constexpr,
    HB: tl.constexpr,
    T: tl.constexpr,
    HALVES: tl.constexpr,
    NORM: tl.constexpr,
    ACROSS: tl.constexpr,
    ALIGN: tl.constexpr,
    TABLE_ALIGN: tl.constexpr,
):
    """One program's work on one tensor.

    R features rotate, none if 0; BD is their padded number with HALVES, where BC is that of the rest, and that of all
    features otherwise. NORM: 0 none, 1 without a weight, 2 with one. Strides of x are multiples of ALIGN, those of
    the tables of TABLE_ALIGN but for stride_td: the compiler by itself only sees multiples of 16, and without a
    common factor it loads one element at a time.
    """
    stride_b = stride_b // ALIGN * ALIGN
    stride_n = stride_n // ALIGN * ALIGN
    stride_h = stride_h // ALIGN * ALIGN
    stride_tb = stride_tb // TABLE_ALIGN * TABLE_ALIGN
    stride_tn = stride_tn // TABLE_ALIGN * TABLE_ALIGN
    STEPS: tl.constexpr = (H + HB - 1) // HB
    n_tiles = tl.cdiv(N, T)
    if ACROSS:
        i_tile = i_program
        i_h = 0
        n_steps: tl.constexpr = STEPS
        o_t = tl.arange(0, T)[:, None, None]
        o_h = tl.arange(0, HB)[None, :, None]
    else:
        # Neighbours share a token's line of the tables, and of memory.
        i_tile = i_program // STEPS
        i_h = i_program % STEPS * HB
        n_steps: tl.constexpr = 1
        o_t = tl.arange(0, T)[None, :, None]
        o_h = tl.arange(0, HB)[:, None, None]
    i_b = (i_tile // n_tiles).to(tl.int64)
    i_n = (i_tile % n_tiles).to(tl.int64) * T
    m_t = o_t < N - i_n
    o_t = o_t.to(tl.int64)
    p_x = p_x + i_b * stride_b + (i_n + o_t) * stride_n
    p_o = p_o + ((i_b * N + i_n) + o_t) * (H * D)

    if R > 0:
        o_p = tl.arange(0, BD // 2)[None, None, :]
        o_table = i_b * stride_tb + (i_n + o_t) * stride_tn + o_p * stride_td
        m_table = m_t & (o_p < R // 2)
        if ACROSS:
            # Spread over the heads, as the features are: no thread then needs what another one has loaded.
            o_table += o_h * 0
            m_table = m_table & (o_h >= 0)
        b_cos = tl.load(p_cos + o_table, mask=m_table, other=1.0).to(tl.float32)
        b_sin = tl.load(p_sin + o_table, mask=m_table, other=0.0).to(tl.float32)

    if NORM > 0 and ACROSS:
        b_total = tl.zeros((T, HB, 1), tl.float32)
        for s in tl.static_range(n_steps):
            o_hs = (o_h + s * HB).to(tl.int64)
            m_row = m_t
            if H % HB != 0:
                m_row = m_t & (o_hs < H)
            p = p_x + o_hs * stride_h
            b_a, b_b, b_c = load_planes(p, m_row, D, R, BD, BC, HALVES)
            b_total += sum_squares(b_a, b_b, b_c, BC)
        b_scale = tl.rsqrt(tl.sum(b_total, 1)[:, None, :] / (H * D) + eps)

    for s in tl.static_range(n_steps):
        o_hs = (o_h + (i_h + s * HB)).to(tl.int64)
        m_row = m_t
        if H % HB != 0:
            m_row = m_t & (o_hs < H)
        p = p_x + o_hs * stride_h
        b_a, b_b, b_c = load_planes(p, m_row, D, R, BD, BC, HALVES)
        if NORM > 0:
            if not ACROSS:
                b_scale = tl.rsqrt(sum_squares(b_a, b_b, b_c, BC) / D + eps)
            b_a *= b_scale
            b_b *= b_scale
            b_c *= b_scale
        if NORM == 2:
            p_weight = p_w + o_t * 0
            m_weight = o_t >= 0
            if ACROSS:
                p_weight += o_hs * D
                m_weight = m_weight & (o_hs < H)
            w_a, w_b, w_c = load_planes(p_weight, m_weight, D, R, BD, BC, HALVES)
            b_a *= w_a
            b_b *= w_b
            b_c *= w_c
        if R > 0:
            b_first = b_a * b_cos - b_b * b_sin
            b_second = b_b * b_cos + b_a * b_sin
            if R < D and not HALVES:
                # Where cos is 1 and sin is 0, an infinite neighbour would still make a NaN.
                b_first = tl.where(o_p < R // 2, b_first, b_a)
                b_second = tl.where(o_p < R // 2, b_second, b_b)
            b_a = b_first
            b_b = b_second
        store_planes(p_o + o_hs * D, b_a, b_b, b_c, m_row, D, R, BD, BC, HALVES)


# What changes with the picture or with how the caller projects: one compiled kernel serves all.
_NUMBERS = [f"{x}_{n}" for x in "qk" for n in ("N", "stride_b", "stride_n", "stride_h", "stride_tb", "stride_tn")]


@triton.jit(do_not_specialize=["split", *_NUMBERS])
def qk_norm_rope_kernel(
    p_q,
    p_q_weight,
    p_q_cos,
    p_q_sin,
    p_q_out,
    p_k,
    p_k_weight,
    p_k_cos,
    p_k_sin,
    p_k_out,
    split,
    q_N,
    q_stride_b,
    q_stride_n,
    q_stride_h,
    q_stride_tb,
    q_stride_tn,
    q_stride_td,
    k_N,
    k_stride_b,
    k_stride_n,
    k_stride_h,
    k_stride_tb,
    k_stride_tn,
    k_stride_td,
    q_eps,
    k_eps,
    Q_H: tl.constexpr,
    Q_R: tl.constexpr,
    Q_BD: tl.constexpr,
    Q_BC: tl.constexpr,
    Q_HB: tl.constexpr,
    Q_T: tl.constexpr,
    Q_HALVES: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_H: tl.constexpr,
    K_R: tl.constexpr,
    K_BD: tl.constexpr,
    K_BC: tl.constexpr,
    K_HB: tl.constexpr,
    K_T: tl.constexpr,
    K_HALVES: tl.constexpr,
    K_NORM: tl.constexpr,
    D: tl.constexpr,
    ACROSS: tl.constexpr,
    ALIGN: tl.constexpr,
    TABLE_ALIGN: tl.constexpr,
):
    """Programs below `split` work on q, the others on k. K_H 0: there is no k."""
    i_program = tl.program_id(0)
    if K_H == 0:
        norm_rope_tile(
            p_q, p_q_weight, p_q_cos, p_q_sin, p_q_out, q_eps, q_N, q_stride_b, q_stride_n, q_stride_h, q_stride_tb,
            q_stride_tn, q_stride_td, i_program, Q_H, D, Q_R, Q_BD, Q_BC, Q_HB, Q_T, Q_HALVES, Q_NORM, ACROSS, ALIGN,
            TABLE_ALIGN,
        )  # fmt: skip
    elif i_program < split:
        norm_rope_tile(
            p_q, p_q_weight, p_q_cos, p_q_sin, p_q_out, q_eps, q_N, q_stride_b, q_stride_n, q_stride_h, q_stride_tb,
            q_stride_tn, q_stride_td, i_program, Q_H, D, Q_R, Q_BD, Q_BC, Q_HB, Q_T, Q_HALVES, Q_NORM, ACROSS, ALIGN,
            TABLE_ALIGN,
        )  # fmt: skip
    else:
        norm_rope_tile(
            p_k, p_k_weight, p_k_cos, p_k_sin, p_k_out, k_eps, k_N, k_stride_b, k_stride_n, k_stride_h, k_stride_tb,
            k_stride_tn, k_stride_td, i_program - split, K_H, D, K_R, K_BD, K_BC, K_HB, K_T, K_HALVES, K_NORM, ACROSS,
            ALIGN, TABLE_ALIGN,
        )  # fmt: skip


# Of a program with a norm for each head, and across heads: the fastest of 2, 4 and 8 on one H100 in bfloat16.
WARPS = {False: 2, True: 8}
# A tile of a norm across heads is read twice, so that those of all programs on a multiprocessor have to fit its L1.
ACROSS_BYTES = 16384


def _tile(H: int, D: int, R: int, halves: bool, across: bool, itemsize: int):
    """(BD, BC, HB, T) of `norm_rope_tile`: one 16-byte load for each thread of a program and each step."""
    BD = max(2, power_of_2(R if halves else D))
    BC = power_of_2(D - R) if halves and R < D else 0
    rows = max(1, WARPS[across] * 32 * (16 // itemsize) // max(BD, BC))
    if not across:
        heads = next(n for n in (4, 2, 1) if H % n == 0)
        return BD, BC, heads, rows
    # As few heads past the last one as can be, then as few steps.
    fitting = [
        n
        for n in (1 << i for i in range(rows.bit_length()))
        if n == rows or rows // n * H * D * itemsize <= ACROSS_BYTES
    ]
    heads = min(reversed(fitting), key=lambda n: -(-H // n) * n)
    return BD, BC, heads, rows // heads


class Layout(NamedTuple):
    """What a launch depends on of q, or of k, with its weight and tables: norm and R as in `norm_rope_tile`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    norm: int
    weight_dtype: torch.dtype
    R: int
    halves: bool
    table_dtype: torch.dtype
    table_strides: tuple[int, int, int]


def _entry(x, weight, eps, cos, sin, halves):
    """(tensors for the kernel, `Layout`). Where there is no weight or no table, x stands in its place."""
    if x.stride(3) != 1:
        x = x.contiguous()
    tables, table_strides, R = (x, x), (0, 0, 1), 0
    if cos is not None:
        tables, table_strides = rotary_tables(cos, sin)
        R = 2 * cos.shape[-1]
    norm = 0 if eps is None else 1 if weight is None else 2
    weight = weight.contiguous() if norm == 2 else x
    tensors = x, weight, *tables, torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return tensors, Layout(
        x.dtype, x.shape, x.stride(), norm, weight.dtype, R, halves and R > 0, tables[0].dtype, table_strides
    )


def _part(layout: Layout, across: bool):
    """(integers, constants, programs) of one tensor."""
    B, N, H, D = layout.shape
    BD, BC, HB, T = _tile(H, D, layout.R, layout.halves, across, layout.dtype.itemsize)
    programs = B * cdiv(N, T) * (1 if across else cdiv(H, HB))
    constants = dict(H=H, R=layout.R, BD=BD, BC=BC, HB=HB, T=T, HALVES=layout.halves, NORM=layout.norm)
    return (N, *layout.strides[:3], *layout.table_strides), constants, programs


@functools.lru_cache(maxsize=1024)
def _step(device: torch.device, across: bool, q: Layout, k: Layout | None) -> Step | None:
    """The launch for such tensors on such a GPU, None if there is nothing to do."""
    q_integers, q_constants, split = _part(q, across)
    if k is None:
        k_integers, k_constants, programs = q_integers, dict.fromkeys(q_constants, 0), split
    else:
        k_integers, k_constants, more = _part(k, across)
        programs = split + more
    if not programs:
        return None
    layouts = [x for x in (q, k) if x is not None]
    constants = {f"Q_{name}": value for name, value in q_constants.items()}
    constants |= {f"K_{name}": value for name, value in k_constants.items()}
    constants |= dict(
        D=q.shape[3], ACROSS=across,
        # of one feature a head, heads may be neighbours: so strides of 1 count as well
        ALIGN=math.gcd(16, *(s for x in layouts for n, s in zip(x.shape[:3], x.strides, strict=False) if n > 1)),
        TABLE_ALIGN=math.gcd(16, *(s for x in layouts for s in x.table_strides[:2])),
    )  # fmt: skip
    integers = split, *q_integers, *k_integers
    return Step(qk_norm_rope_kernel, (programs,), integers, constants, num_warps=WARPS[across])


def qk_norm_rope_fwd(
    q, k, q_weight, k_weight, q_eps, k_eps, q_cos, q_sin, k_cos, k_sin, q_halves, k_halves, across_heads
):
    """Launch the kernel. Arguments and return value: as the operator `diffattn::qk_norm_rope`."""
    tensors, layout = _entry(q, q_weight, q_eps, q_cos, q_sin, q_halves)
    if k is None:
        k_tensors, k_layout, outs = tensors, None, [tensors[-1]]
    else:
        k_tensors, k_layout = _entry(k, k_weight, k_eps, k_cos, k_sin, k_halves)
        outs = [tensors[-1], k_tensors[-1]]
    step = _step(q.device, across_heads, layout, k_layout)
    if step is not None:
        with on_device(q):
            step(*tensors, *k_tensors, numbers=(q_eps or 0.0, k_eps or 0.0))
    return outs
