"""What ours is compared with: the formulas of other projects on the same tensors, and calls into their packages.

Every function takes q (B, N, H, D), k and v (B, M, Hkv, D) and returns (B, N, H, D), in whatever memory layout its
project leaves it. Packages are imported inside, so that a missing one is a row with its reason.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# ---- linear attention ----


class Projected:
    """What a stock processor sees of its attention layer when the projections are done already."""

    norm_q = norm_k = None

    def __init__(self, q: Tensor, k: Tensor, v: Tensor):
        self.q, self.k, self.v = (x.flatten(2) for x in (q, k, v))
        self.heads = q.shape[2]
        self.to_out = (_same, _same)

    def to_q(self, _):
        return self.q

    def to_k(self, _):
        return self.k

    def to_v(self, _):
        return self.v


def _same(x):
    return x


def sana():
    """diffusers' own Sana processor, `SanaLinearAttnProcessor2_0`: float32 products on channel-first views."""
    from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0

    processor = SanaLinearAttnProcessor2_0()

    def run(q, k, v):
        return processor(Projected(q, k, v), q.flatten(2)).unflatten(-1, q.shape[2:])

    return run


class _Eps:
    eps = 1e-15


def dcae(packed):
    """diffusers' own DC-AE formula, `apply_linear_attention`, on (B, H, 3 D, N) as its processor calls it."""
    from diffusers.models.attention_processor import SanaMultiscaleLinearAttention

    q, k, v = packed.float().chunk(3, dim=2)
    out = SanaMultiscaleLinearAttention.apply_linear_attention(_Eps, q.relu(), k.relu(), v)
    return out.to(packed.dtype).permute(0, 3, 1, 2)


def channel_first(q, k, v) -> Tensor:
    """The three in one tensor (B, H, 3 D, N), as DC-AE's convolutions leave them."""
    return torch.cat((q, k, v), dim=-1).permute(0, 2, 3, 1).contiguous()


def from_channel_first(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, N, H, D) as views."""
    return packed.unflatten(2, (3, -1)).permute(2, 0, 4, 1, 3).unbind(0)


def linfusion(q, k, v):
    """LinFusion (Liu et al. 2024; Huage001/LinFusion, src/linfusion/attention.py): elu + 1, normalized by the mean
    of the keys plus 1e-4, on heads copied into the batch as diffusers' `head_to_batch_dim` does."""
    B, N, H, D = q.shape
    q, k, v = (x.transpose(1, 2).reshape(B * H, N, D) for x in (q, k, v))
    q, k = F.elu(q) + 1.0, F.elu(k) + 1.0
    denominator = q @ k.mean(1, keepdim=True).transpose(1, 2) + 1e-4
    root = N**-0.5
    state = (k.transpose(1, 2) * root) @ (v * root)
    out = q @ state / denominator
    return out.view(B, H, N, D).transpose(1, 2).reshape(B, N, H, D)


LINFUSION = {"feature_map": "elu1", "normalizer": "mean", "eps": 1e-4}


def einsum(q, k, v):
    """The equation in the dtype of the inputs, for a compiler to fuse: the least memory traffic of torch alone."""
    q, k = q.relu(), k.relu()
    state = torch.einsum("bmhd,bmhe->bhde", k, v)
    out = torch.einsum("bnhd,bhde->bnhe", q, state)
    denominator = torch.einsum("bnhd,bhd->bnh", q, k.sum(1))
    return out / (denominator + 1e-15).unsqueeze(-1)


def fla_state(q, k, v):
    """fla-core has no non-causal linear attention; the last state of its causal one is the sum over all tokens."""
    from fla.ops.linear_attn import chunk_linear_attn

    q, k = q.relu(), k.relu()
    _, state = chunk_linear_attn(q, k, v, scale=1.0, normalize=False, output_final_state=True)
    out = torch.einsum("bnhd,bhde->bnhe", q, state.to(q.dtype))
    denominator = torch.einsum("bnhd,bhd->bnh", q, k.sum(1))
    return out / (denominator + 1e-15).unsqueeze(-1)


def fla_causal(q, k, v):
    """fla-core's own function, which is causal: another result, and the nearest thing that it has."""
    from fla.ops.linear_attn import chunk_linear_attn

    return chunk_linear_attn(q.relu(), k.relu(), v, scale=1.0)[0]


def fla_linear(q, k, v):
    from fla.ops.linear_attn import chunk_linear_attn

    return chunk_linear_attn(q, k, v, scale=1.0, normalize=False)[0]


def fla_retention(q, k, v, decay):
    """fla-core makes RetNet's decays itself: 1 - 2^(-5 - h) for head h."""
    from fla.ops.retention import chunk_retention

    return chunk_retention(q, k, v, scale=1.0)[0]


