"""Triton kernels for grouped-query attention, forward: FlashAttention-2 with the query heads of a group packed.

The query heads that share a key/value head are one long list of rows, r = g * N + n, so a tile of rows is full
even for a few queries and a key block is read once for all of them. Sums, the softmax and the accumulator are
float32; every output element is written by one program, so results repeat bit for bit.
"""

import functools

import torch
import triton
import triton.language as tl

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # triton < 3.4
    TensorDescriptor = None

# Kinds of mask, a compile-time choice.
NO_MASK, BOOL_MASK, ADDITIVE_MASK = 0, 1, 2

LOG2E = 1.4426950408889634


@triton.jit
def load_block(
    p_x,
    i_b,
    i_h,
    i_n,
    N,
    stride_b,
    stride_n,
    stride_h,
    stride_d,
    D: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    EDGE: tl.constexpr,
    TMA: tl.constexpr,
    WIDE: tl.constexpr,
):
    """x[i_b, i_n : i_n + BN, i_h] as [BN, BD], zeros outside. EDGE: the block may reach past N.

    TMA: p_x is a tensor descriptor. WIDE: BN rows span 2 ** 31 elements or more.
    """
    # Triton compiles what follows a return, so the two ways of loading have to be two branches.
    if TMA:
        b_x = p_x.load([tl.cast(i_b, tl.int32), tl.cast(i_n, tl.int32), tl.cast(i_h, tl.int32), 0])
        b_x = b_x.reshape([BN, BD])
    else:
        o_n = tl.arange(0, BN)
        o_d = tl.arange(0, BD)
        m_x = (o_d < D)[None, :]
        if EDGE:
            m_x = m_x & (i_n + o_n < N)[:, None]
        if WIDE:
            o_n = o_n.to(tl.int64)
            o_d = o_d.to(tl.int64)
        p_x += i_b * stride_b + i_h * stride_h + tl.cast(i_n, tl.int64) * stride_n
        p_x = p_x + (o_n[:, None] * stride_n + o_d[None, :] * stride_d)
        if EDGE or D != BD:
            b_x = tl.load(p_x, mask=m_x, other=0.0)
        else:
            b_x = tl.load(p_x)
    return b_x


