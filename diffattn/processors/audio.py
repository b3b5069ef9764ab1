"""Sound: AceStep, LongCat-Audio, MiniMax Music 3, Stable Audio 3, SAME, KVAE; and Anima's text conditioner."""

from torch import Tensor

from diffattn.processors.projections import NOTHING
from diffattn.processors.rotary import from_angles, from_halves
from diffattn.processors.streams import (
    Stream,
    StreamAttnProcessor,
    attend,
    attend_across,
    causal_mask,
    norms_of,
)


class AceStepAttnProcessor(StreamAttnProcessor):
    """AceStep: grouped-query self-attention, in every other layer within a window, and cross-attention."""

    replaces = ("AceStepAttnProcessor2_0",)
    kept = "attends to a condition, or within a window"

    @property
    def _attention_backend(self):
        return None  # the model reads it, to choose between a mask and a window

    @_attention_backend.setter
    def _attention_backend(self, value):
        if value is not None:
            raise NotImplementedError(
                f"{type(self).__name__} runs its own core: call diffattn.unpatch(model) before set_attention_backend()"
            )

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        context = encoder_hidden_states if attn.is_cross_attention else None
        rotary = from_halves(image_rotary_emb) if context is None else None
        q, k, v = self.project_heads(attn, hidden_states, context)
        out = attend_across(self.core, q, k, v, norms_of(attn), (rotary, rotary), mask=attention_mask)
        return self.project_out(attn, out.flatten(2))

    @classmethod
    def heads(cls, attn):
        return attn.heads, attn.kv_heads

    @classmethod
    def attends_to_itself(cls, name, attn):
        return not attn.is_cross_attention and attn.sliding_window is None


class LongCatAudioAttnProcessor(StreamAttnProcessor):
    """LongCat-Audio's self-attention; padding is masked, and its output set to 0."""

    replaces = ("AudioDiTSelfAttnProcessor",)
    fixes_key_heads = True

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        audio_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        rotary = from_halves(audio_rotary_emb)
        return self.attend(attn, hidden_states, None, attention_mask, attention_mask, (rotary, rotary))

    def attend(self, attn, hidden_states, context, mask, post_mask, rotate):
        q, k, v = self.project_heads(attn, hidden_states, context)
        norms = (attn.q_norm, attn.k_norm) if attn.qk_norm else (None, None)
        out = attend_across(self.core, q, k, v, norms, rotate, all_heads=True, mask=mask).flatten(2)
        return self.project_out(attn, out if post_mask is None else out * post_mask[..., None].to(out.dtype))


class LongCatAudioCrossAttnProcessor(LongCatAudioAttnProcessor):
    """LongCat-Audio's attention to the prompt, which is rotated by its own positions."""

    replaces = ("AudioDiTCrossAttnProcessor",)

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        post_attention_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        audio_rotary_emb: tuple[Tensor, Tensor] | None = None,
        prompt_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        rotate = (from_halves(audio_rotary_emb), from_halves(prompt_rotary_emb))
        return self.attend(attn, hidden_states, encoder_hidden_states, attention_mask, post_attention_mask, rotate)

    @classmethod
    def attends_to_itself(cls, name, attn):
        return False


class MiniMaxMusic3AttnProcessor(StreamAttnProcessor):
    """MiniMax Music 3: part of the features rotated, no norms."""

    replaces = ("MiniMaxMusic3AttnProcessor",)

    def forward(self, attn, hidden_states: Tensor, rotary_emb: tuple[Tensor, Tensor]) -> Tensor:
        stream = Stream(*self.project_heads(attn, hidden_states), rotary=from_halves(rotary_emb))
        return self.project_out(attn, attend(self.core, stream).flatten(2))


class CausalAttnProcessor(StreamAttnProcessor):
    """MiniMax Music 3's depth decoder: causal self-attention over the codes of one moment."""

    replaces = ("MiniMaxMusic3DepthAttnProcessor",)
    kept = "attends causally"

    def forward(self, attn, hidden_states: Tensor) -> Tensor:
        q, k, v = self.project_heads(attn, hidden_states)
        return self.project_out(attn, self.core(q, k, v, mask=causal_mask(q)).flatten(2))

    @classmethod
    def attends_to_itself(cls, name, attn):
        return False


