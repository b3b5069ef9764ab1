"""Non-causal linear attention in plain torch: the equation, and what runs where Triton does not."""

import math

import torch

from diffattn.kernels._backend import exporting


def _map(x: torch.Tensor, feature_map: str | None, dim: int) -> torch.Tensor:
    if feature_map == "relu":
        return x.relu()
    if feature_map == "elu1":
        # elu(x) + 1 without the cancellation in exp(x) - 1 + 1
        return x.relu() + x.clamp_max(0).exp()
    if feature_map == "softmax":
        # a column of -inf alone has no softmax: it counts as 0
        kept = (x != -math.inf).to(x.dtype)
        return x.clamp_min(torch.finfo(x.dtype).min).softmax(dim) * kept
    return x


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x_2i, x_2i+1) of (B, N, H, D) by the angles of (N, D / 2) or (B, N, D / 2)."""
    cos = cos.detach().to(x.dtype).unsqueeze(-2)
    sin = sin.detach().to(x.dtype).unsqueeze(-2)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def linear_attention_reference(q, k, v, *, feature_map="relu", rotary=None, eps=1e-15, normalizer="sum"):
    """o_n = (rot(phi(q_n)) S) / (phi(q_n) . z + eps),  S = sum_m rot(phi(k_m)) v_m^T,  z = sum_m phi(k_m)

    Arguments as in `diffattn.kernels.linear_attention`, unchecked. float64 stays float64; other dtypes are
    computed in float32 and the result is cast back.
    """
    if torch.is_autocast_enabled(q.device.type):
        # it would turn the float32 products back into half precision
        with torch.autocast(q.device.type, enabled=False):
            return linear_attention_reference(
                q, k, v, feature_map=feature_map, rotary=rotary, eps=eps, normalizer=normalizer
            )
    dtype = q.dtype
    if dtype != torch.float64:
        q, k, v = q.float(), k.float(), v.float()
    B, N, H, D = q.shape
    M, kv_heads = k.shape[1], k.shape[2]
    q, k = _map(q, feature_map, dim=-1), _map(k, feature_map, dim=1)
    if exporting() and 0 < eps < 1e-7 and feature_map != "softmax":
        # ONNX optimizers delete "+ eps" below 1e-8, and a row with phi(q) = 0 would become 0 / 0.
        # A power of two on both sides of the fraction changes no bit of it.
        scale = 2.0 ** math.ceil(math.log2(1e-6 / eps))
        q, eps = q * scale, eps * scale
    if normalizer == "mean":
        eps = eps * M
    # (B, N, Hkv, G, D): the G query heads of each key/value head, which is never repeated
    grouped = (B, N, kv_heads, H // kv_heads, D)
    rotated_q, rotated_k = q, k
    if rotary is not None:
        rotated_q, rotated_k = _rotate(q, *rotary), _rotate(k, *rotary)
    state = torch.einsum("bmhd,bmhe->bhde", rotated_k, v)
    out = torch.einsum("bnhgd,bhde->bnhge", rotated_q.reshape(grouped), state)
    if feature_map != "softmax":
        # for "softmax" the normalizer is 1: phi(q) sums to 1 over the features, phi(k) over the tokens
        denominator = torch.einsum("bnhgd,bhd->bnhg", q.reshape(grouped), k.sum(1)) + eps
        out = out / denominator.unsqueeze(-1)
    return out.reshape(B, N, H, v.shape[-1]).to(dtype)
