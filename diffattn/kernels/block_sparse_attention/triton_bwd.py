"""Launching the backward of block-sparse attention: rows' sums, then dq, then dk and dv, each its own kernel.

dk and dv of one block of keys are summed over all queries that attend to it inside one program, so no atomics.
"""

import torch

from diffattn.kernels._launch import on_device
from diffattn.kernels.block_sparse_attention.blocks import lists_of_queries, number_of_blocks
from diffattn.kernels.block_sparse_attention.triton import bias_in_log2, fit, list_strides
from diffattn.kernels.block_sparse_attention.triton_dkv import block_sparse_attention_dkv_bwd_kernel
from diffattn.kernels.block_sparse_attention.triton_dq import block_sparse_attention_dq_bwd_kernel
from diffattn.kernels.gqa_attention.triton import (
    block_loads,
    dot_precision,
    fitting,
    head_block,
    prob_shift,
)
from diffattn.kernels.gqa_attention.triton_bwd import _gain
from diffattn.kernels.gqa_attention.triton_dq import gqa_attention_rows_bwd_kernel

# Of dq and of dk and dv: (rows, keys, warps, stages), by whether elements take 4 bytes and by padded head dim.
_CONFIGS = {
    (False, 16): ((128, 64, 4, 3), (64, 64, 4, 3)),
    (False, 32): ((128, 64, 4, 3), (64, 64, 4, 3)),
    (False, 64): ((128, 64, 8, 3), (64, 64, 4, 3)),
    (False, 128): ((128, 64, 8, 2), (64, 64, 8, 2)),
    (False, 256): ((64, 32, 4, 2), (32, 64, 8, 1)),
    (True, 16): ((64, 32, 4, 2), (64, 64, 4, 2)),
    (True, 32): ((64, 32, 4, 2), (64, 64, 4, 2)),
    (True, 64): ((64, 32, 4, 2), (32, 64, 4, 2)),
    (True, 128): ((32, 32, 4, 1), (64, 32, 8, 1)),
    (True, 256): ((16, 32, 8, 1), (32, 16, 8, 1)),
}


def block_sparse_attention_bwd(
    grad, q, k, v, blocks, q_places, k_places, bias, out, stats, residual, scale, configs=None
):
    """Launch the backward kernels: dq, dk and dv, contiguous, in the dtype of q.

    Args: as the operator `diffattn::block_sparse_attention_backward`. configs: (rows, keys, warps, stages) of dq and
        of dk and dv.
    """
    B, N, H, _ = q.shape
    E = v.shape[-1]
    if out.numel() == 0 or v.numel() == 0:
        return tuple(x.new_zeros(x.shape) for x in (q, k, v))
    gained = q.dtype == torch.float16
    base, delta = q.new_empty((2, B, H, N), dtype=torch.float32)
    with on_device(q):
        gain = _gain(grad, v) if gained else stats
        gqa_attention_rows_bwd_kernel[(number_of_blocks(N, 64) * B * H,)](
            out,
            residual,
            grad,
            stats[0],
            stats[1],
            gain,
            base,
            delta,
            N,
            H,
            *grad.stride(),
            E=E,
            BE=head_block(E),
            BN=64,
            ADDITIVE=bias is not None,
            RESIDUAL=residual.numel() > 0,
            GAINED=gained,
            SHIFT=prob_shift(q.dtype),
        )
    rest = (base, stats[1], delta, gain)
    return _launch(grad, q, k, v, blocks, q_places, k_places, bias, rest, scale, False, configs)


def block_sparse_sum_bwd(grad, grad_total, q, k, v, blocks, scale, configs=None):
    """As `block_sparse_attention_bwd`, for `diffattn::block_sparse_sum`. grad_total: (B, N, H) float32."""
    if grad.numel() == 0 or v.numel() == 0:
        return tuple(x.new_zeros(x.shape) for x in (q, k, v))
    delta = grad_total.transpose(1, 2).contiguous()
    return _launch(grad, q, k, v, blocks, None, None, None, (delta, delta, delta, delta), scale, True, configs)


def _launch(grad, q, k, v, blocks, q_places, k_places, bias, rest, scale, product, configs):
    B, N, H, D = q.shape
    M, Hkv, E = v.shape[1:]
    dq, dk, dv = q.new_empty(B, N, H, D), q.new_empty(B, M, Hkv, D), q.new_empty(B, M, Hkv, E)
    width = head_block(D, E)
    configs = configs or _CONFIGS[(q.dtype.itemsize == 4, width)]
    dq_config, dkv_config = (fitting(config, q.dtype, width, q.device) for config in configs)
    bias = bias_in_log2(bias)
    checks = tuple(rest[0] if x is None else x for x in (q_places, k_places, bias))
    bias_stride = 0 if bias is None or bias.shape[0] == 1 else bias.stride(0)
    strides = (*q.stride(), *k.stride(), *v.stride(), *grad.stride())
    constants = {
        "D": D,
        "E": E,
        "BD": width,
        "BE": width,
        "ROWS": blocks.rows,
        "KEYS": blocks.keys,
        "PLACED": q_places is not None,
        "BIASED": bias is not None,
        "PRODUCT": product,
        "GAINED": q.dtype == torch.float16 and not product,
        "SHIFT": 0.0 if product else prob_shift(q.dtype),
        "PRECISION": dot_precision(q.dtype),
    }
    with on_device(q):
        rows, keys, warps, stages = fit(dq_config, blocks.rows, blocks.keys)
        (k_arg, v_arg), loads = block_loads((k, keys, width), (v, keys, width))
        tiles = number_of_blocks(N, rows)
        block_sparse_attention_dq_bwd_kernel[(tiles * B * H,)](
            q,
            k_arg,
            v_arg,
            grad,
            blocks.index,
            blocks.full,
            blocks.count,
            *checks,
            *rest,
            dq,
            scale,
            N,
            M,
            H,
            H // Hkv,
            blocks.index.shape[-1],
            tiles,
            *strides,
            *list_strides(blocks.count),
            bias_stride,
            **constants,
            **loads,
            BN=rows,
            BM=keys,
            num_warps=warps,
            num_stages=stages,
        )
        index, full, count = lists_of_queries(blocks, M, H, Hkv)
        keys, rows, warps, stages = fit((dkv_config[1], dkv_config[0], *dkv_config[2:]), blocks.keys, blocks.rows)
        (q_arg, grad_arg), loads = block_loads((q, rows, width), (grad, rows, width))
        tiles = number_of_blocks(M, keys)
        block_sparse_attention_dkv_bwd_kernel[(tiles * B * Hkv,)](
            q_arg,
            k,
            v,
            grad_arg,
            index,
            full,
            count,
            *checks,
            *rest,
            dk,
            dv,
            scale,
            N,
            M,
            H,
            H // Hkv,
            index.shape[-1],
            tiles,
            number_of_blocks(N, blocks.rows),
            *strides,
            *list_strides(count),
            bias_stride,
            **constants,
            **loads,
            BN=rows,
            BM=keys,
            num_warps=warps,
            num_stages=stages,
        )
    return dq, dk, dv
