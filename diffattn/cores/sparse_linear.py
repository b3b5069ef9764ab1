"""Softmax attention to the blocks of keys that matter most, linear attention to the rest."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffattn.cores.base import AttentionCore, LayerInfo, rotate_heads
from diffattn.cores.window import key_bias
from diffattn.kernels import exporting, gqa_attention
from diffattn.kernels.block_sparse_attention import (
    BLOCK_SIZES,
    block_sparse_attention,
    linear_attention_outside,
    number_of_blocks,
    pooled,
    top_blocks,
)

FEATURE_MAPS = {"softmax": lambda x: x.softmax(-1), "elu1": lambda x: F.elu(x) + 1, "relu": F.relu}
# Blocks that are kept of any picture: fewer tokens than that many blocks have are cheap enough to attend to all.
LEAST_KEPT = 4


class SparseLinearAttention(AttentionCore):
    """Sparse-linear attention, SLA (Zhang et al. 2025, arXiv 2509.24006).

    O   = O^s + P O^l
    O^s = softmax over the keys of the critical blocks,  O^l_n = phi(q_n) H_n / (phi(q_n) . z_n)
    H_n = sum_m phi(k_m) v_m^T,  z_n = sum_m phi(k_m),  m in the other blocks

    Queries and keys are cut into blocks of consecutive tokens. Critical for a block of queries are those blocks of
    keys with the highest products of mean query and mean key, pool(Q) pool(K)^T, in each head for itself (GQA: each
    query head has its own, of the keys that it shares). P (D, D) with a bias, one for all heads of a layer, is learned
    and starts at 0: without training the core is block-sparse softmax attention, and what linear attention adds grows
    from there. Where every block is kept it is softmax attention.

    Choices that differ from the paper's or that it leaves open:

    - No block is negligible, where the paper drops the lowest tenth: linear attention takes all that is not critical,
      and costs the same. (In the authors' code, thu-ml/SLA, it takes the critical blocks once more.)
    - Tails: means of a last, short block are over the tokens that it has; nothing is padded.
    - Rotary embedding comes first, for both parts, as the authors have it, whose kernel stands where softmax
      attention stood. phi of rotated features is still positive, so the normalizer cannot vanish.
    - Masks may hide keys, not single (query, key) pairs: hidden keys are in no mean and have no weight in either part.

    Args:
        keep: share of the blocks of keys that are critical, rounded up, but never fewer than 4. The paper has 0.05 at
            30,000 tokens of video; of a picture's 16 blocks of 64 tokens 0.25 keeps 4.
        block: tokens in a block, 16, 32, 64 or 128, or a pair, for queries and keys. None follows the number of
            tokens: the largest of 16, 32 and 64 that makes 16 blocks, and 128 queries from 4096 on, which load their
            keys half as often. (An exported file keeps to what was traced: name a block there.)
        feature_map: phi, for q and k alike: `"softmax"` over features (the paper's), `"elu1"` or `"relu"`. A scale s
            other than D^-0.5 multiplies q by s D^0.5 before the map.

    Raises: ValueError for arguments other than these.
    """

    rotates_first = True

    def __init__(self, keep: float = 0.25, block: int | Sequence[int] | None = None, feature_map: str = "softmax"):
        super().__init__()
        if not isinstance(keep, (int, float)) or not 0 < keep <= 1:
            raise ValueError(f"keep: got {keep!r}, expected a share of the blocks, more than 0 and at most 1")
        sizes = tuple(block) if isinstance(block, Sequence) else (block, block)
        if block is not None and (len(sizes) != 2 or not all(size in BLOCK_SIZES for size in sizes)):
            raise ValueError(f"block: got {block!r}, expected None, one of {BLOCK_SIZES} or a pair of them")
        if feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map: got {feature_map!r}, expected one of {', '.join(FEATURE_MAPS)}")
        self.keep = keep
        self.block = None if block is None else sizes
        self.feature_map = feature_map
        #: P. Until `prepare` has made it, it counts as the zeros that it starts from.
        self.linear_out: nn.Linear | None = None

    def prepare(self, layer: LayerInfo) -> None:
        if layer.head_dim is None:
            raise ValueError(
                "core: SparseLinearAttention needs the head dim of a layer for its projection, and this layer's "
                "processor cannot tell"
            )
        self.linear_out = nn.Linear(layer.head_dim, layer.head_dim)
        nn.init.zeros_(self.linear_out.weight)
        nn.init.zeros_(self.linear_out.bias)

    def forward(self, q, k, v, *, mask=None, scale=None, rotate=None):
        bias = key_bias(mask, q, "SparseLinearAttention")
        q, k = rotate_heads(q, k, rotate)
        rows, keys = self.block or blocks_for(q.shape[1], k.shape[1])
        number = number_of_blocks(k.shape[1], keys)
        kept = math.ceil(self.keep * number)
        if exporting():
            # A graph is for any number of tokens: nothing may depend on which is larger.
            kept = torch.sym_min(torch.sym_max(LEAST_KEPT, kept), number)
        else:
            kept = max(LEAST_KEPT, kept)
            if kept >= number:
                return gqa_attention(q, k, v, mask=mask, scale=scale)
        weight = None if bias is None else bias.float().exp()
        scores = block_scores(q, k, rows, keys, None if weight is None else weight > 0, scale)
        blocks = top_blocks(scores, kept, rows, keys)
        out = block_sparse_attention(q, k, v, blocks, bias=bias, scale=scale)
        if self.linear_out is None:
            return out
        if scale is not None:
            q = q * (scale * math.sqrt(q.shape[-1]))
        feature_map = FEATURE_MAPS[self.feature_map]
        q, k = feature_map(q).to(v.dtype), feature_map(k).to(v.dtype)  # autocast on a GPU has softmax in float32
        if weight is not None:
            k = k * weight[:, :, None, None].to(k.dtype)
        return out + self.linear_out(linear_attention_outside(q, k, v, blocks)).to(out.dtype)

    def formula(self, heads, kv_heads):
        return ("sparse-linear", kv_heads, self.keep, self.block, self.feature_map)

    def config(self):
        block = None if self.block is None else list(self.block)
        return {"keep": self.keep, "block": block, "feature_map": self.feature_map}


def blocks_for(queries: int, tokens: int) -> tuple[int, int]:
    """Tokens in a block of queries and of keys."""
    rows, keys = (64 if number >= 1024 else 32 if number >= 512 else 16 for number in (queries, tokens))
    return 128 if queries >= 4096 else rows, keys


@torch.no_grad()
def block_scores(q: Tensor, k: Tensor, rows: int, keys: int, keep: Tensor | None, scale: float | None) -> Tensor:
    """pool(Q) pool(K)^T, (B, H, NQ, NK) float32; -inf for blocks of keys without one that `keep` (1 or B, M) keeps.

    A softmax over them, as in the paper, would not change their order.
    """
    q, k = pooled(q, rows), pooled(k, keys, keep)
    groups = q.unflatten(2, (k.shape[2], -1))
    scores = torch.einsum("bnhgd,bmhd->bhgnm", groups, k).flatten(1, 2)
    if scale is not None and scale < 0:
        scores = -scores
    if keep is None:
        return scores
    rest = number_of_blocks(keep.shape[1], keys) * keys - keep.shape[1]
    alive = F.pad(keep, (0, rest)).unflatten(1, (-1, keys)).any(-1)
    return scores.masked_fill(~alive[:, None, None], -math.inf)
