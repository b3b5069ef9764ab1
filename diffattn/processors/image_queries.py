"""Queries of one kind of tokens over keys of both: PRX, Nucleus-MoE, Cosmos 3."""

import torch
from torch import Tensor

from diffattn.processors.base import normalize
from diffattn.processors.projections import NOTHING
from diffattn.processors.rotary import from_complex, from_halves, from_matrices, join
from diffattn.processors.streams import Stream, StreamAttnProcessor, causal_mask, mask_for, norms_of


class ImageQueriesAttnProcessor(StreamAttnProcessor):
    """What the two below share: the text is never a query, so a linear core cannot rotate both alike."""

    hands_over = NOTHING
    kept = "attends to text too"

    def attend(self, image: Stream, text: Stream | None, text_first: bool, mask) -> Tensor:
        """`text` has keys and values alone."""
        lengths = [image.k.shape[1], 0 if text is None else text.k.shape[1]]
        rotate = None
        if self.core.rotates_first:
            q, k, v = self.prepared(image)
        else:
            q, k, v = self.prepared(image._replace(rotary=None))
            rotaries = [image.rotary, None if text is None else text.rotary]
            if text_first:
                rotaries, lengths = rotaries[::-1], lengths[::-1]
            rotary = join(rotaries, lengths)
            rotate = None if rotary is None else (image.rotary, rotary)
        if text is not None:
            _, of_text, values = self.prepared(text if self.core.rotates_first else text._replace(rotary=None))
            k = torch.cat((of_text, k) if text_first else (k, of_text), dim=1)
            v = torch.cat((values, v) if text_first else (v, values), dim=1)
        return self.core(q, k, v, mask=mask_for(mask, q), rotate=rotate)

    def prepared(self, stream):
        rotate = None if stream.rotary is None else (stream.rotary, stream.rotary)
        q, k = normalize(stream.q, stream.k, stream.norms, rotate)
        return q.to(stream.v.dtype), k.to(stream.v.dtype), stream.v

    @classmethod
    def attends_to_itself(cls, name, attn):
        return False


class PRXAttnProcessor(ImageQueriesAttnProcessor):
    """PRX: the text's keys first, a mask over the text, the image rotated."""

    replaces = ("PRXAttnProcessor2_0",)

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tensor | None = None,
    ) -> Tensor:
        if encoder_hidden_states is None:
            raise ValueError(f"encoder_hidden_states: got None, expected text: {type(self).__name__} attends to it")
        q, k, v = (t.unflatten(-1, (-1, attn.head_dim)) for t in attn.img_qkv_proj(hidden_states).chunk(3, dim=-1))
        image = Stream(q, k, v, norms_of(attn), from_matrices(image_rotary_emb))
        k, v = (t.unflatten(-1, (-1, attn.head_dim)) for t in attn.txt_kv_proj(encoder_hidden_states).chunk(2, dim=-1))
        text = Stream(k, k, v, (None, attn.norm_added_k))
        mask = None
        if attention_mask is not None:
            if attention_mask.shape != encoder_hidden_states.shape[:2]:
                raise ValueError(
                    f"attention_mask: got shape {tuple(attention_mask.shape)}, expected "
                    f"{tuple(encoder_hidden_states.shape[:2])}, a mask over the text"
                )
            of_image = attention_mask.new_ones(hidden_states.shape[:2], dtype=torch.bool)
            mask = torch.cat((attention_mask.bool(), of_image), dim=1)
        return self.project_out(attn, self.attend(image, text, True, mask).flatten(2))


class NucleusMoEAttnProcessor(ImageQueriesAttnProcessor):
    """Nucleus-MoE: the image's keys first, a rotation for each, grouped-query attention where configured."""

    replaces = ("NucleusMoEAttnProcessor2_0",)

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        cached_txt_key: Tensor | None = None,
        cached_txt_value: Tensor | None = None,
    ) -> Tensor:
        of_image, of_text = (None, None) if image_rotary_emb is None else map(from_complex, image_rotary_emb)
        projected = (attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states))
        head_dim = attn.inner_dim // attn.heads
        image = Stream(*(t.unflatten(-1, (-1, head_dim)) for t in projected), norms_of(attn), of_image)
        text = None
        if cached_txt_key is not None and cached_txt_value is not None:
            if not self.core.rotates_first:
                raise ValueError(f"cached_txt_key: is rotated already, which {self.core} does itself, later")
            text = Stream(cached_txt_key, cached_txt_key, cached_txt_value)
        elif encoder_hidden_states is not None:
            projected = (attn.add_k_proj(encoder_hidden_states), attn.add_v_proj(encoder_hidden_states))
            k, v = (t.unflatten(-1, (-1, head_dim)) for t in projected)
            text = Stream(k, k, v, (None, attn.norm_added_k), of_text)
        return self.project_out(attn, self.attend(image, text, False, attention_mask).flatten(2))

    @classmethod
    def heads(cls, attn):
        return attn.heads, attn.inner_kv_dim // (attn.inner_dim // attn.heads)


class Cosmos3AttnProcessor(StreamAttnProcessor):
    """Cosmos 3: text attends causally to itself, generated tokens to all; grouped-query attention; no batch dimension.

    The two have projections and norms of their own.
    """

    replaces = ("Cosmos3AttnProcessor",)
    hands_over = NOTHING
    kept = "attends causally, and to text too"

    def forward(
        self,
        attn,
        und_seq: Tensor,
        gen_seq: Tensor,
        rotary_emb: tuple[Tensor, Tensor, Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        und, gen = und_seq.unsqueeze(0), gen_seq.unsqueeze(0)
        of_und, of_gen = from_halves(rotary_emb[:2]), from_halves(rotary_emb[2:])
        q, k, v = self.heads_by(attn, und, attn.to_q, attn.to_k, attn.to_v)
        gen_q, gen_k, gen_v = self.heads_by(attn, gen, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        gen_q, gen_k = normalize(gen_q, gen_k, (attn.norm_added_q, attn.norm_added_k), (of_gen, of_gen))
        k_for_gen = None
        if attn.k_norm_und_for_gen is not None:
            _, k_for_gen = normalize(k, attn.k_norm_und_for_gen(attn.norm_k(k)), (None, None), (None, of_und))
        q, k = normalize(q, k, norms_of(attn), (of_und, of_und))
        k_for_gen = k if k_for_gen is None else k_for_gen

        und_out = self.core(q, k, v, mask=causal_mask(q))
        gen_out = self.core(gen_q, torch.cat((k_for_gen, gen_k), dim=1), torch.cat((v, gen_v), dim=1))
        return attn.to_out(und_out.flatten(2)).squeeze(0), attn.to_add_out(gen_out.flatten(2)).squeeze(0)

    def heads_by(self, attn, tokens, *projections):
        return (projection(tokens).unflatten(-1, (-1, attn.head_dim)) for projection in projections)

    @classmethod
    def heads(cls, attn):
        return attn.num_attention_heads, attn.num_key_value_heads

    @classmethod
    def attends_to_itself(cls, name, attn):
        return False
