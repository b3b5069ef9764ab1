"""The deep-compression autoencoder (DC-AE, Chen et al. 2024): multiscale ReLU linear attention."""

import torch
from torch import Tensor

from diffattn.cores import LinearAttention
from diffattn.processors.base import CoreAttnProcessor


class DCAEAttnProcessor(CoreAttnProcessor):
    """Linear attention over pixels, on the projections and on their convolutions of other scales.

    The convolutions leave q, k, v channel-first, (B, heads, 3 D, H W); the core reads them there. The
    stock processor multiplies H W x H W scores when an image has at most D pixels: the same formula.
    """

    replaces = ("SanaMultiscaleAttnProcessor2_0",)

    def forward(self, attn, hidden_states: Tensor) -> Tensor:
        residual = hidden_states
        height, width = hidden_states.shape[-2:]
        pixels = hidden_states.movedim(1, -1)
        qkv = torch.cat((attn.to_q(pixels), attn.to_k(pixels), attn.to_v(pixels)), dim=-1).movedim(-1, 1)
        qkv = torch.cat([qkv, *(scale(qkv) for scale in attn.to_qkv_multiscale)], dim=1)
        qkv = qkv.flatten(2).unflatten(1, (-1, 3, attn.attention_head_dim))  # [B, heads, 3, D, N]
        q, k, v = qkv.permute(2, 0, 4, 1, 3).unbind(0)  # [B, N, heads, D]
        out = attn.to_out(self.core(q, k, v).flatten(2))
        out = out.unflatten(1, (height, width))

        if attn.norm_type == "rms_norm":
            out = attn.norm_out(out).movedim(-1, 1)
        else:
            out = attn.norm_out(out.movedim(-1, 1))
        return out + residual if attn.residual_connection else out

    @classmethod
    def exact_core(cls, attn):
        return LinearAttention("relu", eps=attn.eps)

    @classmethod
    def heads(cls, attn):
        heads = attn.to_out.in_features // attn.attention_head_dim
        return heads, heads

    @classmethod
    def attends_to_itself(cls, name, attn):
        return True
