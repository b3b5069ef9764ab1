"""Features in a ray's coordinates in plain torch, at any floating dtype. Differentiable throughout."""

import torch
from torch import Tensor

from diffattn.kernels.qk_norm_rope import Rotary, apply_rotary


def ray_encoding_reference(
    x: Tensor, matrices: Tensor, rotary: tuple[Tensor, Tensor] | None, scale: float, limit: bool
) -> tuple[Tensor, Tensor | None]:
    """`ray_encoding`, arguments as there, unchecked: (y, growth or None). float64 stays float64."""
    if torch.is_autocast_enabled(x.device.type):
        # it would turn the float32 product back into half precision
        with torch.autocast(x.device.type, enabled=False):
            return ray_encoding_reference(x, matrices, rotary, scale, limit)
    given, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32)) * scale
    half = x.shape[-1] // 2
    fours = x[..., :half].reshape(*x.shape[:2], x.shape[2] * half // 4, 4) @ matrices.to(x.dtype).transpose(-1, -2)
    rotated = apply_rotary(x[..., half:], None if rotary is None else Rotary(*rotary))
    y = torch.cat((fours.view(*x.shape[:3], half), rotated), -1)
    if not limit:
        return y.to(given), None
    before, after = (t.square().mean(-1, keepdim=True).add(1e-6).sqrt() for t in (x, y))
    y = y * (before / after).clamp(max=1.0)
    before, after = (torch.linalg.vector_norm(t, dim=-1).clamp_min(1e-6) for t in (x, y))
    return y.to(given), (after / before).square()
