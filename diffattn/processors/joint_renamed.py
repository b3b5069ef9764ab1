"""Joint attention whose modules have names and ways of their own: JoyImage, HiDream, Mochi."""

import torch
from torch import Tensor

from diffattn.processors.projections import NOTHING, OWN, TEXT, out_by, project_by, split_heads
from diffattn.processors.rotary import HeadRotary, attend_by_head, from_matrices, from_pairs, split
from diffattn.processors.streams import (
    Stream,
    StreamAttnProcessor,
    attend_jointly,
    join_streams,
)


class JoyImageAttnProcessor(StreamAttnProcessor):
    """JoyImage: image first, q, k, v of each stream from one projection, a rotation for each."""

    replaces = ("JoyImageAttnProcessor",)
    hands_over = NOTHING

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        image_rotary_emb: tuple[tuple | None, tuple | None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        of_image, of_text = (None, None) if image_rotary_emb is None else map(from_pairs, image_rotary_emb)
        return self.attend(attn, hidden_states, encoder_hidden_states, of_image, of_text)

    def attend(self, attn, image, text, of_image, of_text=None, mask=None):
        if text is None:
            raise ValueError(f"encoder_hidden_states: got None, expected text: {type(self).__name__} joins the two")
        image = self.heads_by(attn, attn.img_attn_qkv, image, "qkv")
        image = Stream(*image, (attn.img_attn_q_norm, attn.img_attn_k_norm), of_image)
        text = self.heads_by(attn, attn.txt_attn_qkv, text, TEXT)
        text = Stream(*text, (attn.txt_attn_q_norm, attn.txt_attn_k_norm), of_text)
        image, text = attend_jointly(self.core, image, text, mask=mask)
        return attn.img_attn_proj(image), attn.txt_attn_proj(text)

    def heads_by(self, attn, module, hidden_states, roles):
        parts = module(hidden_states).chunk(3, dim=-1)
        return split_heads(self.core, dict(zip(roles, parts, strict=True)), parts[0].shape[-1] // attn.heads)


class JoyImageEditPlusAttnProcessor(JoyImageAttnProcessor):
    """JoyImage Edit Plus: a table for each picture of the batch, the image's alone; a mask over all tokens."""

    replaces = ("JoyImageEditPlusAttnProcessor",)

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        rotary = from_pairs(image_rotary_emb)
        return self.attend(attn, hidden_states, encoder_hidden_states, rotary, mask=attention_mask)


class HiDreamAttnProcessor(StreamAttnProcessor):
    """HiDream: image first, one rotation for all tokens, norms over all heads; padding of the image has its keys
    multiplied by 0, not masked."""

    replaces = ("HiDreamAttnProcessor",)
    hands_over = OWN | {f"text_{role}": f"{name}_t" for role, name in OWN.items()}
    fixes_key_heads = True

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        hidden_states_masks: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        image_rotary_emb: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        image = self.stream(attn, hidden_states)
        text = None if attn.single else self.stream(attn, encoder_hidden_states, "_t", TEXT)
        streams = [image] if text is None else [image, text]
        lengths = [stream.q.shape[1] for stream in streams]
        tables = split(from_matrices(image_rotary_emb), lengths)
        streams = [Stream(s.q, s.k, s.v, s.norms, table) for s, table in zip(streams, tables, strict=True)]
        q, k, v = join_streams(self.core, *streams, all_heads=True)
        if hidden_states_masks is not None:
            # A factor a token: before the rotation or after it is the same.
            factor = hidden_states_masks[:, :, None, None].to(k.dtype)
            k = torch.cat((k[:, : lengths[0]] * factor, k[:, lengths[0] :]), dim=1)
        rotate = None
        if not self.core.rotates_first and image_rotary_emb is not None:
            rotary = from_matrices(image_rotary_emb)
            rotate = (rotary, rotary)
        out = self.core(q, k, v, rotate=rotate).flatten(2)
        if attn.single:
            return self.project_out(attn, out)
        image, text = out.split(lengths, dim=1)
        return self.project_out(attn, image), out_by(self.core, "text_out", attn.to_out_t, text)

    def stream(self, attn, hidden_states, suffix="", roles="qkv"):
        modules = {role: getattr(attn, f"to_{role[-1]}{suffix}") for role in roles}
        projected = project_by(self.core, modules, [hidden_states] * 3, attn.inner_dim // attn.heads)
        return Stream(*projected, tuple(getattr(attn, f"{name}_rms_norm{suffix}") for name in "qk"))


class MochiAttnProcessor(StreamAttnProcessor):
    """Mochi: image first, only the image is rotated, in each head by angles of its own.

    Stock runs prompt by prompt over the tokens that the mask keeps; here the batch runs at once under the mask. Both
    return the kept tokens' outputs in front, and zeros.
    """

    replaces = ("MochiAttnProcessor2_0",)
    fixes_key_heads = True

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        streams = self.image_stream(attn, hidden_states), self.text_stream(attn, encoder_hidden_states)
        lengths = [stream.q.shape[1] for stream in streams]
        kept = attention_mask.bool()
        mask = torch.cat((kept.new_ones(kept.shape[0], lengths[0]), kept), dim=1)[:, None, None, :]
        q, k, v = join_streams(self.core, *streams)
        if image_rotary_emb is None:
            out = self.core(q, k, v, mask=mask)
        else:
            rotary = self.with_text(image_rotary_emb, lengths[1])
            out = attend_by_head(self.core, q, k, v, (rotary, None), mask=mask)
        image, text = out.flatten(2).split(lengths, dim=1)

        order = kept.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
        text = text.masked_fill(~kept[..., None], 0).gather(1, order[..., None].expand_as(text))
        return self.project_out(attn, image), self.project_text_out(attn, text)

    def with_text(self, tables, text_length):
        """(N, H, D/2) to (1, N + text, H, D/2): the text is not rotated."""
        cos, sin = (t.unsqueeze(0) for t in tables)
        rest = (1, text_length, *cos.shape[2:])
        return HeadRotary(torch.cat((cos, cos.new_ones(rest)), 1), torch.cat((sin, sin.new_zeros(rest)), 1))
