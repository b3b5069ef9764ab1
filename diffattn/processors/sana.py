"""Sana and SANA-Video: ReLU linear self-attention, softmax cross-attention."""

import torch
from torch import Tensor

from diffattn.cores import LinearAttention
from diffattn.processors.base import CoreAttnProcessor, norm_and_rotate, output, project, project_heads
from diffattn.processors.plain import PlainAttnProcessor
from diffattn.processors.rotary import from_pairs
from diffattn.processors.streams import StreamAttnProcessor, attend_across


class SanaAttnProcessor(CoreAttnProcessor):
    """Sana's self-attention (Xie et al. 2024): no rotary embedding, output clipped in float16."""

    replaces = ("SanaLinearAttnProcessor2_0",)

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        refuse_mask(self, attention_mask)
        q, k, v = project(attn, hidden_states, encoder_hidden_states, norm_all_heads=True)
        out = output(attn, self.core(q, k, v))
        if out.dtype == torch.float16:
            out = out.clip(-65504, 65504)
        return out

    @classmethod
    def exact_core(cls, attn):
        return LinearAttention("relu", eps=1e-15)


class SanaVideoAttnProcessor(CoreAttnProcessor):
    """SANA-Video's self-attention (Chen et al. 2025): RoPE on the numerator, after the ReLU.

    The stock processor sums its normalizer in the model's dtype under a float32 numerator; here both are
    float32, so in bfloat16 this one is the more accurate of the two.
    """

    replaces = ("SanaLinearAttnProcessor3_0",)

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        refuse_mask(self, attention_mask)
        q, k, v = project_heads(attn, hidden_states, encoder_hidden_states)
        rotary = from_pairs(rotary_emb)
        rotate = None if rotary is None else (rotary, rotary)
        q, k, rotate = norm_and_rotate(self.core, q, k, (attn.norm_q, attn.norm_k), rotate, all_heads=True)
        return output(attn, self.core(q, k, v, rotate=rotate))

    @classmethod
    def exact_core(cls, attn):
        return LinearAttention("relu", eps=1e-15)


class SanaCrossAttnProcessor(PlainAttnProcessor):
    """Sana's softmax attention to the text: the plain block, normalizing queries and keys over all heads."""

    replaces = ("SanaAttnProcessor2_0",)
    fixes_key_heads = True

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        return self.attend(attn, hidden_states, encoder_hidden_states, attention_mask, norm_all_heads=True)


class SanaWMCrossAttnProcessor(StreamAttnProcessor):
    """Sana-WM's softmax attention to the text; `sana_wm` has its attention over frames."""

    replaces = ("SanaWMCrossAttnProcessor",)

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        projected = (attn.q_linear(hidden_states), *attn.kv_linear(encoder_hidden_states).chunk(2, dim=-1))
        q, k, v = (t.reshape(hidden_states.shape[0], -1, attn.heads, attn.head_dim) for t in projected)
        mask = attention_mask
        if attention_mask is not None and attention_mask.dim() == 2:
            mask = mask.bool()
        norms = (attn.q_norm, attn.k_norm)
        return attn.proj(attend_across(self.core, q, k, v, norms, all_heads=True, mask=mask).flatten(2))

    @classmethod
    def attends_to_itself(cls, name, attn):
        return False


def refuse_mask(processor, mask) -> None:
    # The stock processors take the argument and drop it, so no model passes one.
    if mask is not None:
        raise ValueError(
            f"attention_mask: got shape {tuple(mask.shape)}, expected None: {type(processor).__name__} "
            "attends to image tokens, which have no padding"
        )
