"""Block-sparse softmax attention in plain torch, any dtype, that reads the listed blocks of keys and no others."""

import torch

from diffattn.kernels._backend import tracing
from diffattn.kernels.block_sparse_attention.blocks import number_of_blocks
from diffattn.kernels.block_sparse_attention.reference import cut, near
from diffattn.kernels.gqa_attention import gqa_attention

# Elements of keys and values gathered at a time, 8 MB of float32: larger parts are no faster.
GATHERED = 2**21


def gathered_attention(q, k, v, blocks, q_places=None, k_places=None, bias=None, scale=None):
    """`block_sparse_attention_reference`, in the time that the listed blocks take.

    The blocks of a list are laid one after another, as a sequence of keys for its block of queries. So blocks of
    queries are the batch of `gqa_attention` and (batch, head) its heads. Some blocks of queries at a time, padded to
    their longest list, to bound memory; but gradients keep what all have gathered, and a graph gathers all at once.

    Arguments as in `diffattn.kernels.block_sparse_attention`, unchecked.
    """
    B, N, H, _ = q.shape
    M, Hkv = v.shape[1:3]
    NQ, NK, longest = number_of_blocks(N, blocks.rows), number_of_blocks(M, blocks.keys), blocks.index.shape[-1]
    head = torch.arange(H, device=q.device) // (H // Hkv)
    first = ((torch.arange(B, device=q.device)[:, None] * Hkv + head) * NK)[..., None, None]  # block of a head's keys
    q = cut(q, blocks.rows).permute(1, 2, 0, 3, 4).flatten(2, 3)  # [NQ, rows, B H, D]
    k, v = (cut(x, blocks.keys).permute(0, 3, 1, 2, 4).flatten(0, 2) for x in (k, v))  # [B Hkv NK, keys, D]
    if q_places is not None:
        q_places = cut(q_places.T[None, :, None], blocks.rows)[0, :, :, 0].permute(2, 0, 1)  # [3, NQ, rows]
    if bias is not None:
        bias = bias.to(torch.float64 if q.dtype == torch.float64 else torch.float32)

    def attend(start, stop, length):
        count, index = blocks.count[:, :, start:stop], blocks.index[:, :, start:stop, :length]
        listed = torch.arange(length, device=q.device) < count[..., None]
        index = torch.where(listed, index, 0).long()  # what follows a list may be anything
        tokens = (index[..., None] * blocks.keys + torch.arange(blocks.keys, device=q.device)).flatten(3)
        mask = (listed.repeat_interleave(blocks.keys, dim=-1) & (tokens < M))[..., None, :]
        tokens = tokens.clamp_max(M - 1)
        if q_places is not None:
            mask = mask & near(q_places[:, None, None, start:stop], k_places[:, tokens])
        if bias is not None:
            row = torch.arange(bias.shape[0], device=q.device)[:, None, None, None]
            mask = torch.where(mask, bias[row, tokens][..., None, :], float("-inf"))
        if mask.shape[:2] != (1, 1):
            mask = mask.expand(B, H, -1, -1, -1)
        mask = mask.flatten(0, 1).transpose(0, 1)  # [part of NQ, 1 or B H, 1 or rows, length keys]
        index = (index + first).permute(2, 0, 1, 3).flatten()
        own = q[start:stop]
        lists = (
            x.index_select(0, index).reshape(own.shape[0], B * H, -1, x.shape[-1]).transpose(1, 2) for x in (k, v)
        )
        return gqa_attention(own, *lists, mask=mask, scale=scale)

    if tracing(q):
        out = attend(0, NQ, longest)
    else:
        step = max(1, GATHERED // (B * H * longest * blocks.keys * (k.shape[-1] + v.shape[-1])))
        lengths = (max(1, int(count.max())) for count in blocks.count.split(step, dim=2))
        out = torch.cat([attend(i * step, (i + 1) * step, length) for i, length in enumerate(lengths)])
    return out.flatten(0, 1)[:N].unflatten(1, (B, H)).transpose(0, 1)
