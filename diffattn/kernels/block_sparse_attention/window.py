"""Attention of image tokens to what is near them in the picture, and of all tokens to text."""

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffattn.kernels._backend import tracing, use_triton
from diffattn.kernels._checks import check_qkv
from diffattn.kernels.block_sparse_attention import MAX_HEAD_DIM, _check_bias, block_sparse_attention
from diffattn.kernels.block_sparse_attention.blocks import Blocks, blocks_of_layout
from diffattn.kernels.block_sparse_attention.reference import near
from diffattn.kernels.gqa_attention import gqa_attention

# Tokens in a block of queries and of keys, and the rectangle (height, width) that each is of the picture.
ROWS, KEYS = 128, 64
TILES = {16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16)}


class Plan(NamedTuple):
    """How the kernel walks through a picture: all of it constants of its size.

    Attributes:
        order: (N,), tokens in the order of the kernel's rows: tile by tile of a block of queries, in each of these
            tile by tile of a block of keys; text last.
        back: (N,), the inverse.
        q_places, k_places: (3, N), as `block_sparse_attention` takes them, in that order.
    """

    order: Tensor
    back: Tensor
    q_places: Tensor
    k_places: Tensor
    blocks: Blocks


def window_attention(q, k, v, radius, grid, *, text=(0, 0), bias=None, scale=None):
    """Softmax attention within circles of a picture.

    o_n = sum_m softmax_m(scale q_n . k_m + bias_m) v_m,  |p_n - p_m| < radius, or n or m a token of text

    p = (y, x) is a token's place in its picture. CLEAR (Liu et al. 2024, arXiv 2412.16112): its authors' mask has the
    same strict inequality, and no limit for text.

    Tokens are taken tile by tile, so that a block of them is a small square, and the blocks of keys within reach alone
    are visited: the work grows with the number of tokens. A graph in plain torch masks all pairs.

    Args:
        q: (B, N, H, D). Tokens of the picture, row by row, between those of text.
        k: (B, N, Hkv, D), dtype of q; H is a multiple of Hkv.
        v: (B, N, Hkv, E), dtype of q.
        radius: in tokens.
        grid: (height, width) of the picture in tokens.
        text: number of tokens (before, behind) the picture.
        bias: (1 or B, N), added to the scores of a key; -inf hides it. Takes no gradient.
        scale: float; D ** -0.5 if None.
    Returns: (B, N, H, E) in the dtype of q.
    Raises: TypeError or ValueError, naming the argument, what came and what would fit.
    """
    check_qkv(q, k, v)
    N = q.shape[1]
    height, width = grid
    if k.shape[1] != N or N != height * width + sum(text):
        raise ValueError(
            f"grid: got {height} x {width} and {text[0]} + {text[1]} tokens of text, expected as many tokens as q "
            f"and k have, {N} and {k.shape[1]}"
        )
    if not 0 <= radius < math.inf:
        raise ValueError(f"radius: got {radius}, expected a finite number, 0 or more")
    # Before it is reordered, which would take what it needs of one that is too long.
    _check_bias(q, k, bias)
    plan = _plan_for(q, grid, text, radius) if max(q.shape[3], v.shape[3]) <= MAX_HEAD_DIM else None
    if plan is not None:
        if bias is not None:
            bias = bias[:, plan.order]
        q, k, v = (_Reordered.apply(x, plan.order, plan.back) for x in (q, k, v))
        out = block_sparse_attention(
            q, k, v, plan.blocks, q_places=plan.q_places, k_places=plan.k_places, bias=bias, scale=scale
        )
        return _Reordered.apply(out, plan.back, plan.order)
    mask = near(*_places(grid, text, radius, q.device))
    if bias is not None:
        mask = torch.where(mask, bias[:, None, None, :].to(q.dtype), -math.inf)
    return gqa_attention(q, k, v, mask=mask, scale=scale)


