"""Stable Audio: partial RoPE, grouped-query cross-attention."""

from torch import Tensor

from diffattn.processors.plain import PlainAttnProcessor
from diffattn.processors.rotary import from_halves


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
        rotary = from_halves(rotary_emb)
        return self.attend(attn, hidden_states, encoder_hidden_states, attention_mask, rotary=rotary)
