"""Attention of blocks of queries to some blocks of keys: softmax over them, and linear attention over all others.

What runs where: the Triton kernels on CUDA (float16, bfloat16, float32, head dims up to 256); else plain torch, which
exports. The work of both is that of the blocks attended to; but a graph in plain torch, which cannot ask how long the
longest list is, masks all pairs of tokens where the lists' table is as wide as there are blocks.
"""

import math

import torch

from diffattn.kernels._backend import exporting, tracing, use_triton
from diffattn.kernels._checks import check_qkv, shape_of
from diffattn.kernels.block_sparse_attention import ops as ops  # registers the operators
from diffattn.kernels.block_sparse_attention.blocks import (
    Blocks,
    blocks_of_layout,
    number_of_blocks,
    pooled,
    top_blocks,
)
from diffattn.kernels.block_sparse_attention.gathered import gathered_attention
from diffattn.kernels.block_sparse_attention.reference import (
    block_sparse_attention_reference,
    linear_attention_outside_reference,
)
from diffattn.kernels.linear_attention import linear_attention

__all__ = [
    "Blocks",
    "block_sparse_attention",
    "blocks_of_layout",
    "linear_attention_outside",
    "number_of_blocks",
    "pooled",
    "top_blocks",
]

MAX_HEAD_DIM = 256
BLOCK_SIZES = (16, 32, 64, 128)
# The kernels take what is inside from the whole, and the rounding of both is all that is left where the rest is small.
LEAST_SHARE = 1 / 32


def block_sparse_attention(q, k, v, blocks, *, q_places=None, k_places=None, bias=None, scale=None):
    """Softmax attention over the blocks of keys that each block of queries lists.

    o_n = sum_m softmax_m(scale q_n . k_m + bias_m) v_m,  m in the blocks listed for n's block,
                                                         |p_n - p_m|^2 <= w_n + w_m

    Query head h reads key/value head h // (H / Hkv). Every output element and every gradient is written by one
    program: the same bits from run to run.

    Args:
        q: (B, N, H, D), D of 1 to 256, any strides.
        k: (B, M, Hkv, D), dtype of q; H is a multiple of Hkv. Never repeated in memory.
        v: (B, M, Hkv, E), dtype of q, E of 1 to 256.
        blocks: what attends to what, see `Blocks`, `blocks_of_layout` and `top_blocks`.
        q_places, k_places: (3, N) and (3, M) float32: the place p = (y, x) of each token and its reach w, in rows
            p_y, p_x, w; w may be infinite. Both or none. Pairs too far apart are hidden in blocks that are not full.
        bias: (1 or B, M), added to the scores of a key; -inf hides it. Takes no gradient.
        scale: float; D ** -0.5 if None.
    Returns: (B, N, H, E) in the dtype of q; scores, softmax and sums are float32 (float64 for float64). A query that
        attends to nothing gives zeros and has zero gradients.
    Raises: TypeError or ValueError, naming the argument, what came and what would fit. RuntimeError if
        `config.backend` is `"triton"` and the kernel cannot run.
    """
    _check(q, k, v, blocks)
    _check_places(q, k, q_places, k_places)
    _check_bias(q, k, bias)
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale: got {scale}, expected a finite number or None")
    scale = int(q.shape[-1]) ** -0.5 if scale is None else float(scale)
    if not use_triton(q):
        function = gathered_attention if _gathers(q, k, blocks) else block_sparse_attention_reference
        return function(q, k, v, blocks, q_places, k_places, bias, scale)
    return torch.ops.diffattn.block_sparse_attention(
        q, k, v, *blocks, q_places, k_places, bias, scale, _wants_gradient(q, k, v)
    )[0]


