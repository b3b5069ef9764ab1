"""Lumina 2 and Lumina-Next: grouped-query attention, complex RoPE, proportional attention."""

import math

import torch
from torch import Tensor

from diffattn.kernels import exporting
from diffattn.processors.base import CoreAttnProcessor, norm_and_rotate, output, project_heads
from diffattn.processors.projections import OWN, QKV
from diffattn.processors.rotary import from_complex


class Lumina2AttnProcessor(CoreAttnProcessor):
    """Lumina 2's attention over text and image tokens in one stream."""

    replaces = ("Lumina2AttnProcessor2_0",)
    hands_over = OWN

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tensor | None = None,
        base_sequence_length: int | None = None,
    ) -> Tensor:
        q, k, v = project_heads(attn, hidden_states, encoder_hidden_states, self.core)
        rotary = from_complex(image_rotary_emb)
        rotate = None if rotary is None else (rotary, rotary)
        q, k, rotate = norm_and_rotate(self.core, q, k, (attn.norm_q, attn.norm_k), rotate)
        q, scale = proportional_scale(attn, q, base_sequence_length)
        out = self.core(q, k, v, mask=key_padding_mask(attention_mask), scale=scale, rotate=rotate)
        return output(attn, out, self.core)

    @classmethod
    def attends_to_itself(cls, name, attn):
        return "context_refiner" not in name  # it refines text tokens


class LuminaNextAttnProcessor(CoreAttnProcessor):
    """Lumina-Next's self- and cross-attention; the block adds the two and projects out."""

    replaces = ("LuminaAttnProcessor2_0",)
    hands_over = QKV  # the block projects out
    fixes_key_heads = True

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        query_rotary_emb: Tensor | None = None,
        key_rotary_emb: Tensor | None = None,
        base_sequence_length: int | None = None,
    ) -> Tensor:
        if hidden_states.dim() == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        q, k, v = project_heads(attn, hidden_states, encoder_hidden_states, self.core)
        rotate, base_length = None, None
        if query_rotary_emb is not None:
            rotary = from_complex(query_rotary_emb)
            same = key_rotary_emb is query_rotary_emb
            rotate = (rotary, rotary if same else from_complex(key_rotary_emb))
        if key_rotary_emb is not None:
            base_length = base_sequence_length
        q, k, rotate = norm_and_rotate(self.core, q, k, (attn.norm_q, attn.norm_k), rotate, all_heads=True)
        q, scale = proportional_scale(attn, q, base_length)
        return self.core(q, k, v, mask=key_padding_mask(attention_mask), scale=scale, rotate=rotate)


def key_padding_mask(mask: Tensor | None) -> Tensor | None:
    """(B, M) with nonzero for tokens to (B, 1, 1, M) boolean."""
    return None if mask is None else mask.bool()[:, None, None, :]


def proportional_scale(attn, q: Tensor, base_length: int | None) -> tuple[Tensor, float | None]:
    """q and its scale D^-0.5 sqrt(log_base(N)): sharper attention for longer sequences; None is D^-0.5."""
    length = q.shape[1]
    if base_length is None:
        return q, None
    if not (torch.compiler.is_compiling() or exporting()):
        return q, math.sqrt(math.log(length, base_length)) * attn.scale
    # Python's logarithm would bake the length into the graph: an export of one length, a new graph for each.
    sharper = (torch.scalar_tensor(length, device=q.device).log() / math.log(base_length)).sqrt()
    return q * sharper.to(q.dtype), attn.scale
