"""Block-sparse attention in plain torch: the equations over all pairs of tokens, at any dtype."""

import torch

from diffattn.kernels.block_sparse_attention.blocks import pairs_of
from diffattn.kernels.gqa_attention.reference import gqa_attention_reference


def near(q_places, k_places):
    """(N, M) boolean: |p_n - p_m|^2 <= w_n + w_m for places (3, N) and (3, M), rows p_y, p_x and w."""
    q, k = q_places[:, :, None], k_places[:, None, :]
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
    M, Hkv, E = v.shape[1:]
    outside = ~pairs_of(blocks, N, M)
    weights = torch.einsum("bnhgd,bmhd->bhgnm", q.unflatten(2, (Hkv, H // Hkv)), k)
    weights = weights.reshape(B, H, N, M)
    everywhere = weights.sum(dim=-1, keepdim=True)
    weights = weights * outside
    total = weights.sum(dim=-1, keepdim=True)
    left = total > least_share * everywhere
    weights = torch.where(left, weights, 0.0) / torch.where(left, total, 1.0)
    weights = weights.reshape(B, Hkv, H // Hkv, N, M)
    return torch.einsum("bhgnm,bmhe->bnhge", weights, v).reshape(B, N, H, E).to(dtype)