def fla_simple_gla(q, k, v, decay):
    from fla.ops.simple_gla import chunk_simple_gla

    return chunk_simple_gla(q, k, v, g=decay, scale=1.0)[0]


def fla_gla(q, k, v, decay):
    from fla.ops.gla import chunk_gla

    return chunk_gla(q, k, v, decay, scale=1.0)[0]


def fla_step(q, k, v, decay, state):
    """The state after the token is a new tensor."""
    from fla.ops.simple_gla import fused_recurrent_simple_gla

    kind = "g_gamma" if decay.dim() == 1 else "g"
    return fused_recurrent_simple_gla(
        q, k, v, **{kind: decay}, scale=1.0, initial_state=state, output_final_state=True
    )


# ---- softmax attention ----


def sdpa(backend: SDPBackend, repeat: bool = False):
    """torch's attention by one of its kernels, heads shared (`enable_gqa`) or copied as diffusers copies them."""

    def run(q, k, v):
        if repeat:
            k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=not repeat).transpose(1, 2)

    return run


def flex(q, k, v):
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return flex_attention(q, k, v, enable_gqa=True).transpose(1, 2)


def sage(q, k, v):
    """SageAttention 1 (Zhang et al. 2024), int8 scores; it subtracts the mean of the keys from k in place."""
    from sageattention import sageattn

    return sageattn(q, k, v, tensor_layout="NHD")


# ---- RMS norm and rotary embedding ----


class StockNormRope(nn.Module):
    """What diffusers' processors do between the projections and the attention, with diffusers' own pieces.

    Args:
        case: a `cases.NormRope`.
    """

    eps = 1e-5

    def __init__(self, case, device):
        super().__init__()
        from diffusers.models.normalization import RMSNorm

        self.case = case
        R = case.D if case.rotated is None else case.rotated
        generator = torch.Generator().manual_seed(0)
        if case.norm is not None:
            widths = [heads * case.D if case.norm == "across" else case.D for heads in (case.H, case.Hkv)]
            self.norm_q, self.norm_k = (RMSNorm(width, self.eps) for width in widths)
            for norm in (self.norm_q, self.norm_k):
                nn.init.normal_(norm.weight, 1.0, 0.2, generator=generator)
            self.to(device, torch.bfloat16)
        frequencies = 10000.0 ** -torch.linspace(0, 1, R // 2, dtype=torch.float64)
        angles = torch.outer(torch.arange(case.N, dtype=torch.float64), frequencies)
        self.cos, self.sin = angles.cos().float().to(device), angles.sin().float().to(device)  # [N, R / 2]
        if case.rotary == "complex":
            self.tables = torch.complex(self.cos, self.sin)[None]
        elif case.rotary == "interleaved":
            self.tables = tuple(x.repeat_interleave(2, dim=-1) for x in (self.cos, self.sin))
        elif case.rotary == "half":
            self.tables = tuple(torch.cat((x, x), dim=-1) for x in (self.cos, self.sin))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.case.norm == "head":
            q, k = self.norm_q(q), self.norm_k(k)
        elif self.case.norm == "across":
            q = self.norm_q(q.flatten(2)).unflatten(-1, q.shape[2:])
            k = self.norm_k(k.flatten(2)).unflatten(-1, k.shape[2:])
        return self.rotate(q), self.rotate(k)

    def rotate(self, x: Tensor) -> Tensor:
        from diffusers.models.embeddings import apply_rotary_emb

        if self.case.rotary == "complex":
            return apply_rotary_emb(x, self.tables, use_real=False)
        if self.case.rotary == "interleaved":
            return apply_rotary_emb(x, self.tables, sequence_dim=1)
        if self.case.rotary == "half":
            # Stable Audio rotates in float32 and joins the rest of the head to it
            R = self.tables[0].shape[-1]
            wide = x.float()
            rotated = apply_rotary_emb(wide[..., :R], self.tables, use_real_unbind_dim=-2, sequence_dim=1)
            return torch.cat((rotated, wide[..., R:]), dim=-1).to(x.dtype)
        return x

    def ours(self) -> dict:
        """The same as keyword arguments of `diffattn.kernels.qk_norm_rope`."""
        norms = rotate = None
        if self.case.norm is not None:
            norms = (self.norm_q.weight, self.eps), (self.norm_k.weight, self.eps)
        if self.case.rotary is not None:
            rotate = ((self.cos, self.sin, self.case.rotary != "half"),) * 2
        return {"norms": norms, "rotate": rotate, "across_heads": self.case.norm == "across"}
