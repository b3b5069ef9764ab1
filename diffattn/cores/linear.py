"""Linear attention: a feature map instead of the softmax, and a cost linear in the number of tokens."""

import math
import numbers

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffattn.cores.base import AttentionCore, LayerInfo, Rotary, rotate_heads
from diffattn.cores.feature_maps import HedgehogMap, InputMLP
from diffattn.kernels import linear_attention
from diffattn.kernels._checks import check_mask, check_scale

FIXED_MAPS = ("relu", "elu1", "softmax")
FEATURE_MAPS = (*FIXED_MAPS, "hedgehog")
INPUT_MAPS = ("mlp",)


class LinearAttention(AttentionCore):
    """Non-causal linear attention (Katharopoulos et al. 2020, eq. 5).

    o_n = R phi(q_n) S / (phi(q_n) . z + eps),  S = sum_m R phi(k_m) v_m^T,  z = sum_m phi(k_m)

    R rotates the numerator alone (SANA-Video, Chen et al. 2025). A scale s other than D^-0.5 multiplies q
    by s D^0.5 before the map.

    Args:
        feature_map: `"relu"` (Sana, DC-AE), `"elu1"` (elu(x) + 1, Katharopoulos et al. 2020), `"softmax"`
            (over features for q, over tokens for k: efficient attention, Shen et al. 2021), `"hedgehog"` (learned,
            one for each head of q and of k: Zhang et al. 2024, `HedgehogMap`; it sees rotated q and k, as the softmax
            that it learns from), or an nn.Module from (B, N, H, D) to nonnegative (B, N, H, F); each layer trains its
            own copy, and q and k share it.
        normalizer: `"sum"` over tokens, as written above, or `"mean"`: S and z are divided by the number
            of tokens, so that eps weighs the same at every resolution (LinFusion, Liu et al. 2024).
        eps: added to the denominator. Sana, DC-AE: 1e-15; LinFusion: 1e-4 with `"mean"`. The map
            `"softmax"` has the denominator 1 by construction: there eps and normalizer change nothing.
        input_map: None, or `"mlp"`: q and k are projected of x + MLP(x), with an MLP for each (LinFusion, `InputMLP`).
            In joint attention text has MLPs of its own. For processors that hand over their projections, as most do.
        mid_dim: width of those MLPs between their two layers; None is the width of the hidden states.

    Masks may hide keys, not single (query, key) pairs: they have to be the same for all heads and queries.

    Raises: ValueError for an unknown feature map, normalizer or input map, or a mid_dim without a map.
    """

    def __init__(
        self,
        feature_map: str | nn.Module = "relu",
        *,
        normalizer: str = "sum",
        eps: float = 1e-15,
        input_map: str | None = None,
        mid_dim: int | None = None,
    ):
        super().__init__()
        if not isinstance(feature_map, nn.Module) and feature_map not in FEATURE_MAPS:
            raise ValueError(
                f"feature_map: got {feature_map!r}, expected an nn.Module or one of {', '.join(FEATURE_MAPS)}"
            )
        if normalizer not in ("sum", "mean"):
            raise ValueError(f"normalizer: got {normalizer!r}, expected 'sum' or 'mean'")
        if input_map is not None and input_map not in INPUT_MAPS:
            raise ValueError(f"input_map: got {input_map!r}, expected None or one of {', '.join(INPUT_MAPS)}")
        if mid_dim is not None and (input_map is None or not isinstance(mid_dim, int) or mid_dim < -1 or mid_dim == 0):
            raise ValueError(
                f"mid_dim: got {mid_dim!r} with input_map={input_map!r}, expected None, or with an input map a "
                "positive integer (or -1, LinFusion's x + x)"
            )
        self.feature_map = feature_map
        self.normalizer = normalizer
        self.eps = checked_eps(eps)
        self.input_map = input_map
        self.mid_dim = mid_dim
        self.head_maps: nn.ModuleDict | None = None
        # What the processor may do first then is what the softmax teacher does first.
        self.rotates_first = feature_map == "hedgehog"

    @classmethod
    def linfusion(cls, mid_dim: int | None = None) -> "LinearAttention":
        """LinFusion's attention (Liu et al. 2024; Huage001/LinFusion, src/linfusion/attention.py).

        Its own checkpoints hold a layer's four projections too: `load_weights` gives the core such.
        """
        return cls("elu1", normalizer="mean", eps=1e-4, input_map="mlp", mid_dim=mid_dim)

    def prepare(self, layer: LayerInfo) -> None:
        self.projections = self.input_maps = self.head_maps = None
        if self.input_map is not None:
            if not {"q", "k"} <= layer.weights.keys():
                raise ValueError(
                    f"input_map: {self.input_map!r} maps hidden states before the projections, which this layer's "
                    "processor does not hand over, or which are fused or no plain linear layers, one for each role"
                )
            roles = [role for role in ("q", "k", "text_q", "text_k") if role in layer.weights]
            widths = {role: layer.weights[role][0].shape[1] for role in roles}
            with torch.random.fork_rng(devices=()):  # the user's random numbers are for the picture
                self.input_maps = nn.ModuleDict({r: InputMLP(width, self.mid_dim) for r, width in widths.items()})
        if self.feature_map == "hedgehog":
            if layer.head_dim is None:
                raise ValueError(
                    "feature_map: 'hedgehog' needs the head dim, which this layer's processor cannot tell"
                )
            heads = {"q": layer.heads, "k": layer.kv_heads}
            self.head_maps = nn.ModuleDict({r: HedgehogMap(n, layer.head_dim) for r, n in heads.items()})

    def forward(self, q, k, v, *, mask=None, scale=None, rotate=None):
        if scale is not None:
            check_scale(scale)
            q = q * (scale * math.sqrt(q.shape[-1]))
        feature_map = self.feature_map
        if feature_map == "hedgehog":
            q, k = rotate_heads(q, k, rotate)
            q, k, feature_map, rotate = *self._map_heads(q, k), None, None
        elif isinstance(feature_map, nn.Module):
            q, k, feature_map = feature_map(q), feature_map(k), None
        if mask is not None:
            q, k, feature_map = _mask_keys(q, k, feature_map, mask)
        rotary = None
        if rotate is not None:
            q, k, rotary = _interleave(q, k, rotate)
        return linear_attention(
            q, k, v, feature_map=feature_map, rotary=rotary, eps=self.eps, normalizer=self.normalizer
        )

    def _map_heads(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.head_maps is None:
            raise RuntimeError(
                f"{self}: has weights for each layer, which diffattn.patch(model, core) makes, or core.prepare(...)"
            )
        return self.head_maps["q"](q), self.head_maps["k"](k)

    def formula(self, heads, kv_heads):
        name = self.feature_map if isinstance(self.feature_map, str) else repr(self.feature_map)
        return ("linear", name, self.normalizer, self.eps, *self._learned().values())

    def config(self):
        named = isinstance(self.feature_map, str)
        feature_map = self.feature_map if named else type(self.feature_map).__name__
        return {"feature_map": feature_map, "normalizer": self.normalizer, "eps": self.eps, **self._learned()}

    def _learned(self) -> dict:
        """The arguments of what a fixed formula has not, where they are not None."""
        learned = {"input_map": self.input_map, "mid_dim": self.mid_dim}
        return {name: value for name, value in learned.items() if value}


def checked_eps(eps: float) -> float:
    """eps as JSON can hold it. Raises: TypeError or ValueError for what is no number of 0 or more."""
    if not isinstance(eps, numbers.Real):
        raise TypeError(f"eps: got {type(eps).__name__}, expected a number")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps: got {eps}, expected 0 or more")
    return float(eps)


def _mask_keys(q: Tensor, k: Tensor, feature_map: str | None, mask: Tensor):
    """Weigh phi(k_m) by exp(mask_m), as the additive mask of a softmax weighs its keys."""
    check_mask(mask, q, k)
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
    # The tables of both, since torch 2.6 does not trace whether two tuples are one.
    same = rotate[1] is not None and rotary is not None and rotary.cos is rotate[1].cos and rotary.sin is rotate[1].sin
    if not same:
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
