"""Autoencoders with attention of their own, and the pair-biased attention of proteins."""

import torch
import torch.nn.functional as F
from torch import Tensor

from diffattn.processors.base import broadcast_mask, normalize, output, rescaled
from diffattn.processors.projections import NOTHING
from diffattn.processors.rotary import from_halves
from diffattn.processors.streams import Stream, StreamAttnProcessor, attend, causal_mask, norms_of


class CosmosSpatialAttnProcessor(StreamAttnProcessor):
    """The Cosmos VAE's attention within each frame; its projections are convolutions over (B, C, T, H, W)."""

    replaces = ("CosmosSpatialAttentionProcessor2_0",)
    hands_over = NOTHING

    def forward(self, attn, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.attend(attn, hidden_states, attention_mask, (0, 2, 3, 4, 1), dim=2)

    def attend(self, attn, hidden_states, mask, order, dim):
        """`order` puts channels last and the `5 - 1 - dim` dimensions that make the tokens from `dim` on."""
        normed = attn.norm(hidden_states)
        q, k, v = (m(normed).permute(order) for m in (attn.to_q, attn.to_k, attn.to_v))
        shape = q.shape
        heads = attn.num_attention_heads
        q, k, v = (t.flatten(dim, 3).flatten(0, dim - 1).unflatten(-1, (heads, -1)) for t in (q, k, v))
        out = self.core(q, k, v, mask=mask).flatten(2).reshape(shape)
        inverse = [order.index(i) for i in range(5)]
        return self.project_out(attn, out.permute(inverse)) + hidden_states

    @classmethod
    def heads(cls, attn):
        return attn.num_attention_heads, attn.num_attention_heads


class CosmosTemporalAttnProcessor(CosmosSpatialAttnProcessor):
    """The Cosmos VAE's attention along time at each pixel, under a causal mask."""

    replaces = ("CosmosTemporalAttentionProcessor2_0",)

    def forward(self, attn, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.attend(attn, hidden_states, attention_mask, (0, 3, 4, 2, 1), dim=3)


class MochiVaeAttnProcessor(StreamAttnProcessor):
    """The Mochi VAE's causal attention along time; of a single frame, the values are all that is left."""

    replaces = ("MochiVaeAttnProcessor2_0",)
    hands_over = NOTHING

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        if hidden_states.shape[1] == 1:
            out = self.project_out(attn, attn.to_v(hidden_states))
        else:
            length = hidden_states.shape[1] if encoder_hidden_states is None else encoder_hidden_states.shape[1]
            mask = broadcast_mask(attn, attention_mask, hidden_states.shape[0], length)
            q, k, v = self.project_heads(attn, hidden_states, encoder_hidden_states)
            q, k = normalize(q, k, norms_of(attn))
            if attn.is_causal:
                mask = causal_mask(q)
            out = output(attn, self.core(q, k, v, mask=mask), self.core)
        if attn.residual_connection:
            out = out + hidden_states
        return rescaled(attn, out)


class MiniMaxH3VideoAttnProcessor(StreamAttnProcessor):
    """The decoder of MiniMax-H3's video autoencoder: part of the features rotated."""

    replaces = ("MiniMaxH3VideoAttnProcessor",)
    hands_over = NOTHING  # its block asks the layer's own for their dtype

    def forward(self, attn, hidden_states: Tensor, rotary_emb: tuple[Tensor, Tensor] | None = None) -> Tensor:
        stream = Stream(*self.project_heads(attn, hidden_states), norms_of(attn), from_halves(rotary_emb))
        return self.project_out(attn, attend(self.core, stream).flatten(2))


class MiniMaxH3AudioAttnProcessor(StreamAttnProcessor):
    """The causal attention of MiniMax-H3's audio autoencoder: the mean of all heads, pooled to the output's width."""

    replaces = ("MiniMaxH3AudioAttnProcessor",)

    def forward(self, attn, hidden_states: Tensor) -> Tensor:
        # Through the module, whose forward LoRA and quantization may change; it has no bias of its own.
        qkv = attn.qkv(hidden_states) + torch.cat((attn.q_bias, attn.zero_k_bias, attn.v_bias))
        q, k, v = qkv.unflatten(-1, (3, attn.num_heads, attn.head_dim)).unbind(2)
        out = self.core(q, k, v, mask=causal_mask(q)).mean(dim=2)
        return attn.proj(F.adaptive_avg_pool1d(out, attn.out_dim))


class MMAudioAttnProcessor(StreamAttnProcessor):
    """MMAudio's VAE: q, k and v of unit mean square from one convolution over (B, C, N)."""

    replaces = ("MMAudioAttnProcessor",)

    def forward(self, attn, x: Tensor) -> Tensor:
        qkv = attn.qkv(x).unflatten(1, (attn.num_heads, -1, 3))  # [B, H, D, 3, N]
        # As diffusers normalizes them: by the root mean square over D, plus 1e-4.
        norm = torch.linalg.vector_norm(qkv, dim=2, keepdim=True, dtype=torch.float32)
        norm = 1e-4 + norm * (norm.numel() / qkv.numel()) ** 0.5
        q, k, v = (qkv / norm.to(qkv.dtype)).permute(3, 0, 4, 1, 2).unbind(0)
        return attn.proj_out(self.core(q, k, v).permute(0, 2, 3, 1).flatten(1, 2))


class PairBiasAttnProcessor(StreamAttnProcessor):
    """RFD4-Proteina: a bias for each pair of tokens, a gate on the output."""

    replaces = ("RFD4ProteinaPairAttnProcessor",)
    hands_over = NOTHING
    kept = "adds a bias to each pair of tokens"

    def forward(self, attn, hidden_states: Tensor, pairs: Tensor | None, mask: Tensor) -> Tensor:
        hidden_states = attn.node_norm(hidden_states)
        projected = (attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states))
        q, k, v = (t.unflatten(-1, (attn.heads, -1)) for t in projected)
        gate = attn.to_g(hidden_states).sigmoid()
        q, k = normalize(q, k, norms_of(attn), all_heads=True)
        seen = mask[:, None, :, None] & mask[:, None, None, :]
        if attn.use_pair:
            bias = attn.to_bias(attn.pair_norm(pairs)).permute(0, 3, 1, 2)
        else:
            bias = q.new_zeros(seen.shape)
        out = self.core(q, k.to(v.dtype), v, mask=bias.masked_fill(~seen, -1e4))
        return attn.to_out(out.flatten(2) * gate)

    @classmethod
    def attends_to_itself(cls, name, attn):
        return False
