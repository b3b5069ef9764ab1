"""What every attention core is given and returns, and the rotation that some of them apply."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffattn.kernels import exporting


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


class AttentionCore(nn.Module):
    """Turns queries, keys and values into the attention output, knowing nothing of the model.

    A core is configured in its constructor, copied once per layer and holds no state between calls.
    """

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        scale: float | None = None,
        rotate: tuple[Rotary | None, Rotary | None] | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            q: (B, N, H, D).
            k: (B, M, Hkv, D); Hkv divides H.
            v: (B, M, Hkv, E).
            mask: boolean (True attends) or additive, broadcastable to (B, H, N, M).
            scale: what q.k is multiplied by; None is D^-0.5.
            rotate: rotary embeddings of (q, k). The core applies them, since linear attention maps
                features first and keeps its normalizer unrotated.

        Returns: (B, N, H, E).
        """
        raise NotImplementedError

    def formula(self, heads: int, kv_heads: int) -> tuple:
        """What is computed on a layer of this shape: two cores with equal formulas are interchangeable."""
        raise NotImplementedError

    def check(self, heads: int, kv_heads: int) -> None:
        """Raises: ValueError if the core cannot serve a layer of this shape."""

    def config(self) -> dict:
        """The constructor's arguments, as JSON can hold them."""
        raise NotImplementedError

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.config().items())
        return f"{type(self).__name__}({arguments})"
