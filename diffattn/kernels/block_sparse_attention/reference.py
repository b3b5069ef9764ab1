"""Block-sparse attention in plain torch, any dtype: softmax over all pairs of tokens, linear attention over blocks."""

import torch
import torch.nn.functional as F

from diffattn.kernels.block_sparse_attention.blocks import kinds_of, number_of_blocks, pairs_of
from diffattn.kernels.gqa_attention.reference import gqa_attention_reference


def near(q_places, k_places):
    """(..., N, M) boolean: |p_n - p_m|^2 <= w_n + w_m for places (3, ..., N) and (3, ..., M): p_y, p_x and w."""
    q, k = q_places[..., :, None], k_places[..., None, :]
    return (q[0] - k[0]) ** 2 + (q[1] - k[1]) ** 2 <= q[2] + k[2]


def block_sparse_attention_reference(q, k, v, blocks, q_places=None, k_places=None, bias=None, scale=None):
    """o_n = sum_m softmax_m(scale q_n . k_m + bias_m) v_m over the keys m that n attends to.

    Arguments as in `diffattn.kernels.block_sparse_attention`, unchecked; bias (1 or B, M). All pairs take memory.
    """
    pairs = pairs_of(blocks, q.shape[1], k.shape[1])
    if q_places is not None:
        pairs = pairs & near(q_places, k_places)
    mask = pairs
    if bias is not None:
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        mask = torch.where(pairs, bias[:, None, None, :].to(dtype), float("-inf"))
    return gqa_attention_reference(q, k, v, mask, scale)


def linear_attention_outside_reference(q, k, v, blocks, least_share):
    """o_n = sum_m (q_n . k_m) v_m / sum_m (q_n . k_m) over the keys m outside of the blocks that n attends to.

    0 where no more than `least_share` of the weights of all keys is outside.
    """
    if torch.is_autocast_enabled(q.device.type):
        # It would turn the float32 products back into half precision.
        with torch.autocast(q.device.type, enabled=False):
            return linear_attention_outside_reference(q, k, v, blocks, least_share)
    dtype = q.dtype
    if dtype != torch.float64:
        q, k, v = q.float(), k.float(), v.float()
    B, N, H, _ = q.shape
    M, Hkv = v.shape[1:3]
    outside = (kinds_of(blocks, M) == 0).to(q.dtype)  # [1 or B, 1 or H, NQ, NK]
    outside = outside.expand(B, H, -1, -1).unflatten(1, (Hkv, H // Hkv))
    # sums over a block of keys are what all queries of a block see of it
    k, v = (cut(x, blocks.keys) for x in (k, v))
    states = torch.einsum("bjmhd,bjmhe->bhjde", k, v)
    keys = k.sum(2).transpose(1, 2)  # [B, Hkv, NK, D]
    q = cut(q, blocks.rows).unflatten(3, (Hkv, H // Hkv))
    everywhere = torch.einsum("binhgd,bhd->bhgin", q, keys.sum(2))
    total = torch.einsum("binhgd,bhgid->bhgin", q, torch.einsum("bhgij,bhjd->bhgid", outside, keys))
    o = torch.einsum("binhgd,bhgide->bhgine", q, torch.einsum("bhgij,bhjde->bhgide", outside, states))
    left = total > least_share * everywhere
    o = torch.where(left, 1.0 / torch.where(left, total, 1.0), 0.0)[..., None] * o
    return o.permute(0, 3, 4, 1, 2, 5).flatten(1, 2)[:, :N].flatten(2, 3).to(dtype)


def cut(x, size):
    """(B, N, H, D) -> (B, NB, size, H, D), zeros after the last token."""
    rest = number_of_blocks(x.shape[1], size) * size - x.shape[1]
    return F.pad(x, (0, 0, 0, 0, 0, rest)).unflatten(1, (-1, size))
