"""Text and image tokens attend together through the same projections: CogVideoX, CogView 3 and 4, GLM-Image."""

import torch
from torch import Tensor

from diffattn.processors.base import broadcast_mask
from diffattn.processors.rotary import from_halves, from_pairs, join
from diffattn.processors.streams import Stream, StreamAttnProcessor, join_streams, left, norms_of


class CogVideoXAttnProcessor(StreamAttnProcessor):
    """CogVideoX, ConsisID, CogView 3: text first, only the image is rotated."""

    replaces = ("CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0")

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        length = encoder_hidden_states.shape[1] + hidden_states.shape[1]
        mask = broadcast_mask(attn, attention_mask, hidden_states.shape[0], length)
        return self.attend(attn, hidden_states, encoder_hidden_states, mask, from_pairs(image_rotary_emb))

    def attend(self, attn, image, text, mask, rotary, cache=None):
        lengths = [text.shape[1], image.shape[1]]
        joined = self.project_heads(attn, torch.cat((text, image), dim=1))
        stream = Stream(*joined, norms_of(attn), join([None, rotary], lengths))
        q, k, v = join_streams(self.core, stream)
        if cache is not None:
            k, v = self.through(cache, k, v)
        out = self.core(q, k, v, mask=mask, **left(self.core, stream))
        text, image = self.project_out(attn, out.flatten(2)).split(lengths, dim=1)
        return image, text


class CogView4AttnProcessor(CogVideoXAttnProcessor):
    """CogView 4: a mask over the text adds 1 to the scores of two kept tokens and 0 to others, as stock's does."""

    replaces = ("CogView4AttnProcessor",)

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        mask = pair_bias(attention_mask, hidden_states)
        return self.attend(attn, hidden_states, encoder_hidden_states, mask, from_halves(image_rotary_emb))


class GlmImageAttnProcessor(CogVideoXAttnProcessor):
    """GLM-Image: CogView 4's attention, with a cache of the keys and values of condition images."""

    replaces = ("GlmImageAttnProcessor",)

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        kv_cache=None,
    ) -> tuple[Tensor, Tensor]:
        mask = pair_bias(attention_mask, hidden_states)
        rotary = from_halves(image_rotary_emb)
        return self.attend(attn, hidden_states, encoder_hidden_states, mask, rotary, cache=kv_cache)

    def through(self, cache, k, v):
        if cache.mode in ("write", "read") and not self.core.rotates_first:
            raise ValueError(f"kv_cache: keys are cached after their rotation, which {self.core} does itself, later")
        if cache.mode == "write":
            cache.store(k, v)
        elif cache.mode == "read":
            k, v = cache.get(k, v)
        return k, v


def pair_bias(text_mask: Tensor | None, image: Tensor) -> Tensor | None:
    """(B, T) to (B, 1, T + N, T + N) of ones where both tokens are kept, to add to the scores."""
    if text_mask is None:
        return None
    if text_mask.dim() != 2:
        raise ValueError(f"attention_mask: got shape {tuple(text_mask.shape)}, expected (batch, text tokens)")
    kept = torch.cat((text_mask.bool(), text_mask.new_ones(image.shape[:2], dtype=torch.bool)), dim=1)
    return (kept[:, None, :, None] & kept[:, None, None, :]).to(image.dtype)