class DifferentialAttnProcessor(StreamAttnProcessor):
    """Stable Audio 3's self-attention: the difference of two attentions to the same values, part of the features
    rotated."""

    replaces = ("StableAudio3SelfAttnProcessor",)
    hands_over = NOTHING

    def forward(self, attn, hidden_states: Tensor, rope: Tensor) -> Tensor:
        return self.attend(attn, hidden_states, rope)

    def attend(self, attn, hidden_states, angles, mask=None):
        rotary = from_angles(angles[-hidden_states.shape[1] :])
        parts = attn.to_qkv(hidden_states).chunk(5 if attn.use_differential else 3, dim=-1)
        *qk, v = (t.unflatten(-1, (-1, attn.dim_heads)) for t in parts)
        queries, keys = qk[: len(qk) // 2], [self.core.projected("k", k) for k in qk[len(qk) // 2 :]]
        v = self.core.projected("v", v)
        return difference(self.core, attn, queries, keys, v, (rotary, rotary), mask)


def difference(core, attn, queries, keys, v, rotate=None, mask=None) -> Tensor:
    """Attention by the first queries and keys, less that by the second if there are any; projected out."""
    norms = (attn.q_norm, attn.k_norm)
    outs = [attend_across(core, q, k, v, norms, rotate, mask=mask) for q, k in zip(queries, keys, strict=True)]
    out = outs[0] if len(outs) == 1 else outs[0] - outs[1]
    return attn.to_out(out.flatten(2))


class SAMEAttnProcessor(DifferentialAttnProcessor):
    """SAME, Stable Audio 3's autoencoder: the same, within chunks, by positions that the layer counts itself."""

    replaces = ("SAMEAttnProcessor",)

    def forward(self, attn, hidden_states: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        angles = attn.rope(hidden_states.shape[1], hidden_states.device)
        return self.attend(attn, hidden_states, angles, attn_mask)


class DifferentialCrossAttnProcessor(StreamAttnProcessor):
    """Stable Audio 3's attention to the text: the difference of two, without rotation."""

    replaces = ("StableAudio3CrossAttnProcessor",)
    hands_over = NOTHING

    def forward(self, attn, hidden_states: Tensor, context: Tensor, context_mask: Tensor | None = None) -> Tensor:
        count = 2 if attn.use_differential else 1
        queries = [t.unflatten(-1, (-1, attn.dim_heads)) for t in attn.to_q(hidden_states).chunk(count, dim=-1)]
        parts = attn.to_kv(context).chunk(count + 1, dim=-1)
        *keys, v = (t.unflatten(-1, (-1, attn.dim_heads)) for t in parts)
        mask = None if context_mask is None else context_mask.bool()
        return difference(self.core, attn, queries, keys, v, mask=mask)

    @classmethod
    def attends_to_itself(cls, name, attn):
        return False


class KVAEAudioAttnProcessor(StreamAttnProcessor):
    """KVAE's audio autoencoder: plain self-attention."""

    replaces = ("KVAEAudioAttnProcessor",)

    def forward(self, attn, hidden_states: Tensor) -> Tensor:
        q, k, v = self.project_heads(attn, hidden_states)
        return self.project_out(attn, self.core(q, k, v).flatten(2))


class AnimaTextAttnProcessor(StreamAttnProcessor):
    """Anima's text conditioner: self-attention over one text, cross-attention to another."""

    replaces = ("AnimaTextConditionerAttnProcessor",)

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        encoder_position_embeddings: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if position_embeddings is not None and encoder_position_embeddings is None:
            raise ValueError("encoder_position_embeddings: got None, expected tables: position_embeddings has some")
        rotate = None
        if position_embeddings is not None:
            rotate = (from_halves(position_embeddings), from_halves(encoder_position_embeddings))
        q, k, v = attn.q_proj(hidden_states), attn.k_proj(source), attn.v_proj(source)
        q, k, v = (t.unflatten(-1, (-1, attn.attention_head_dim)) for t in (q, k, v))
        norms = (attn.q_norm, attn.k_norm)
        return attn.o_proj(attend_across(self.core, q, k, v, norms, rotate, mask=attention_mask).flatten(2))

    @classmethod
    def heads(cls, attn):
        return attn.num_attention_heads, attn.num_attention_heads

    @classmethod
    def attends_to_itself(cls, name, attn):
        return False