@triton.jit
def masked_scores(b_x, p_mask, o_m, stride_m, m_edge, MASK: tl.constexpr):
    """Scores in log2 units after the mask.

    p_mask points to the rows of the tile or, where all its rows share one, is a scalar; o_m are the keys, and the
    tile may lie either way round.
    """
    if MASK == 1:
        b_keep = tl.load(p_mask + o_m.to(tl.int64) * stride_m, mask=m_edge, other=0)
        b_x = tl.where(b_keep != 0, b_x, float("-inf"))
    if MASK == 2:
        b_add = tl.load(p_mask + o_m.to(tl.int64) * stride_m, mask=m_edge, other=0.0).to(tl.float32)
        # The lowest finite numbers overflow when they change to log2 units; they are not -inf, they stay finite.
        b_x += tl.where(b_add == float("-inf"), b_add, tl.maximum(b_add * 1.4426950408889634, -3.4028234e38))
    return b_x


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
    TMA: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One block of keys. TAIL: the block reaches past the last key."""
    o_m = i_m + tl.arange(0, BM)
    b_k = load_block(
        p_k, i_b, i_kv, i_m, M, stride_kb, stride_km, stride_kh, stride_kd, D, BD, BM, TAIL, TMA, WIDE
    )  # [BM, BD]
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
    TMA: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One tile of BN packed query rows against every key of their head. scale includes log2(e)."""
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
    # The maximum is taken before the scale is applied, so the scale has to be positive.
    b_q = tl.where(scale < 0, -b_q, b_q)
    scale = tl.abs(scale)
    p_mask += i_b * stride_mask_b
    if MASK_ROWS:
        p_mask = p_mask + (o_h * stride_mask_h + o_n * stride_mask_n)[:, None]

    b_acc = tl.zeros([BN, BE], dtype=tl.float32)
    b_l = tl.zeros([BN], dtype=tl.float32)
    b_m = tl.full([BN], float("-inf"), dtype=tl.float32)
    M_full = M // BM * BM
    for i_m in range(0, M_full, BM):
        b_acc, b_l, b_m = _fwd_step(
            b_acc, b_l, b_m, b_q, i_b, i_kv, i_m, p_k, p_v, p_mask, m_r, scale, M,
            stride_kb, stride_km, stride_kh, stride_kd, stride_vb, stride_vm, stride_vh, stride_ve, stride_mask_m,
            D, E, BD, BE, BM, MASK, MASK_ROWS, False, SHIFT, PRECISION, TMA, WIDE,
        )  # fmt: skip
    if M_full < M:
        b_acc, b_l, b_m = _fwd_step(
            b_acc, b_l, b_m, b_q, i_b, i_kv, M_full, p_k, p_v, p_mask, m_r, scale, M,
            stride_kb, stride_km, stride_kh, stride_kd, stride_vb, stride_vm, stride_vh, stride_ve, stride_mask_m,
            D, E, BD, BE, BM, MASK, MASK_ROWS, True, SHIFT, PRECISION, TMA, WIDE,
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


# (rows, keys, warps, stages) by whether elements take 4 bytes and by the padded head dim; the last fits all.
_CONFIGS = {
    (False, 16): (128, 128, 4, 3),
    (False, 32): (128, 128, 4, 3),
    (False, 64): (128, 128, 8, 3),
    (False, 128): (128, 64, 8, 3),
    (False, 256): (128, 32, 8, 2),
    (True, 16): (64, 64, 4, 2),
    (True, 32): (64, 64, 4, 2),
    (True, 64): (64, 32, 4, 2),
    (True, 128): (64, 32, 8, 2),
    (True, 256): (32, 16, 4, 2),
}


def _config(dtype, width, mask_has_rows):
    rows, keys, warps, stages = _CONFIGS[(dtype.itemsize == 4, width)]
    # A mask tile takes registers and shared memory of its own.
    return (rows, max(16, keys // 2), warps, 2) if mask_has_rows else (rows, keys, warps, stages)


def block(size: int) -> int:
    """The padded size of a head: a power of two, at least what a matrix instruction takes."""
    return max(16, triton.next_power_of_2(size))


def mask_kind(mask) -> int:
    if mask is None:
        return NO_MASK
    return BOOL_MASK if mask.dtype == torch.bool else ADDITIVE_MASK


def mask_strides(mask) -> tuple[int, ...]:
    """Strides that read a mask of 4 axes as if it were expanded: 0 along broadcast axes."""
    if mask is None:
        return (0, 0, 0, 0)
    return tuple(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True))


def mask_has_rows(mask) -> bool:
    """Whether the mask differs from query to query or from head to head."""
    return mask is not None and (mask.shape[1] > 1 or mask.shape[2] > 1)


def prob_shift(dtype) -> float:
    """log2 of the factor that keeps float16 probabilities out of the subnormal numbers; at most 2 ** 15 there."""
    return 15.0 if dtype == torch.float16 else 0.0


def dot_precision(dtype) -> str:
    return "ieee"


@functools.cache
def _device_has_tma(device) -> bool:
    return TensorDescriptor is not None and (device.type == "cpu" or torch.cuda.get_device_capability(device)[0] >= 9)


def _tma_reads(x) -> bool:
    size = x.itemsize
    return (
        x.stride(-1) == 1
        and x.numel() > 0
        and x.data_ptr() % 16 == 0
        and all(n == 1 or (s > 0 and s * size % 16 == 0) for n, s in zip(x.shape[:3], x.stride()[:3], strict=True))
    )


def block_loads(*tensors_and_blocks):
    """How a kernel's loop reads each (tensor, rows, head block): descriptors if every tensor allows, else pointers.

    Returns: the arguments to pass for the tensors, and the constants TMA and WIDE of `load_block`.
    """
    tensors = [x for x, _, _ in tensors_and_blocks]
    if _device_has_tma(tensors[0].device) and all(map(_tma_reads, tensors)):
        described = [
            # The stride of an axis of size 1 is never used, but has to be a valid one.
            TensorDescriptor(
                x,
                x.shape,
                [16 if n == 1 else s for n, s in zip(x.shape[:3], x.stride()[:3], strict=True)] + [1],
                [1, rows, 1, width],
            )
            for x, rows, width in tensors_and_blocks
        ]
        return described, {"TMA": True, "WIDE": False}
    wide = any(rows * abs(x.stride(1)) + width * abs(x.stride(3)) >= 2**31 for x, rows, width in tensors_and_blocks)
    return tensors, {"TMA": False, "WIDE": wide}


def gqa_attention_fwd(q, k, v, mask, scale, training, config=None):
    """Launch the forward kernel.

    Args: as the operator `diffattn::gqa_attention`; mask has 4 axes. config: (rows, keys, warps, stages).
    Returns: out (B, N, H, E); with `training` also stats (2, B, H, N) float32, which hold each row's maximum in
        log2 units and the reciprocal of its sum, and, in half precision, the residual that rounding took from
        out, in the dtype of out. Without it both are empty.
    """
    B, N, H, D = q.shape
    M, Hkv, E = v.shape[1:]
    G = H // Hkv
    half = q.dtype.itemsize < 4
    out = q.new_empty(B, N, H, E)
    stats = q.new_empty((2, B, H, N) if training else (0,), dtype=torch.float32)
    residual = q.new_empty((B, N, H, E) if training and half else (0,))
    if out.numel() == 0:
        return out, stats, residual
    BD, BE = block(D), block(E)
    rows, keys, warps, stages = config or _config(q.dtype, max(BD, BE), mask_has_rows(mask))
    # A few queries do not fill the tile.
    rows = min(rows, block(G * N))
    (k_arg, v_arg), loads = block_loads((k, keys, BD), (v, keys, BE))
    with torch.cuda.device_of(q):
        gqa_attention_fwd_kernel[(triton.cdiv(G * N, rows) * B * Hkv,)](
            q,
            k_arg,
            v_arg,
            q if mask is None else mask,
            out,
            residual,
            stats[0] if training else stats,
            stats[1] if training else stats,
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
            BD=BD,
            BE=BE,
            BN=rows,
            BM=keys,
            MASK=mask_kind(mask),
            MASK_ROWS=mask_has_rows(mask),
            TRAINING=training,
            RESIDUAL=training and half,
            SHIFT=prob_shift(q.dtype),
            PRECISION=dot_precision(q.dtype),
            **loads,
            num_warps=warps if rows >= 64 else 4,
            num_stages=stages,
        )
    return out, stats, residual
