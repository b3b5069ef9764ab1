"""What the grouped-query attention kernels share: loading tiles, masks, precision, tensor descriptors."""

import functools

import torch
import triton
import triton.language as tl

from diffattn.kernels._backend import small_shared_memory
from diffattn.kernels._launch import padded

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # triton < 3.4
    TensorDescriptor = None

LOG2E = 1.4426950408889634


def fitting(config, dtype, width, device):
    """(rows, keys, warps, stages), smaller where shared memory is small: compiled for such GPUs, measured on none."""
    if not small_shared_memory(device) or width * dtype.itemsize < 512:
        return config
    rows, keys, warps, _ = config
    return max(16, rows // 2), max(16, keys // 2), warps, 1


# Kinds of mask, a compile-time choice.
NO_MASK, BOOL_MASK, ADDITIVE_MASK = 0, 1, 2


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


def head_block(*sizes: int) -> int:
    """The padded size of the largest: a power of two, at least what a matrix instruction takes.

    Queries, keys and values take one width together. Where keys were wider than values their tiles had different
    swizzles at one shared-memory address, and ptxas 12.8, which Triton 3.6 and 3.7 bring, made the address of the
    value tile from a register that held something else: an illegal memory access. Head dims seldom differ.
    """
    return padded(max(sizes))


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
    """Three products of 10-bit parts, for float32: about 1e-6 off. True float32 products spill thousands of bytes."""
    return "tf32x3" if dtype == torch.float32 else "ieee"


@functools.cache
def _device_has_tma(device) -> bool:
    return TensorDescriptor is not None and (device.type == "cpu" or torch.cuda.get_device_capability(device)[0] >= 9)


def tma_reads(x) -> bool:
    return tma_strides(x.itemsize, x.shape, x.stride()) and x.data_ptr() % 16 == 0


def tma_strides(size: int, shape, strides) -> bool:
    """Whether a tensor of such a layout, `size` bytes an element, may have a descriptor."""
    rows = zip(shape[:3], strides[:3], strict=True)
    return strides[3] == 1 and 0 not in shape and all(n == 1 or (s > 0 and s * size % 16 == 0) for n, s in rows)


def block_loads(*tensors_and_blocks):
    """How a kernel's loop reads each (tensor, rows, head block): descriptors if every tensor allows, else pointers.

    Returns: the arguments to pass for the tensors, and the constants TMA and WIDE of `load_block`.
    """
    tensors = [x for x, _, _ in tensors_and_blocks]
    if _device_has_tma(tensors[0].device) and all(map(tma_reads, tensors)):
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
