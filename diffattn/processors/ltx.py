"""LTX-Video and LTX-2: norms and rotary embedding before the split into heads, so each head has angles of its own."""

import torch
from torch import Tensor

from diffattn.processors.base import broadcast_mask
from diffattn.processors.projections import project_by
from diffattn.processors.rotary import HeadRotary, heads_of
from diffattn.processors.streams import StreamAttnProcessor, attend_across, norms_of


class LTXAttnProcessor(StreamAttnProcessor):
    """LTX-Video: self-attention over video tokens, cross-attention to the text."""

    replaces = ("LTXVideoAttnProcessor",)
    fixes_key_heads = True

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        rotary = heads_of(image_rotary_emb, attn.heads)
        return self.project_out(attn, self.attend(attn, hidden_states, encoder_hidden_states, attention_mask, rotary))

    def attend(self, attn, hidden_states, context, mask, of_query, of_key=None):
        length = hidden_states.shape[1] if context is None else context.shape[1]
        mask = broadcast_mask(attn, mask, hidden_states.shape[0], length)
        rotate = None if of_query is None else (of_query, of_key)
        q, k, v = self.project_heads(attn, hidden_states, context)
        return attend_across(self.core, q, k, v, norms_of(attn), rotate, all_heads=True, mask=mask).flatten(2)

    @classmethod
    def attends_to_itself(cls, name, attn):
        return name.endswith("attn1")


class LTX2AttnProcessor(LTXAttnProcessor):
    """LTX-2: video and sound, each attending to itself, to the text and to the other; a gate a head on the output."""

    replaces = ("LTX2AudioVideoAttnProcessor", "SanaWMLTX2AudioVideoAttnProcessor")
    kept = "attends to text, or to the other of video and sound"

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_rotary_emb: tuple[Tensor, Tensor] | None = None,
        key_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        rotaries = (self.rotary(attn, t) for t in (query_rotary_emb, key_rotary_emb))
        out = self.attend(attn, hidden_states, encoder_hidden_states, attention_mask, *rotaries)
        return self.project_out(attn, gate(attn, hidden_states, out))

    def rotary(self, attn, tables):
        if tables is None or attn.rope_type == "interleaved":
            return heads_of(tables, attn.heads)
        # [1 or B, H, N, D/2]
        return HeadRotary(*(t.transpose(1, 2) for t in tables), interleaved=False)


class LTX2PerturbedAttnProcessor(LTX2AttnProcessor):
    """LTX-2 with spatio-temporal guidance: perturbed samples take their values in place of attention."""

    replaces = ("LTX2PerturbedAttnProcessor",)

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_rotary_emb: tuple[Tensor, Tensor] | None = None,
        key_rotary_emb: tuple[Tensor, Tensor] | None = None,
        perturbation_mask: Tensor | None = None,
        all_perturbed: bool | None = None,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if all_perturbed is None:
            all_perturbed = perturbation_mask is not None and bool((perturbation_mask == 0).all())
        if all_perturbed:
            out = self.values(attn, context)
        else:
            rotaries = (self.rotary(attn, t) for t in (query_rotary_emb, key_rotary_emb))
            out = self.attend(attn, hidden_states, encoder_hidden_states, attention_mask, *rotaries)
            if perturbation_mask is not None:
                out = torch.lerp(self.values(attn, context), out, perturbation_mask)
        return self.project_out(attn, gate(attn, hidden_states, out))

    def values(self, attn, context):
        """(B, M, H D): what each head returns that attends to itself alone."""
        (v,) = project_by(self.core, {"v": attn.to_v}, [context], attn.head_dim)
        return v.repeat_interleave(attn.heads // v.shape[2], dim=2).flatten(2)


def gate(attn, hidden_states: Tensor, out: Tensor) -> Tensor:
    """Multiply each head of out (B, N, H D) by 2 sigmoid of a logit, in the models that have such a gate."""
    if attn.to_gate_logits is None:
        return out
    gates = 2 * attn.to_gate_logits(hidden_states).sigmoid()  # [B, N, H]
    return (out.unflatten(2, (attn.heads, -1)) * gates.unsqueeze(-1)).flatten(2)
