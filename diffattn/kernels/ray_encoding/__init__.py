"""Features in each token's ray coordinates: SANA-WM's camera encoding, one pass over queries, keys or values."""

import math
import numbers

import torch
from torch import Tensor

from diffattn.kernels._backend import use_triton
from diffattn.kernels._checks import DTYPES, shape_of
from diffattn.kernels.ray_encoding import ops as ops  # registers the operator
from diffattn.kernels.ray_encoding.reference import ray_encoding_reference

__all__ = ["ray_encoding", "ray_encoding_reference"]

# Wider heads take plain torch.
MAX_HEAD_DIM = 256


def ray_encoding(
    x: Tensor,
    matrices: Tensor,
    rotary: tuple[Tensor, Tensor] | None = None,
    *,
    scale: float = 1.0,
    limit: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Turn the features of each token into its ray's coordinates (diffusers, transformer_sana_wm.py,
    `_apply_ucpe_transform` and `_downscale_to_reference_rms`).

    y = (P x_0..3, P x_4..7, ..., R x_D/2..D-1) of x scaled: fours of the first half by the token's 4 x 4 matrix, which
    may move as well as turn, and the second half rotated. With `limit` no head gets longer:
    y min(1, sqrt((mean x^2 + 1e-6) / (mean y^2 + 1e-6))).

    Args:
        x: (B, N, H, D), D a multiple of 8, float16, bfloat16, float32 or float64, any strides.
        matrices: P, (B, N, 4, 4), any floating dtype and strides.
        rotary: `(cos, sin)`, each (N, D / 4) or (B, N, D / 4), of the pairs (2i, 2i + 1) of the second half; None
            leaves it as it is. No gradient reaches the tables.
        scale: what x is multiplied by first.
    Where a gradient is wanted and under a compiler it is plain torch's; the Triton kernel is for eager inference.

    Returns: (y in the shape and dtype of x, growth): with `limit` growth is (|y| / |x|)^2 of each head, (B, N, H)
        float32 (float64 for float64), lengths below 1e-6 counted as that; else None. The arithmetic is float32
        (float64 for float64) and rounds once.
    Raises: TypeError or ValueError, naming the argument, what came and what would fit.
    """
    rotary = _check(x, matrices, rotary, scale)
    grad = torch.is_grad_enabled() and (x.requires_grad or matrices.requires_grad)
    if not grad and not torch.compiler.is_compiling() and x.shape[3] <= MAX_HEAD_DIM and use_triton(x):
        cos, sin = (None, None) if rotary is None else rotary
        y, growth = torch.ops.diffattn.ray_encoding(x, matrices, cos, sin, float(scale), bool(limit))
        return y, growth if limit else None
    return ray_encoding_reference(x, matrices, rotary, scale, limit)


def _check(x, matrices, rotary, scale):
    """The tables as they enter the arithmetic."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: got {type(x).__name__}, expected a tensor (B, N, H, D)")
    if x.dtype not in DTYPES:
        raise TypeError(f"x: got {x.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    if x.ndim != 4 or x.shape[3] % 8 or x.shape[3] == 0:
        raise ValueError(f"x: got shape {shape_of(x)}, expected (B, N, H, D) with D a multiple of 8")
    B, N, _, D = x.shape
    named = {"matrices": matrices}
    if rotary is not None:
        if not isinstance(rotary, (tuple, list)) or len(rotary) != 2:
            raise TypeError(f"rotary: got {type(rotary).__name__}, expected a pair of tensors (cos, sin)")
        named |= {"rotary: cos": rotary[0], "rotary: sin": rotary[1]}
    for name, t in named.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: got {type(t).__name__}, expected a tensor")
        if not t.dtype.is_floating_point:
            raise TypeError(f"{name}: got {t.dtype}, expected a floating dtype")
        if t.device != x.device:
            raise ValueError(f"{name}: on {t.device}, expected {x.device} as x")
        shapes = ((B, N, 4, 4),) if t is matrices else ((N, D // 4), (B, N, D // 4))
        if tuple(t.shape) not in shapes:
            expected = " or ".join(map(str, shapes))
            raise ValueError(f"{name}: got shape {shape_of(t)}, expected {expected} for x of shape {shape_of(x)}")
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real) or not math.isfinite(scale):
        raise ValueError(f"scale: got {scale!r}, expected a finite number")
    if rotary is None:
        return None
    cos, sin = rotary
    if cos.shape != sin.shape or cos.dtype != sin.dtype:
        raise ValueError(
            f"rotary: cos is {cos.dtype} {shape_of(cos)} and sin {sin.dtype} {shape_of(sin)}, expected them alike"
        )
    return cos.detach(), sin.detach()
