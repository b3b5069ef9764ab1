"""RMS norm of heads and rotary position embedding in plain torch, at any floating dtype."""

from typing import NamedTuple

import torch
from torch import Tensor

from diffattn.kernels._backend import exporting


class Rotary(NamedTuple):
    """Rotary position embedding in real arithmetic (Su et al. 2021, eq. 34).

    Attributes:
        cos, sin: (N, R/2) or (B, N, R/2), one angle a pair. Features from R on are not rotated.
        interleaved: pairs are (2i, 2i+1) if True, (i, i + R/2) if False.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = True


def apply_rotary(x: Tensor, rotary: Rotary | None) -> Tensor:
    """Rotate the feature pairs of x (B, N, H, D) in float32 (float64 stays); the dtype of x returns."""
    if rotary is None:
        return x
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (t.to(dtype).unsqueeze(-2) for t in (rotary.cos, rotary.sin))  # [(B,) N, 1, R/2]
    width = 2 * cos.shape[-1]
    if width < x.shape[-1]:
        rotated = apply_rotary(x[..., :width], rotary)
        return torch.cat((rotated, x[..., width:]), dim=-1)
    if not rotary.interleaved:
        a, b = x.to(dtype).chunk(2, dim=-1)
        rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    elif torch.compiler.is_compiling() or exporting():
        # Compilers fuse real arithmetic into one kernel; they and ONNX have no complex numbers.
        a, b = x.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
        rotated = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    else:
        # In eager mode each operation is a pass over memory, and the complex product is one.
        pairs = torch.view_as_complex(x.to(dtype).contiguous().unflatten(-1, (-1, 2)))
        rotated = torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)
    return rotated.to(x.dtype)


def norm_rope_reference(x: Tensor, norm=None, rotary: Rotary | None = None, across_heads: bool = False) -> Tensor:
    """One tensor of `diffattn.kernels.qk_norm_rope`, arguments as there, unchecked. Differentiable throughout.

    float64 stays float64; other dtypes are computed in float32 and rounded once, at the end.
    """
    dtype = x.dtype
    x = x.to(torch.promote_types(dtype, torch.float32))
    if norm is not None:
        weight, eps = norm
        mean = x.square().mean(dim=(-2, -1) if across_heads else -1, keepdim=True)
        x = x * torch.rsqrt(mean + eps)
        if weight is not None:
            x = x * weight.to(x.dtype).reshape(x.shape[-2:] if across_heads else x.shape[-1:])
    return apply_rotary(x, rotary).to(dtype)
