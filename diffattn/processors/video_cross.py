"""Self-attention with rotary embedding beside cross-attention to text: Cosmos, Kandinsky, Allegro, HunyuanDiT."""

import torch
from torch import Tensor

from diffattn.cores import Rotary
from diffattn.processors.base import broadcast_mask, output
from diffattn.processors.plain import PlainAttnProcessor
from diffattn.processors.projections import head_dim_of, out_by, project_by
from diffattn.processors.rotary import from_halves, from_matrices, from_pairs
from diffattn.processors.streams import StreamAttnProcessor, attend_across, norms_of, refuse


class HunyuanDiTAttnProcessor(PlainAttnProcessor):
    """HunyuanDiT: the plain block with norms and RoPE; cross-attention rotates the queries alone."""

    replaces = ("HunyuanAttnProcessor2_0", "FusedHunyuanAttnProcessor2_0")

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        rotary = from_pairs(image_rotary_emb)
        return self.attend(attn, hidden_states, encoder_hidden_states, attention_mask, temb, rotary=rotary)


class AllegroAttnProcessor(StreamAttnProcessor):
    """Allegro: a third of the features is rotated by the frame, a third by the row, a third by the column."""

    replaces = ("AllegroAttnProcessor2_0",)

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        image_rotary_emb: tuple | None = None,
    ) -> Tensor:
        refuse(self, "has no norm that would take it", temb=temb)
        length = hidden_states.shape[1] if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        mask = broadcast_mask(attn, attention_mask, hidden_states.shape[0], length)
        q, k, v = self.project_heads(attn, hidden_states, encoder_hidden_states)
        rotate = None
        if image_rotary_emb is not None and not attn.is_cross_attention:
            # Bring the two features of each pair together: q.k does not change if both are permuted alike.
            q, k = (t.unflatten(-1, (3, 2, -1)).transpose(-1, -2).flatten(-3) for t in (q, k))
            rotary = by_position(*image_rotary_emb)
            rotate = (rotary, rotary)
        return output(attn, attend_across(self.core, q, k, v, rotate=rotate, mask=mask), self.core)

    @classmethod
    def attends_to_itself(cls, name, attn):
        return not attn.is_cross_attention


def by_position(tables, positions: Tensor) -> Rotary:
    """Three (cos, sin) of shape (places, D/3), by the positions (3, 1, N) of the tokens."""
    half = tables[0][0].shape[-1] // 2
    places = [p.flatten() for p in positions]
    return Rotary(*(torch.cat([t[i][p, :half] for t, p in zip(tables, places, strict=True)], -1) for i in (0, 1)))


class CosmosAttnProcessor(StreamAttnProcessor):
    """Cosmos: self-attention over video tokens with RoPE, cross-attention to the text without."""

    replaces = ("CosmosAttnProcessor2_0",)

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        out = self.attend(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        return self.project_out(attn, out)

    def attend(self, attn, hidden_states, context, mask, tables):
        rotary = from_halves(tables)
        q, k, v = self.project_heads(attn, hidden_states, context)
        return attend_across(self.core, q, k, v, norms_of(attn), (rotary, rotary), mask=mask).flatten(2)

    @classmethod
    def attends_to_itself(cls, name, attn):
        return not attn.is_cross_attention


class CosmosImageAttnProcessor(CosmosAttnProcessor):
    """Cosmos 2.5's cross-attention to text and, by projections of its own, to an image; the two are added."""

    replaces = ("CosmosAttnProcessor2_5",)

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: tuple[Tensor | None, Tensor | None],
        attention_mask: tuple[Tensor | None, Tensor | None] | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if not isinstance(encoder_hidden_states, tuple):
            raise ValueError(
                f"encoder_hidden_states: got {type(encoder_hidden_states).__name__}, expected (text, image)"
            )
        text, image = encoder_hidden_states
        of_text, of_image = attention_mask if attention_mask is not None else (None, None)
        out = self.attend(attn, hidden_states, text, of_text, image_rotary_emb)
        if image is not None:
            q, k, v = attn.q_img(hidden_states), attn.k_img(image), attn.v_img(image)
            q, k, v = (t.unflatten(-1, (attn.heads, -1)) for t in (q, k, v))
            norms = (attn.q_img_norm, attn.k_img_norm)
            out = out + attend_across(self.core, q, k, v, norms, mask=of_image).flatten(2)
        return self.project_out(attn, out)


KANDINSKY = {"q": "to_query", "k": "to_key", "v": "to_value", "out": "out_layer"}


class Kandinsky5AttnProcessor(StreamAttnProcessor):
    """Kandinsky 5 with dense attention: text and video attend to themselves, video to the text.

    In float32, stock rounds rotated queries and keys to bfloat16; here they keep their precision.
    """

    replaces = ("Kandinsky5AttnProcessor",)
    hands_over = KANDINSKY

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        rotary_emb: Tensor | None = None,
        sparse_params: dict | None = None,
    ) -> Tensor:
        refuse(self, "is dense; unpatch for sparse (NABLA) attention", sparse_params=sparse_params)
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        modules = {"q": attn.to_query, "k": attn.to_key, "v": attn.to_value}
        q, k, v = project_by(self.core, modules, (hidden_states, source, source), head_dim_of(attn, attn.num_heads))
        rotary = from_matrices(rotary_emb)
        norms = (attn.query_norm, attn.key_norm)
        out = attend_across(self.core, q, k, v, norms, (rotary, rotary)).flatten(2)
        return out_by(self.core, "out", attn.out_layer, out)

    @classmethod
    def attends_to_itself(cls, name, attn):
        return "visual" in name and not name.endswith("cross_attention")


class Kandinsky6AttnProcessor(StreamAttnProcessor):
    """Kandinsky 6: text, video and sound attend to themselves and to each other."""

    replaces = ("Kandinsky6AttnProcessor",)
    hands_over = KANDINSKY
    kept = "attends to text, or to the other of video and sound"

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        rotary_emb: Tensor | None = None,
        rotary_emb_kv: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        modules = {"q": attn.to_query, "k": attn.to_key, "v": attn.to_value}
        q, k, v = project_by(self.core, modules, (hidden_states, source, source), head_dim_of(attn, attn.num_heads))
        of_query = from_matrices(rotary_emb)
        of_key = of_query if rotary_emb_kv is rotary_emb else from_matrices(rotary_emb_kv)
        norms = (attn.query_norm, attn.key_norm)
        out = attend_across(self.core, q, k, v, norms, (of_query, of_key), mask=attn_mask)
        return out_by(self.core, "out", attn.out_layer, out.flatten(2))

    @classmethod
    def attends_to_itself(cls, name, attn):
        return "text" not in name and "self" in name
