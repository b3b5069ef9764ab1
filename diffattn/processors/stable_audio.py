"""Stable Audio: partial RoPE, grouped-query cross-attention."""

from torch import Tensor

from diffattn.cores import Rotary
from diffattn.processors.plain import PlainAttnProcessor


class StableAudioAttnProcessor(PlainAttnProcessor):
    """The plain block with RoPE on the first R features; cross-attention rotates the queries alone."""

    replaces = ("StableAudioAttnProcessor2_0",)

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        rotary = None
        if rotary_emb is not None:
            # [N, R], the angles of the first half again in the second.
            cos, sin = (t[..., : t.shape[-1] // 2] for t in rotary_emb)
            rotary = Rotary(cos, sin, interleaved=False)
        return self.attend(attn, hidden_states, encoder_hidden_states, attention_mask, rotary=rotary)
