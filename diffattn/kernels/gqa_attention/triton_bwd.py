"""Triton kernels for grouped-query attention, backward: rows' sums, then dq, then dk and dv, each its own kernel.

dk and dv of one key block are summed over all query heads of its group inside one program, so no atomics.
"""

import torch

from diffattn.kernels._launch import cdiv, on_device
from diffattn.kernels.gqa_attention.triton import (
    ADDITIVE_MASK,
    block_loads,
    dot_precision,
    fitting,
    head_block,
    mask_has_rows,
    mask_kind,
    mask_strides,
    prob_shift,
)
from diffattn.kernels.gqa_attention.triton_dkv import gqa_attention_dkv_bwd_kernel
from diffattn.kernels.gqa_attention.triton_dq import gqa_attention_dq_bwd_kernel, gqa_attention_rows_bwd_kernel

# Of dq and of dk and dv: (rows, keys, warps, stages), by whether elements take 4 bytes and by padded head dim.
_CONFIGS = {
    (False, 16): ((128, 64, 4, 3), (64, 64, 4, 3)),
    (False, 32): ((128, 64, 4, 3), (64, 64, 4, 3)),
    (False, 64): ((128, 64, 8, 3), (64, 128, 8, 3)),
    (False, 128): ((128, 64, 8, 2), (64, 128, 8, 2)),
    (False, 256): ((64, 32, 4, 2), (64, 32, 8, 1)),
    (True, 16): ((64, 32, 4, 2), (64, 64, 4, 2)),
    (True, 32): ((64, 32, 4, 2), (64, 64, 4, 2)),
    (True, 64): ((64, 32, 4, 2), (32, 64, 4, 2)),
    (True, 128): ((32, 32, 4, 1), (64, 32, 8, 1)),
    (True, 256): ((16, 32, 8, 1), (32, 16, 8, 1)),
}


def _configs(dtype, width, masked, device):
    dq, dkv = (fitting(config, dtype, width, device) for config in _CONFIGS[(dtype.itemsize == 4, width)])
    if not masked:
        return dq, dkv
    # A mask tile takes registers and shared memory of its own: halve the block that the loop runs over.
    return (dq[0], max(16, dq[1] // 2), dq[2], 2), (max(16, dkv[0] // 2), dkv[1], dkv[2], 2)


def _gain(grad, v):
    """A power of two, on the device, that keeps float16 dS inside float16: |dS| <= 2 max|dO| max|V| E."""
    bound = torch.linalg.vector_norm(grad, float("inf")).float() * torch.linalg.vector_norm(v, float("inf")).float()
    return torch.exp2(torch.floor(-torch.log2((bound * (2 * v.shape[-1])).clamp_min(1e-30))))


def gqa_attention_bwd(grad, q, k, v, mask, out, stats, residual, scale, configs=None):
    """Launch the backward kernels: dq, dk and dv, contiguous, in the dtype of q.

    Args: as the operator `diffattn::gqa_attention_backward`. configs: (rows, keys, warps, stages) of dq and of
        dk and dv.
    """
    B, N, H, D = q.shape
    M, Hkv, E = v.shape[1:]
    dq, dk, dv = q.new_empty(B, N, H, D), q.new_empty(B, M, Hkv, D), q.new_empty(B, M, Hkv, E)
    if out.numel() == 0 or v.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    width = head_block(D, E)
    dq_config, dkv_config = configs or _configs(q.dtype, width, mask is not None, q.device)
    gained = q.dtype == torch.float16
    additive = mask_kind(mask) == ADDITIVE_MASK
    base, delta = q.new_empty((2, B, H, N), dtype=torch.float32)
    p_mask = q if mask is None else mask
    sizes = (scale, N, M, Hkv, H // Hkv)
    strides = (*q.stride(), *k.stride(), *v.stride(), *grad.stride(), *mask_strides(mask))
    constants = {
        "D": D,
        "E": E,
        "BD": width,
        "BE": width,
        "MASK": mask_kind(mask),
        "MASK_ROWS": mask_has_rows(mask),
        "GAINED": gained,
        "SHIFT": prob_shift(q.dtype),
        "PRECISION": dot_precision(q.dtype),
    }
    with on_device(q):
        gain = _gain(grad, v) if gained else stats
        gqa_attention_rows_bwd_kernel[(cdiv(N, 64) * B * H,)](
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
            BE=width,
            BN=64,
            ADDITIVE=additive,
            RESIDUAL=residual.numel() > 0,
            GAINED=gained,
            SHIFT=prob_shift(q.dtype),
        )
        rest = (base, stats[1], delta, gain)
        rows, keys, warps, stages = dq_config
        (k_arg, v_arg), loads = block_loads((k, keys, width), (v, keys, width))
        gqa_attention_dq_bwd_kernel[(cdiv(H // Hkv * N, rows) * B * Hkv,)](
            q,
            k_arg,
            v_arg,
            p_mask,
            grad,
            *rest,
            dq,
            *sizes,
            *strides,
            **constants,
            **loads,
            BN=rows,
            BM=keys,
            num_warps=warps,
            num_stages=stages,
        )
        rows, keys, warps, stages = dkv_config
        (q_arg, grad_arg), loads = block_loads((q, rows, width), (grad, rows, width))
        gqa_attention_dkv_bwd_kernel[(cdiv(M, keys) * B * Hkv,)](
            q_arg,
            k,
            v,
            p_mask,
            grad_arg,
            *rest,
            dk,
            dv,
            *sizes,
            *strides,
            **constants,
            **loads,
            BN=rows,
            BM=keys,
            num_warps=warps,
            num_stages=stages,
        )
    return dq, dk, dv