def linear_attention_outside(q, k, v, blocks):
    """Linear attention over the keys outside of the blocks that each block of queries lists.

    o_n = sum_m (q_n . k_m) v_m / sum_m (q_n . k_m),  m not in the blocks listed for n's block

    A query gives zeros if no more than a thirty-second of its weights is outside. The Triton path takes what the
    blocks hold from the sums over all keys, so its work is that of one linear attention and of the blocks; in half
    precision its error is that of the two, over the share that is outside.

    Args:
        q, k, v, blocks: as `block_sparse_attention` takes them; q and k are mapped already and nonnegative, and a
            key of zeros is absent.
    Returns: (B, N, H, E) in the dtype of q.
    Raises: TypeError or ValueError, naming the argument, what came and what would fit.
    """
    _check(q, k, v, blocks)
    if not use_triton(q):
        return linear_attention_outside_reference(q, k, v, blocks, LEAST_SHARE)
    # Sums that do not grow with the number of tokens: float16 has no larger ones.
    scale = 1.0 / max(k.shape[1], 1)
    inside, weight = torch.ops.diffattn.block_sparse_sum(q, k, v, *blocks, scale)
    z = k.sum(dim=1, dtype=torch.float32) * scale  # [B, Hkv, D]
    total = (q.unflatten(2, (k.shape[2], -1)).float() * z[:, None, :, None]).sum(dim=-1).flatten(2)  # [B, N, H]
    outside = total - weight
    left = outside > LEAST_SHARE * total
    outside = torch.where(left, outside, 1.0)[..., None]
    everywhere = linear_attention(q, k, v, feature_map=None)
    out = (everywhere.float() * total[..., None] - inside.float()) / outside
    return torch.where(left[..., None], out, 0.0).to(q.dtype)


def _gathers(q, k, blocks) -> bool:
    """Whether plain torch reads the listed blocks alone; else it masks all pairs."""
    if exporting():
        # A graph for any number of tokens: not even which number is larger can be asked there.
        return True
    longest = blocks.index.shape[-1]
    return longest < number_of_blocks(k.shape[1], blocks.keys) if tracing(q) else longest > 0 and q.numel() > 0


def _wants_gradient(*tensors):
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _check(q, k, v, blocks):
    check_qkv(q, k, v)
    for name, x in (("q", q), ("v", v)):
        if not 1 <= x.shape[3] <= MAX_HEAD_DIM:
            raise ValueError(f"{name}: got {x.shape[3]} features a head, expected 1 to {MAX_HEAD_DIM}")
    if not isinstance(blocks, Blocks):
        raise TypeError(f"blocks: got {type(blocks).__name__}, expected Blocks")
    for name in ("rows", "keys"):
        if getattr(blocks, name) not in BLOCK_SIZES:
            raise ValueError(f"blocks: got {name}={getattr(blocks, name)}, expected one of {BLOCK_SIZES}")
    B, N, H, _ = q.shape
    number = number_of_blocks(N, blocks.rows)
    for name in ("index", "full", "count"):
        x = getattr(blocks, name)
        lists = x.shape[:3]
        if x.dtype != torch.int32 or x.ndim != (4 if name == "index" else 3):
            raise ValueError(f"blocks: got {name} of {x.dtype} {shape_of(x)}, expected torch.int32, as `Blocks` says")
        if x.device != q.device:
            raise ValueError(f"blocks: {name} is on {x.device}, expected {q.device} as q")
        if lists[0] not in (1, B) or lists[1] not in (1, H) or lists[2] != number or lists != blocks.count.shape:
            raise ValueError(
                f"blocks: got {name} of shape {shape_of(x)}, expected (1 or {B}, 1 or {H}, {number}, ...) for "
                f"{N} queries in blocks of {blocks.rows}"
            )
        if not x.is_contiguous():
            raise ValueError(f"blocks: {name} is not contiguous")


def _check_places(q, k, q_places, k_places):
    if (q_places is None) != (k_places is None):
        raise ValueError("q_places and k_places: got one of the two, expected both or none")
    if q_places is None:
        return
    for name, x, tokens in (("q_places", q_places, q.shape[1]), ("k_places", k_places, k.shape[1])):
        if x.shape != (3, tokens) or x.dtype != torch.float32 or not x.is_contiguous():
            raise ValueError(
                f"{name}: got {x.dtype} {shape_of(x)}, expected contiguous torch.float32 (3, {tokens}): y, x and reach"
            )
        if x.device != q.device:
            raise ValueError(f"{name}: on {x.device}, expected {q.device} as q")


def _check_bias(q, k, bias):
    if bias is None:
        return
    if not bias.dtype.is_floating_point or bias.ndim != 2 or bias.shape[0] not in (1, q.shape[0]):
        raise ValueError(f"bias: got {bias.dtype} {shape_of(bias)}, expected floating point (1 or B, M)")
    if bias.shape[1] != k.shape[1]:
        raise ValueError(f"bias: got shape {shape_of(bias)}, expected {k.shape[1]} keys")
    if bias.device != q.device:
        raise ValueError(f"bias: on {bias.device}, expected {q.device} as q")
    if torch.is_grad_enabled() and bias.requires_grad:
        raise ValueError("bias: got one that requires a gradient, and there is none for it; detach it")
