"""The gated delta rule over frames in both directions: each frame corrects a state by all of its tokens at once."""

import math
import numbers

import torch
from torch import Tensor

from diffattn.kernels._backend import use_triton
from diffattn.kernels._checks import check_qkv, shape_of
from diffattn.kernels.frame_delta_rule import ops as ops  # registers the operator
from diffattn.kernels.frame_delta_rule.reference import frame_delta_rule_reference
from diffattn.kernels.linear_attention import _check_rotary

__all__ = ["frame_delta_rule", "frame_delta_rule_reference"]

# Wider heads take plain torch: their products do not fit the kernels' registers.
MAX_HEAD_DIM = 128


def frame_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    kept: Tensor,
    *,
    rotary: tuple[Tensor, Tensor] | None = None,
    normalize: bool = True,
    scale: float | None = None,
    eps: float = 1e-15,
) -> Tensor:
    """Bidirectional gated delta rule over the frames of a video, as SANA-WM's attention has it (diffusers,
    transformer_sana_wm.py, `SanaWMBidirectionalGDNAttention`).

    With k scaled, r the rotation and sums over the tokens m of frame t:

    S_t = S_(t-1) W_t + U_t,        W_t = a_t (I - sum_m b_m (r k_m) (r k_m)^T),   U_t = sum_m b_m v_m (r k_m)^T
    R_t = R_(t+1) W_(t+1) + U_(t+1),                                                R of the last frame = 0
    o_n = (S_t + R_t) (r q_n) / (q_n . (s_t + r_t) + eps)                           for a token n of frame t

    s and r are the same two recurrences with keys that are not rotated and 1 for v. Frame t itself counts once, in
    S_t. Unlike the gated delta rule over tokens (Yang et al. 2025) the corrections of one frame's tokens are added,
    not applied one after the other, so its chunked kernels (flash-linear-attention's) compute something else.

    Args:
        q: (B, N, H, D), float16, bfloat16, float32 or float64, any strides; N is T frames of S tokens.
        k: (B, N, H, D), dtype of q.
        v: (B, N, H, E), dtype of q.
        beta: b, how far a token corrects the state, (B, N, H), any floating dtype.
        kept: a, how much of the state is kept from frame to frame, (B, T, H), any floating dtype.
        rotary: `(cos, sin)` of r as in `linear_attention`, each (N, D / 2) or (B, N, D / 2); None rotates nothing.
        normalize: divide by the denominator.
        scale: what k is multiplied by; None is (D S)^-0.5.
        eps: added to the denominator.
    Where a gradient is wanted it is plain torch's, on a GPU too; the Triton kernels are for inference.

    Returns: (B, N, H, E) in the dtype of q, contiguous where Triton runs. States, sums and the division are float32
        (float64 for float64).
    Raises: TypeError or ValueError, naming the argument, what came and what would fit.
    """
    rotary, scale = check_inputs(q, k, v, beta, kept, rotary, scale, eps)
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, beta, kept))
    if not grad and max(q.shape[3], v.shape[3]) <= MAX_HEAD_DIM and use_triton(q):
        cos, sin = (None, None) if rotary is None else rotary
        return torch.ops.diffattn.frame_delta_rule(
            q, k, v, beta, kept, cos, sin, bool(normalize), float(scale), float(eps)
        )
    return frame_delta_rule_reference(
        q, k, v, beta, kept, rotary=rotary, normalize=normalize, scale=scale, eps=float(eps)
    )


def check_inputs(q, k, v, beta, kept, rotary, scale, eps):
    """The checks of `frame_delta_rule`: the tables and the scale as they enter the arithmetic."""
    check_qkv(q, k, v)
    B, N, H, D = q.shape
    if k.shape != q.shape:
        raise ValueError(f"k: got shape {shape_of(k)}, expected {shape_of(q)} as q: each token brings its own key")
    for name, x, dims in (("beta", beta, "(B, N, H)"), ("kept", kept, "(B, T, H)")):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: got {type(x).__name__}, expected a tensor {dims}")
        if not x.dtype.is_floating_point:
            raise TypeError(f"{name}: got {x.dtype}, expected a floating dtype")
        if x.device != q.device:
            raise ValueError(f"{name}: on {x.device}, expected {q.device} as q")
    if beta.shape != (B, N, H):
        raise ValueError(f"beta: got shape {shape_of(beta)}, expected {(B, N, H)} for q of shape {shape_of(q)}")
    T = kept.shape[1] if kept.dim() == 3 else 0
    if T == 0 or kept.shape != (B, T, H) or N == 0 or N % T:
        raise ValueError(
            f"kept: got shape {shape_of(kept)}, expected ({B}, T, {H}), T frames that divide the {N} tokens of q"
        )
    if scale is None:
        scale = (D * (N // T)) ** -0.5
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real) or not math.isfinite(scale):
        raise ValueError(f"scale: got {scale!r}, expected a finite number or None")
    if isinstance(eps, bool) or not isinstance(eps, numbers.Real) or not 0 <= eps < math.inf:
        raise ValueError(f"eps: got {eps!r}, expected a number, 0 or more")
    return None if rotary is None else _check_rotary(q, k, rotary), scale
