"""Which blocks of keys each block of queries attends to, as lists that a kernel walks through."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Blocks(NamedTuple):
    """Lists of blocks of keys, one list for each block of queries.

    Queries and keys are cut into blocks of consecutive tokens; the last block may be short. A list begins with the
    blocks of which every token is attended to; the others are checked token by token.

    Attributes:
        index: (1 or B, 1 or H, NQ, K) int32, blocks of keys, each at most once in a list; what follows the first
            `count` of a list means nothing.
        full: (1 or B, 1 or H, NQ) int32, how many of a list's blocks need no check. The last block of keys, which may
            be short, always has one.
        count: (1 or B, 1 or H, NQ) int32, how many blocks a list has.
        rows, keys: tokens in a block of queries and of keys, powers of two from 16 to 128.
    """

    index: Tensor
    full: Tensor
    count: Tensor
    rows: int
    keys: int


def number_of_blocks(tokens: int, size: int) -> int:
    # Not of a negative number: exporters round its quotient towards 0.
    return (tokens + size - 1) // size


def blocks_of_layout(layout: Tensor, rows: int, keys: int, whole: Tensor | None = None) -> Blocks:
    """The lists of a table.

    Args:
        layout: (1 or B, 1 or H, NQ, NK) boolean, True where a block of queries attends to a block of keys.
        whole: like `layout`, True where all tokens of the two blocks attend to each other; None is everywhere.
    """
    kinds = layout.to(torch.int8) * (2 if whole is None else 1 + whole.to(torch.int8))
    return Blocks(*_sorted(_check_last(kinds)), rows, keys)


def top_blocks(scores: Tensor, kept: int, rows: int, keys: int) -> Blocks:
    """For each block of queries the `kept` blocks of keys with the highest scores, (B, H, NQ, NK)."""
    # In order of memory, and so that the block which may be short comes last.
    index = scores.topk(kept, dim=-1, sorted=False).indices.sort(dim=-1).values
    count = torch.full_like(index[..., 0], kept, dtype=torch.int32)
    full = count - (index[..., -1] == scores.shape[-1] - 1).int()
    return Blocks(index.int(), full, count, rows, keys)


def kinds_of(blocks: Blocks, tokens: int) -> Tensor:
    """(1 or B, 1 or H, NQ, NK) int8: 0 for blocks of keys that are not attended to, 2 for those without a check."""
    size = number_of_blocks(tokens, blocks.keys)
    place = torch.arange(blocks.index.shape[-1], device=blocks.index.device)
    kinds = (place < blocks.count[..., None]).to(torch.int8) + (place < blocks.full[..., None]).to(torch.int8)
    # What follows a list goes to a column that is cut off.
    index = torch.where(kinds > 0, blocks.index, size).long()
    table = kinds.new_zeros((*index.shape[:-1], size + 1))
    return table.scatter(-1, index, kinds)[..., :-1]


def pairs_of(blocks: Blocks, queries: int, tokens: int) -> Tensor:
    """(1 or B, 1 or H, N, M) boolean: whether a query's block attends to a key's block."""
    pairs = kinds_of(blocks, tokens) > 0
    pairs = pairs.repeat_interleave(blocks.rows, dim=-2).repeat_interleave(blocks.keys, dim=-1)
    return pairs[..., :queries, :tokens]


def lists_of_queries(blocks: Blocks, tokens: int, heads: int, kv_heads: int):
    """The lists the other way round: for each block of keys, the blocks of queries of all heads that share it.

    Returns: index (1 or B, 1 or Hkv, NK, G NQ) int32, whose entries are g NQ + (block of queries) for head g of the
    group; full and count (1 or B, 1 or Hkv, NK) int32.
    """
    group = heads // kv_heads
    kinds = _check_last(kinds_of(blocks, tokens).mT)  # [X, Y, NK, NQ]
    if kinds.shape[1] == 1:
        kinds = kinds[:, :, None].expand(-1, -1, group, -1, -1)
    else:
        kinds = kinds.unflatten(1, (kv_heads, group))
    return _sorted(kinds.transpose(2, 3).flatten(3))


def _check_last(kinds: Tensor) -> Tensor:
    return torch.cat((kinds[..., :-1], kinds[..., -1:].clamp_max(1)), dim=-1)


def _sorted(kinds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    index = kinds.contiguous().sort(dim=-1, descending=True, stable=True).indices.int()
    # Summed in int32: a sum of booleans is int64.
    full, count = ((kinds >= least).sum(dim=-1, dtype=torch.int32) for least in (2, 1))
    return index, full, count


def pooled(x: Tensor, size: int, keep: Tensor | None = None) -> Tensor:
    """Means of blocks of tokens, (B, N, H, D) -> (B, NB, H, D) float32 (float64 stays); short blocks over what they
    have.

    Args:
        keep: (1 or B, N) boolean, which tokens count; a block without any has the mean 0.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    tokens = x.shape[1]
    rest = number_of_blocks(tokens, size) * size - tokens
    if keep is None:
        keep = torch.ones(1, tokens, dtype=torch.bool, device=x.device)
    else:
        x = x * keep[:, :, None, None]
    sums = F.pad(x, (0, 0, 0, 0, 0, rest)).unflatten(1, (-1, size)).sum(dim=2, dtype=dtype)
    counts = F.pad(keep.to(dtype), (0, rest)).unflatten(1, (-1, size)).sum(dim=2)
    return sums / counts.clamp_min(1)[:, :, None, None]
