"""Grouped-query attention in plain torch: the equation, at any dtype, without repeating a key or value head."""

import torch

from diffattn.kernels.gqa_attention.int8 import rotation_group


def gqa_attention_reference(q, k, v, mask=None, scale=None):
    """o_n = sum_m softmax_m(scale q_n . k_m + mask_nm) v_m, key/value head h // (H / Hkv) for query head h.

    The query heads that share a key/value head are laid one after another along the query axis, so keys and
    values enter two ordinary batched products as they are. Only standard operators, so it exports; every
    step is differentiable, the additive mask included. float16 and bfloat16 are computed in float32.

    Args:
        q: (B, N, H, D), any floating dtype.
        k: (B, M, Hkv, D); H is a multiple of Hkv.
        v: (B, M, Hkv, E).
        mask: broadcastable to (B, H, N, M); boolean (True = attend) or additive.
        scale: float; D ** -0.5 if None.
    Returns: (B, N, H, E) in the dtype of q. A query with every key masked gives zeros, and zero gradients.
    """
    if torch.is_autocast_enabled(q.device.type):
        # It would turn the float32 products back into half precision.
        with torch.autocast(q.device.type, enabled=False):
            return gqa_attention_reference(q, k, v, mask, scale)
    B, N, H, D = q.shape
    M, Hkv, E = v.shape[1:]
    scale = D**-0.5 if scale is None else scale
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32

    rows = q.to(dtype).transpose(1, 2).reshape(B, Hkv, H // Hkv * N, D)
    scores = (rows @ k.to(dtype).permute(0, 2, 3, 1)) * scale  # [B, Hkv, H / Hkv * N, M]
    if mask is None:
        weights = torch.softmax(scores, dim=-1)
    else:
        weights = _masked_softmax(scores.reshape(B, H, N, M), mask).reshape(scores.shape)
    out = weights @ v.to(dtype).transpose(1, 2)  # [B, Hkv, H / Hkv * N, E]
    return out.reshape(B, H, N, E).transpose(1, 2).to(q.dtype)


def gqa_attention_int8_reference(q, k, v, mask=None, scale=None):
    """`gqa_attention_reference` of queries and keys that were rounded to int8, as the kernel rounds them.

    Keys lose their mean over tokens, which adds the same number to all scores of a query, and which holds most of
    the outliers that channels of keys have (SageAttention, Zhang et al. 2024). Queries and keys are then rotated by
    Hadamard's matrix, which leaves their products alone and spreads what is left of outliers over as many features
    as `rotation_group` says (QuaRot, Ashkboos et al. 2024). Every row is divided by a scale that makes its largest
    element 127, and rounded.
    """
    D = q.shape[-1]
    scale = D**-0.5 if scale is None else scale
    centered = k.float() - k.float().mean(dim=1, keepdim=True)
    return gqa_attention_reference(_rounded_to_int8(q.float()), _rounded_to_int8(centered), v.float(), mask, scale).to(
        q.dtype
    )


def _rounded_to_int8(x):
    """x after the rotation, its rows rounded to 255 steps."""
    group = rotation_group(x.shape[-1])
    turn = torch.ones(1, 1, dtype=x.dtype, device=x.device)
    while turn.shape[0] < group:
        turn = torch.cat([torch.cat([turn, turn], dim=1), torch.cat([turn, -turn], dim=1)])
    x = (x.unflatten(-1, (-1, group)) @ (turn * group**-0.5)).flatten(-2)
    step = x.abs().amax(dim=-1, keepdim=True) / 127
    return (x / torch.where(step == 0, 1.0, step)).round() * step


def _masked_softmax(scores, mask):
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    else:
        scores = scores + mask.to(scores.dtype)
    # A softmax over nothing but -inf is NaN, in the gradient too: such rows go through it as zeros.
    dead = (scores == float("-inf")).all(dim=-1, keepdim=True)
    return torch.softmax(scores.masked_fill(dead, 0.0), dim=-1).masked_fill(dead, 0.0)
