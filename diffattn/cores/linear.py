"""Linear attention: a feature map instead of the softmax, and a cost linear in the number of tokens."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffattn.cores.base import AttentionCore, Rotary
from diffattn.kernels import linear_attention

FEATURE_MAPS = ("relu", "elu1", "softmax")


class LinearAttention(AttentionCore):
    """Non-causal linear attention (Katharopoulos et al. 2020, eq. 5).

    o_n = R phi(q_n) S / (phi(q_n) . z + eps),  S = sum_m R phi(k_m) v_m^T,  z = sum_m phi(k_m)

    R rotates the numerator alone (SANA-Video, Chen et al. 2025). A scale s other than D^-0.5 multiplies q
    by s D^0.5 before the map.

    Args:
        feature_map: `"relu"` (Sana, DC-AE), `"elu1"` (elu(x) + 1, Katharopoulos et al. 2020), `"softmax"`
            (over features for q, over tokens for k: efficient attention, Shen et al. 2021), or an
            nn.Module from (B, N, H, D) to nonnegative (B, N, H, F); each layer trains its own copy, and
            q and k share it.
        normalizer: `"sum"` over tokens, as written above, or `"mean"`: S and z are divided by the number
            of tokens, so that eps weighs the same at every resolution (LinFusion, Liu et al. 2024).
        eps: added to the denominator. Sana, DC-AE: 1e-15; LinFusion: 1e-4 with `"mean"`. The map
            `"softmax"` has the denominator 1 by construction: there eps and normalizer change nothing.

    Masks may hide keys, not single (query, key) pairs: they have to be the same for all heads and queries.

    Raises: ValueError for an unknown feature map or normalizer.
    """

    def __init__(self, feature_map: str | nn.Module = "relu", *, normalizer: str = "sum", eps: float = 1e-15):
        super().__init__()
        if not isinstance(feature_map, nn.Module) and feature_map not in FEATURE_MAPS:
            raise ValueError(
                f"feature_map: got {feature_map!r}, expected an nn.Module or one of {', '.join(FEATURE_MAPS)}"
            )
        if normalizer not in ("sum", "mean"):
            raise ValueError(f"normalizer: got {normalizer!r}, expected 'sum' or 'mean'")
        self.feature_map = feature_map
        self.normalizer = normalizer
        self.eps = eps

    def forward(self, q, k, v, *, mask=None, scale=None, rotate=None):
        if scale is not None:
            q = q * (scale * math.sqrt(q.shape[-1]))
        feature_map = self.feature_map
        if isinstance(feature_map, nn.Module):
            q, k, feature_map = feature_map(q), feature_map(k), None
        if mask is not None:
            q, k, feature_map = _mask_keys(q, k, feature_map, mask)
        rotary = None
        if rotate is not None:
            q, k, rotary = _interleave(q, k, rotate)
        return linear_attention(
            q, k, v, feature_map=feature_map, rotary=rotary, eps=self.eps, normalizer=self.normalizer
        )

    def formula(self, heads, kv_heads):
        name = self.feature_map if isinstance(self.feature_map, str) else repr(self.feature_map)
        return ("linear", name, self.normalizer, self.eps)

    def config(self):
        named = isinstance(self.feature_map, str)
        feature_map = self.feature_map if named else type(self.feature_map).__name__
        return {"feature_map": feature_map, "normalizer": self.normalizer, "eps": self.eps}


def _mask_keys(q: Tensor, k: Tensor, feature_map: str | None, mask: Tensor):
    """Weigh phi(k_m) by exp(mask_m), as the additive mask of a softmax weighs its keys."""
    # [B or 1, 1, 1, M] -> [B or 1, M, 1, 1]
    while mask.dim() < 4:
        mask = mask.unsqueeze(0)
    if mask.shape[1] != 1 or mask.shape[2] != 1:
        raise ValueError(
            f"mask: got shape {tuple(mask.shape)}, expected (B, 1, 1, M): linear attention can mask keys, "
            "the same ones for all heads and queries"
        )
    mask = mask.permute(0, 3, 1, 2)
    if mask.dtype == torch.bool and feature_map is not None:
        # Every named map sends -inf to 0.
        return q, k.masked_fill(~mask, -math.inf), feature_map
    if feature_map == "softmax":
        return q, k + mask, feature_map
    if feature_map == "relu":
        q, k = q.relu(), k.relu()
    elif feature_map == "elu1":
        q, k = F.elu(q) + 1, F.elu(k) + 1
    weight = mask if mask.dtype == torch.bool else mask.float().exp().to(k.dtype)
    return q, k * weight, None


def _interleave(q: Tensor, k: Tensor, rotate: tuple[Rotary | None, Rotary | None]):
    """Bring a rotation into the kernel's form: all features, pairs (2i, 2i+1), the same for q and k."""
    rotary = rotate[0]
    if rotary is None or rotate[1] is None or rotary is not rotate[1]:
        raise ValueError("rotate: linear attention needs one rotation for q and k, so it serves self-attention")
    cos, sin, interleaved = rotary
    width, features = 2 * cos.shape[-1], q.shape[-1]
    if width < features:
        rest = (0, (features - width) // 2)
        cos, sin = F.pad(cos, rest, value=1.0), F.pad(sin, rest)
    if not interleaved:
        # q.k does not change when the features of both are permuted alike.
        q, k = (_pair_features(x, width) for x in (q, k))
    return q, k, (cos, sin)


def _pair_features(x: Tensor, width: int) -> Tensor:
    paired = x[..., :width].unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    return torch.cat((paired, x[..., width:]), dim=-1)
