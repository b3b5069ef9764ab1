"""Softmax attention within a window around each image token."""

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffattn.cores.base import AttentionCore, rotate_heads
from diffattn.kernels import window_attention


class WindowAttention(AttentionCore):
    """Local attention: each image token attends to the circle of tokens around it, and to all text.

    o_n = sum_m softmax_m(scale q_n . k_m) v_m,  |p_n - p_m| < radius, or n or m a token of text

    p = (y, x) is a token's place in the picture. CLEAR (Liu et al. 2024, arXiv 2412.16112), whose authors take the
    radii 8, 16 and 32 for Flux's 64 x 64 tokens at 1024 px. Nothing but which pairs attend is changed, so there is
    nothing to learn in it; with a window as large as the picture it is softmax attention.

    The core has to know where tokens lie, and is not told by its processor: it takes a layer's picture to have the
    proportions of `grid`, at whatever resolution the layer works. `set_grid` changes that between calls.

    Args:
        radius: in tokens of the layer.
        grid: (height, width) of the picture in any unit (pixels, latents, tokens): its proportions count. None is a
            square.
        text: number of text tokens (before, behind) the image tokens, in layers where text and image attend jointly:
            `(512, 0)` for Flux with its 512 tokens of text, `(0, 333)` for SD3, which puts them behind.

    Masks may hide keys, not single (query, key) pairs: they have to be the same for all heads and queries.

    Raises: ValueError for a radius that is not positive, for a grid or text of another form, and in a call whose
        number of tokens is not that of such a picture, or in cross-attention.
    """

    rotates_first = True

    def __init__(self, radius: float = 8, grid: Sequence[int] | None = None, text: Sequence[int] = (0, 0)):
        super().__init__()
        if not isinstance(radius, (int, float)) or not 0 < radius < math.inf:
            raise ValueError(f"radius: got {radius!r}, expected a positive number of tokens")
        self.radius = radius
        self.grid = _checked_grid(grid)
        self.text = _checked_text(text)
        self.set_grid(grid, text)

    def set_grid(self, grid: Sequence[int] | None, text: Sequence[int] = (0, 0)) -> None:
        """What the next calls take `grid` and `text` to be; `config()` stays with what the core was made with."""
        self.now = _checked_grid(grid), _checked_text(text)

    def forward(self, q, k, v, *, mask=None, scale=None, rotate=None):
        if k.shape[1] != q.shape[1]:
            raise ValueError(
                f"k: got {k.shape[1]} tokens and {q.shape[1]} queries, expected as many: WindowAttention attends "
                "within one picture, it has no place for the tokens of cross-attention"
            )
        bias = key_bias(mask, q, "WindowAttention")
        q, k = rotate_heads(q, k, rotate)
        grid, text = self.now
        # A graph is for one picture: an index has to be a number, not a symbol for one.
        size = token_grid(operator.index(q.shape[1]) - sum(text), grid, text)
        return window_attention(q, k, v, self.radius, size, text=text, bias=bias, scale=scale)

    def formula(self, heads, kv_heads):
        return ("window", kv_heads, self.radius, self.grid, self.text)

    def config(self):
        grid = None if self.grid is None else list(self.grid)
        return {"radius": self.radius, "grid": grid, "text": list(self.text)}


def set_grid(target: Any, grid: Sequence[int] | None, text: Sequence[int] = (0, 0)) -> None:
    """Tell every `WindowAttention` in a pipeline or model the picture that comes next.

        diffattn.set_grid(pipe, (768, 1344))
        pipe(prompt, height=768, width=1344)

    Args:
        target: a pipeline or an nn.Module.
        grid, text: as `WindowAttention` takes them.

    Raises: TypeError if `target` is neither; ValueError for a grid or text of another form, or if it has no such core.
    """
    if not isinstance(target, nn.Module) and not isinstance(getattr(target, "components", None), dict):
        raise TypeError(f"target: got {type(target).__name__}, expected a diffusers pipeline or model")
    parts = [target] if isinstance(target, nn.Module) else list(target.components.values())
    modules = (m for part in parts if isinstance(part, nn.Module) for m in part.modules())
    cores = [m for m in modules if isinstance(m, WindowAttention)]
    if not cores:
        raise ValueError(f"target: {type(target).__name__} has no layer with WindowAttention")
    for core in cores:
        core.set_grid(grid, text)


def token_grid(tokens: int, grid: tuple[int, int] | None, text: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of that many image tokens in the proportions of `grid`."""
    high, wide = grid or (1, 1)
    area = max(tokens, 0) * high
    height = round(math.sqrt(area / wide))
    if height == 0 or height * height * wide != area or tokens % height:
        shape = "a square" if grid is None else f"{high} x {wide} or a multiple or fraction of it"
        raise ValueError(
            f"grid: got {tokens} image tokens{f' besides {sum(text)} of text' if any(text) else ''}, expected "
            f"{shape}. WindowAttention(radius, grid=(height, width), text=(before, behind)) or "
            "diffattn.set_grid(model, (height, width), text=...) tell it the picture's proportions, in any unit, and "
            "where text stands"
        )
    return height, tokens // height


def key_bias(mask: Tensor | None, q: Tensor, name: str) -> Tensor | None:
    """A mask over keys, as cores take it, as (1 or B, M) to add to scores; None stays."""
    if mask is None:
        return None
    while mask.dim() < 4:
        mask = mask.unsqueeze(0)
    if mask.shape[1] != 1 or mask.shape[2] != 1:
        raise ValueError(
            f"mask: got shape {tuple(mask.shape)}, expected (B, 1, 1, M): {name} can mask keys, the same ones for "
            "all heads and queries"
        )
    mask = mask[:, 0, 0]
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -math.inf)
    return mask


def _checked_grid(grid):
    if grid is None:
        return None
    if not _two_integers(grid, 1):
        raise ValueError(f"grid: got {grid!r}, expected (height, width), two positive integers, or None for a square")
    return tuple(grid)


def _checked_text(text):
    if not _two_integers(text, 0):
        raise ValueError(f"text: got {text!r}, expected (before, behind), the numbers of tokens around the image's")
    return tuple(text)


def _two_integers(pair, least):
    return isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(n, int) and n >= least for n in pair)
