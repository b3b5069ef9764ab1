"""What the block-sparse kernels share: walking through a list of blocks, and checking pairs of tokens.

Every turn of a loop ends with a product that is waited for, `+ nothing(K)`: its left operand is in registers, which
the next turn might overwrite (see linear_attention/triton_tiles.py).
"""

import torch
import triton
import triton.language as tl

from diffattn.kernels.gqa_attention.triton import LOG2E
from diffattn.kernels.linear_attention.triton_tiles import nothing as nothing  # for the kernels

# Arguments that differ from picture to picture: a kernel made for each value would be compiled again and again.
COUNTS = ["K", "L", "n_tiles", "n_blocks"]


@triton.jit
def list_of(i_b, i_h, i_block, p_full, p_count, stride_b, stride_h, CHECK_ALL: tl.constexpr):
    """(number of the list, how many of its blocks need no check, how many it has). Strides are 0 where lists are
    shared."""
    i_list = i_b * stride_b + i_h * stride_h + i_block
    full = tl.load(p_full + i_list)
    if CHECK_ALL:
        full = full * 0
    return i_list, full, tl.load(p_count + i_list)


@triton.jit
def load_places(p_places, o_n, N):
    """p_y, p_x and w of tokens, each [BN]; 0 past the last."""
    m_n = o_n < N
    b_y = tl.load(p_places + o_n, mask=m_n, other=0.0)
    b_x = tl.load(p_places + tl.cast(N, tl.int64) + o_n, mask=m_n, other=0.0)
    b_w = tl.load(p_places + 2 * tl.cast(N, tl.int64) + o_n, mask=m_n, other=0.0)
    return b_y, b_x, b_w


@triton.jit
def hide_far(b_s, y, x, w, y_t, x_t, w_t):
    """Scores, -inf where |p - p_t|^2 > w + w_t, for the tokens of the rows and those of the columns."""
    b_y = y[:, None] - y_t[None, :]
    b_x = x[:, None] - x_t[None, :]
    return tl.where(b_y * b_y + b_x * b_x > w[:, None] + w_t[None, :], float("-inf"), b_s)


def list_strides(count):
    """Strides of lists over batch and heads: 0 where they are shared."""
    return tuple(0 if size == 1 else stride for size, stride in zip(count.shape[:2], count.stride()[:2], strict=True))


def bias_in_log2(bias):
    """What is added to scores in log2 units, float32 and contiguous; None stays."""
    if bias is None:
        return None
    # The lowest finite numbers overflow when they change to log2 units; they are not -inf, they stay finite.
    lowest = torch.finfo(torch.float32).min
    bias = bias.float()
    return torch.where(bias == float("-inf"), bias, (bias * LOG2E).clamp_min(lowest)).contiguous()


def fit(config, rows, keys):
    """A configuration (rows, keys, warps, stages) whose tiles divide the blocks."""
    tile_rows, tile_keys, warps, stages = config
    if tile_rows > rows:
        # As many elements a thread as before, but no fewer warps than a matrix instruction's.
        warps = max(4, warps * rows // tile_rows)
    return min(tile_rows, rows), min(tile_keys, keys), warps, stages
