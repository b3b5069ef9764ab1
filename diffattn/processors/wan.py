"""Wan and its kin: norms over all heads, self-attention over video tokens with rotary embedding, cross-attention."""

import torch
from torch import Tensor

from diffattn.processors.base import normalize
from diffattn.processors.projections import OWN
from diffattn.processors.rotary import from_complex, from_pairs
from diffattn.processors.streams import StreamAttnProcessor, attend_across, mask_for, norms_of

TEXT_TOKENS = 512  # Wan's cross-attention takes the last 512 tokens for text, those before for an image


class WanAttnProcessor(StreamAttnProcessor):
    """Wan, ChronoEdit, VACE, SkyReels: cross-attention may add attention to an image's tokens."""

    replaces = ("WanAttnProcessor", "SkyReelsV2AttnProcessor")
    hands_over = OWN
    fixes_key_heads = True

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if attn.add_k_proj is not None:
            of_image = encoder_hidden_states.shape[1] - TEXT_TOKENS
            image, text = encoder_hidden_states[:, :of_image], encoder_hidden_states[:, of_image:]
            return attend_to_image_too(self, attn, hidden_states, text, image, attention_mask)
        rotary = from_pairs(rotary_emb)
        q, k, v = self.project_heads(attn, hidden_states, encoder_hidden_states)
        out = attend_across(self.core, q, k, v, norms_of(attn), (rotary, rotary), all_heads=True, mask=attention_mask)
        return self.project_out(attn, out.flatten(2))

    @classmethod
    def attends_to_itself(cls, name, attn):
        # VACE's control blocks of diffusers 0.35 are cross-attention that does not say so.
        return not attn.is_cross_attention and not name.endswith("attn2")


def attend_to_image_too(processor, attn, hidden_states, text, image, mask=None) -> Tensor:
    """Cross-attention to text and, by keys and values of their own, to image tokens; the two are added."""
    q, k, v = processor.project_heads(attn, hidden_states, text)
    q, k = normalize(q, k, norms_of(attn), all_heads=True)
    out = processor.core(q, k, v, mask=mask_for(mask, q))
    if getattr(attn, "fused_projections", False):
        k, v = attn.to_added_kv(image).chunk(2, dim=-1)
    else:
        k, v = attn.add_k_proj(image), attn.add_v_proj(image)
    k, v = (t.unflatten(-1, (-1, q.shape[-1])) for t in (attn.norm_added_k(k), v))
    out = out + processor.core(q, k.to(v.dtype), v)
    return processor.project_out(attn, out.flatten(2))


class HeliosAttnProcessor(StreamAttnProcessor):
    """Helios: history and current tokens in one stream; it can learn to weigh the history's keys."""

    replaces = ("HeliosAttnProcessor",)
    fixes_key_heads = True

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Tensor | None = None,
        original_context_length: int | None = None,
    ) -> Tensor:
        rotary = from_pairs(None if rotary_emb is None else rotary_emb.chunk(2, dim=-1))
        q, k, v = self.project_heads(attn, hidden_states, encoder_hidden_states)
        rotate = None if rotary is None else (rotary, rotary)
        first = self.core.rotates_first
        q, k = normalize(q, k, norms_of(attn), rotate if first else None, all_heads=True)
        history = hidden_states.shape[1] - (original_context_length or hidden_states.shape[1])
        if not attn.is_cross_attention and attn.is_amplify_history and history > 0:
            # A factor a head: before the rotation or after it is the same.
            factor = 1 + attn.history_key_scale.sigmoid() * (attn.max_scale - 1)
            k = torch.cat((k[:, :history] * factor.view(1, 1, -1, 1), k[:, history:]), dim=1)
        out = self.core(q, k.to(v.dtype), v, mask=mask_for(attention_mask, q), rotate=None if first else rotate)
        return self.project_out(attn, out.flatten(2))

    @classmethod
    def attends_to_itself(cls, name, attn):
        return not attn.is_cross_attention


class AnyFlowAttnProcessor(StreamAttnProcessor):
    """AnyFlow's bidirectional self-attention."""

    replaces = ("AnyFlowAttnProcessor",)
    fixes_key_heads = True

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: dict[str, Tensor] | None = None,
    ) -> Tensor:
        rotate = None
        if rotary_emb is not None:
            query, key = rotary_emb["query"], rotary_emb["key"]
            of_query = by_token(query)
            rotate = (of_query, of_query if key is query else by_token(key))
        q, k, v = self.project_heads(attn, hidden_states, encoder_hidden_states)
        out = attend_across(self.core, q, k, v, norms_of(attn), rotate, all_heads=True, mask=attention_mask)
        return self.project_out(attn, out.flatten(2))


def by_token(freqs: Tensor):
    """(1 or B, 1, N, D/2) or (N, D/2)."""
    return from_complex(freqs.squeeze(1) if freqs.dim() == 4 else freqs)


class AnyFlowCrossAttnProcessor(StreamAttnProcessor):
    """AnyFlow's attention to the text."""

    replaces = ("AnyFlowCrossAttnProcessor",)
    fixes_key_heads = True

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        q, k, v = self.project_heads(attn, hidden_states, encoder_hidden_states)
        out = attend_across(self.core, q, k, v, norms_of(attn), all_heads=True, mask=attention_mask)
        return self.project_out(attn, out.flatten(2))

    @classmethod
    def attends_to_itself(cls, name, attn):
        return False


class WanAnimate2CrossAttnProcessor(StreamAttnProcessor):
    """Wan-Animate 2's attention to text and image, which come apart."""

    replaces = ("WanAnimate2CrossAttnProcessor",)
    hands_over = OWN
    fixes_key_heads = True

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
    ) -> Tensor:
        if encoder_hidden_states_image is not None:
            return attend_to_image_too(self, attn, hidden_states, encoder_hidden_states, encoder_hidden_states_image)
        q, k, v = self.project_heads(attn, hidden_states, encoder_hidden_states)
        out = attend_across(self.core, q, k, v, norms_of(attn), all_heads=True)
        return self.project_out(attn, out.flatten(2))

    @classmethod
    def attends_to_itself(cls, name, attn):
        return False


class WanAnimateFaceAttnProcessor(StreamAttnProcessor):
    """Wan-Animate: the tokens of each frame attend to that frame's face tokens."""

    replaces = ("WanAnimateFaceBlockAttnProcessor",)
    hands_over = OWN
    kept = "attends to a face"

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        hidden_states, faces = attn.pre_norm_q(hidden_states), attn.pre_norm_kv(encoder_hidden_states)
        batch, frames = faces.shape[:2]
        q, k, v = self.project_heads(attn, hidden_states, faces.flatten(1, 2))
        q, k = normalize(q, k, norms_of(attn))
        q, k, v = (t.unflatten(1, (frames, -1)).flatten(0, 1) for t in (q, k, v))  # [B T, N / T, H, D]
        out = self.core(q, k.to(v.dtype), v).flatten(2)
        out = self.project_out(attn, out.unflatten(0, (batch, frames)).flatten(1, 2))
        return out if attention_mask is None else out * attention_mask.flatten(1)

    @classmethod
    def attends_to_itself(cls, name, attn):
        return False
