"""The delta rule over frames in plain torch, at any floating dtype: what a CPU and gradients run."""

import torch
from torch import Tensor

from diffattn.kernels.qk_norm_rope import Rotary, apply_rotary


def frame_delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    kept: Tensor,
    *,
    rotary: tuple[Tensor, Tensor] | None = None,
    normalize: bool = True,
    scale: float,
    eps: float,
) -> Tensor:
    """`frame_delta_rule`, arguments as there, unchecked. Differentiable throughout; float64 stays float64.

    Products of keys are made once and serve both directions, and the states of both are added before queries read
    them: half the products of two scans.
    """
    if torch.is_autocast_enabled(q.device.type):
        # it would turn the float32 products back into half precision
        with torch.autocast(q.device.type, enabled=False):
            return frame_delta_rule_reference(
                q, k, v, beta, kept, rotary=rotary, normalize=normalize, scale=scale, eps=eps
            )
    dtype = torch.promote_types(q.dtype, torch.float32)
    N, T = q.shape[1], kept.shape[1]

    def frames(x):
        return x.to(dtype).unflatten(1, (T, N // T)).permute(0, 3, 1, 2, 4)  # [B, H, T, S, D], no copy

    given, q, k = q.dtype, q.to(dtype), k.to(dtype) * scale  # nothing is rounded on the way
    rotary = None if rotary is None else Rotary(*rotary)
    turned_q, turned_k = frames(apply_rotary(q, rotary)), frames(apply_rotary(k, rotary))
    b_beta = frames(beta.unsqueeze(-1))
    b_kept = kept.to(dtype).transpose(1, 2)[..., None, None]  # [B, H, T, 1, 1]
    weighted = turned_k * b_beta
    states = both_ways(
        transitions(turned_k, weighted, b_kept),
        frames(v).transpose(-1, -2) @ weighted,  # [B, H, T, E, D]
    )
    o = turned_q @ states.transpose(-1, -2)
    if normalize:
        plain_k = frames(k)
        weighted = weighted if rotary is None else plain_k * b_beta
        normalizers = both_ways(transitions(plain_k, weighted, b_kept), weighted.sum(-2, keepdim=True))
        o = o / (frames(q) @ normalizers.transpose(-1, -2) + eps)
    return o.permute(0, 2, 3, 1, 4).flatten(1, 2).to(given)


def transitions(k: Tensor, weighted: Tensor, kept: Tensor) -> Tensor:
    """W_t = a_t (I - sum_m beta_m k_m k_m^T), (..., T, D, D), symmetric."""
    eye = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    return kept * (eye - k.transpose(-1, -2) @ weighted)


def both_ways(W: Tensor, U: Tensor) -> Tensor:
    """S_t + R_t of S_t = S_(t-1) W_t + U_t and R_t = R_(t+1) W_(t+1) + U_(t+1), the first S and the last R being 0.

    W (..., T, D, D), U (..., T, E, D).
    """
    shape = U.shape
    W, U = (x.flatten(0, -4).unbind(1) for x in (W, U))  # [B H, D or E, D] each
    zero = torch.zeros_like(U[0])
    # of one frame, too, kept has a gradient, 0: parameters without any stop some training loops
    forward, backward = [torch.baddbmm(U[0], zero, W[0])], [zero]
    for w, u in zip(W[1:], U[1:], strict=True):
        forward.append(torch.baddbmm(u, forward[-1], w))
    for w, u in zip(W[:0:-1], U[:0:-1], strict=True):
        backward.append(torch.baddbmm(u, backward[-1], w))
    return torch.stack([s + r for s, r in zip(forward, reversed(backward), strict=True)], 1).view(shape)
