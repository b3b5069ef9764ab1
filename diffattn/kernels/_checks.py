"""What every kernel asks of q, k and v."""

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