def _plan_for(q, grid, text, radius) -> Plan | None:
    """What a call walks through; None where it masks all pairs."""
    traced = tracing(q)
    if q.shape[1] == 0 or (traced and not use_triton(q)):
        return None
    make = _plan if traced else _kept_plan
    return make(tuple(grid), tuple(text), radius, (ROWS, KEYS), q.device)


class _Reordered(torch.autograd.Function):
    """x[:, order], whose gradient is grad[:, back]: torch's own would add to zeros, atomically."""

    @staticmethod
    def forward(ctx, x, order, back):
        ctx.save_for_backward(order, back)
        return x.index_select(1, order)

    @staticmethod
    def backward(ctx, grad):
        order, back = ctx.saved_tensors
        return _Reordered.apply(grad, back, order), None, None


def _places(grid, text, radius, device):
    """(3, N) of queries and of keys, row by row: y, x and reach."""
    height, width = grid
    before, behind = text
    at = torch.arange(before + height * width + behind, device=device) - before
    y, x = torch.div(at, width, rounding_mode="floor"), at % width
    is_text = (at < 0) | (at >= height * width)
    # Squares of distances are whole numbers: half of one below the first that is too far.
    reach = math.ceil(radius**2) - 0.5
    place = torch.stack((y, x)).to(torch.float32)
    q_reach, k_reach = (torch.where(is_text, math.inf, own) for own in (reach, 0.0))
    return (torch.cat((place, w.to(torch.float32)[None])) for w in (q_reach, k_reach))


def _plan(grid, text, radius, blocks, device) -> Plan:
    q_places, k_places = _places(grid, text, radius, device)
    y, x = q_places[:2].long()
    key = torch.zeros_like(y)
    for size in sorted({*blocks, 1}, reverse=True):
        # The number of this tile in the one around it, row by row.
        high, wide = TILES.get(size, (1, 1))
        tile = torch.div(y, high, rounding_mode="floor") * grid[1] + torch.div(x, wide, rounding_mode="floor")
        key = key * (y.numel() + 1) + tile
    # Text comes last, so that it does not move the blocks away from the tiles.
    key = torch.where(k_places[2] > 0, torch.iinfo(torch.int64).max, key)
    order = key.argsort(stable=True)
    back = order.argsort()
    q_places, k_places = (p.index_select(1, order) for p in (q_places, k_places))
    return Plan(order, back, q_places, k_places, _within(q_places, k_places, *blocks))


@functools.lru_cache(maxsize=32)
def _kept_plan(grid, text, radius, blocks, device) -> Plan:
    # Made in a call without gradients, it may serve one with.
    with torch.inference_mode(False), torch.no_grad():
        plan = _plan(grid, text, radius, blocks, device)
        longest = int(plan.blocks.count.max())
        index = plan.blocks.index[..., :longest].contiguous()
        return plan._replace(blocks=plan.blocks._replace(index=index))


def _within(q_places, k_places, rows, keys) -> Blocks:
    """The blocks of which some token may be near enough, from the rectangles that they fill."""
    q_low, q_high = _bounds(q_places, rows)
    k_low, k_high = _bounds(k_places, keys)
    q_low, q_high, k_low, k_high = q_low[:, :, None], q_high[:, :, None], k_low[:, None], k_high[:, None]
    gap = torch.maximum(k_low[:2] - q_high[:2], q_low[:2] - k_high[:2]).clamp_min(0)
    span = torch.maximum(k_high[:2] - q_low[:2], q_high[:2] - k_low[:2])
    layout = gap.square().sum(0) <= q_high[2] + k_high[2]
    whole = span.square().sum(0) <= q_low[2] + k_low[2]
    return blocks_of_layout(layout[None, None], rows, keys, whole[None, None])


def _bounds(places, block):
    """The least and the greatest of each row in each block, (3, NB)."""
    rest = -places.shape[1] % block
    low = F.pad(places, (0, rest), value=math.inf).unflatten(1, (-1, block)).amin(-1)
    high = F.pad(places, (0, rest), value=-math.inf).unflatten(1, (-1, block)).amax(-1)
    return low, high
