"""What every kernel asks of q, k and v."""

import math
import numbers

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def shape_of(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse tensors that are not q (B, N, H, D), k (B, M, Hkv, D), v (B, M, Hkv, E) of one dtype on one device.

    Raises: TypeError or ValueError, naming the argument, what came and what would fit.
    """
    for name, x, layout in (("q", q, "(B, N, H, D)"), ("k", k, "(B, M, Hkv, D)"), ("v", v, "(B, M, Hkv, E)")):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name}: got {type(x).__name__}, expected a tensor {layout}")
        if x.dtype not in DTYPES:
            raise TypeError(f"{name}: got {x.dtype}, expected one of {', '.join(map(str, DTYPES))}")
        if x.ndim != 4:
            raise ValueError(f"{name}: got shape {shape_of(x)}, expected {layout}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: got {x.dtype}, expected {q.dtype} as q")
        if x.device != q.device:
            raise ValueError(f"{name}: on {x.device}, expected {q.device} as q")
    B, _, H, D = q.shape
    if H == 0 or D == 0:
        raise ValueError(f"q: got shape {shape_of(q)}, expected (B, N, H, D) with at least one head and one feature")
    if k.shape[0] != B or k.shape[3] != D:
        raise ValueError(f"k: got shape {shape_of(k)}, expected ({B}, M, Hkv, {D}) for q of shape {shape_of(q)}")
    if k.shape[2] == 0 or H % k.shape[2] != 0:
        raise ValueError(f"k: got {k.shape[2]} heads, expected a divisor of the {H} heads of q")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v: got shape {shape_of(v)}, expected {shape_of(k)[:3]} + (E,) for k of shape {shape_of(k)}")


def check_scale(scale: float | None) -> None:
    """Raises: TypeError or ValueError if `scale` is neither a finite number nor None."""
    if scale is None:
        return
    if not isinstance(scale, numbers.Real):
        raise TypeError(f"scale: got {type(scale).__name__}, expected a number or None")
    if not math.isfinite(scale):
        raise ValueError(f"scale: got {scale}, expected a finite number or None")


def check_mask(mask: Tensor | None, q: Tensor, k: Tensor) -> None:
    """Refuse what is neither None nor a boolean or additive tensor that broadcasts to (B, H, N, M).

    Raises: TypeError or ValueError, naming what came and what would fit.
    """
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"mask: got {type(mask).__name__}, expected a tensor or None")
    dtypes = dict.fromkeys((torch.bool, q.dtype, torch.float32))
    if mask.dtype not in dtypes:
        raise TypeError(
            f"mask: got {mask.dtype}, expected {' or '.join(map(str, dtypes))}: boolean (True attends) or additive"
        )
    if mask.device != q.device:
        raise ValueError(f"mask: on {mask.device}, expected {q.device} as q")
    full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    # Of one length, since torch 2.6 traces no other zip.
    if mask.ndim > 4 or any(
        have != 1 and have != want for have, want in zip(mask.shape, full[4 - mask.ndim :], strict=True)
    ):
        raise ValueError(
            f"mask: got shape {shape_of(mask)}, expected one that broadcasts to (B, H, N, M) = {tuple(full)}"
        )
