"""Text and image tokens attend together, each with its own projections: Flux, SD3, QwenImage, HunyuanVideo, ..."""

import torch
from torch import Tensor

from diffattn.processors.projections import NOTHING, split_heads
from diffattn.processors.rotary import from_complex, from_pairs, join, split
from diffattn.processors.streams import (
    Stream,
    StreamAttnProcessor,
    attend,
    attend_across,
    attend_jointly,
    norms_of,
    refuse,
)


class FluxAttnProcessor(StreamAttnProcessor):
    """Text first, one rotation for all tokens; the single-stream blocks get both joined and project out themselves."""

    replaces = (
        "FluxAttnProcessor",
        "BriaAttnProcessor",
        "BriaFiboAttnProcessor",
        "LongCatImageAttnProcessor",
        "OvisImageAttnProcessor",
    )

    joins_all_tokens = True

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        rotary = from_pairs(image_rotary_emb)
        if encoder_hidden_states is None:
            image = self.image_stream(attn, hidden_states, rotary)
            return self.alone(attn, attend(self.core, image, mask=attention_mask).flatten(2))
        lengths = [encoder_hidden_states.shape[1], hidden_states.shape[1]]
        of_text, of_image = split(rotary, lengths)
        text = self.text_stream(attn, encoder_hidden_states, of_text)
        image = self.image_stream(attn, hidden_states, of_image)
        text, image = attend_jointly(self.core, text, image, mask=attention_mask)
        return self.project_out(attn, image), self.project_text_out(attn, text)

    def alone(self, attn, hidden_states):
        """What a single-stream block gets."""
        return hidden_states


class Flux2AttnProcessor(FluxAttnProcessor):
    """Flux 2's double-stream blocks."""

    replaces = ("Flux2AttnProcessor",)

    def alone(self, attn, hidden_states):
        return self.project_out(attn, hidden_states)


class Flux2ParallelAttnProcessor(StreamAttnProcessor):
    """Flux 2's single-stream blocks: one projection makes q, k, v and the MLP's input, one takes both outputs."""

    replaces = ("Flux2ParallelSelfAttnProcessor",)
    hands_over = NOTHING

    joins_all_tokens = True

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        hidden_states = attn.to_qkv_mlp_proj(hidden_states)
        qkv, mlp = 3 * attn.inner_dim, attn.mlp_hidden_dim * attn.mlp_mult_factor
        qkv = hidden_states.shape[-1] * qkv // (qkv + mlp)  # this rank's part, under tensor parallelism
        qkv, mlp = hidden_states.tensor_split((qkv,), dim=-1)
        heads = split_heads(self.core, dict(zip("qkv", qkv.chunk(3, dim=-1), strict=True)), attn.head_dim)
        stream = Stream(*heads, norms_of(attn), from_pairs(image_rotary_emb))
        out = attend(self.core, stream, mask=attention_mask).flatten(2)
        return attn.to_out(torch.cat((out, attn.mlp_act_fn(mlp)), dim=-1))


class JointAttnProcessor(StreamAttnProcessor):
    """SD3: image first, no rotation; the last block has no use for its text, which it returns unprojected."""

    replaces = ("JointAttnProcessor2_0", "FusedJointAttnProcessor2_0")

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        refuse(self, "attends to all tokens, as stock does whatever the mask", attention_mask=attention_mask)
        image = self.image_stream(attn, hidden_states)
        if encoder_hidden_states is None:
            return self.project_out(attn, attend(self.core, image).flatten(2))
        image, text = attend_jointly(self.core, image, self.text_stream(attn, encoder_hidden_states))
        return self.project_out(attn, image), self.project_text_out(attn, text)


class AuraFlowAttnProcessor(StreamAttnProcessor):
    """AuraFlow: text first, no rotation; the single-stream blocks get both joined."""

    replaces = ("AuraFlowAttnProcessor2_0", "FusedAuraFlowAttnProcessor2_0")

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        refuse(self, "attends to all tokens, as stock does whatever the mask", attention_mask=attention_mask)
        image = self.image_stream(attn, hidden_states)
        if encoder_hidden_states is None:
            return self.project_out(attn, attend(self.core, image).flatten(2))
        text, image = attend_jointly(self.core, self.text_stream(attn, encoder_hidden_states), image)
        return self.project_out(attn, image), self.project_text_out(attn, text)


class QwenImageAttnProcessor(StreamAttnProcessor):
    """QwenImage: text first, a rotation for each, a mask over the text."""

    replaces = ("QwenDoubleStreamAttnProcessor2_0",)

    joins_all_tokens = True

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if encoder_hidden_states is None:
            raise ValueError(f"encoder_hidden_states: got None, expected text: {type(self).__name__} joins the two")
        refuse(self, "makes the mask from encoder_hidden_states_mask", attention_mask=attention_mask)
        of_image, of_text = (None, None) if image_rotary_emb is None else map(from_complex, image_rotary_emb)
        mask = None
        if encoder_hidden_states_mask is not None:
            of_images = encoder_hidden_states_mask.new_ones(hidden_states.shape[:2], dtype=torch.bool)
            mask = torch.cat((encoder_hidden_states_mask.bool(), of_images), dim=1)
        text = self.text_stream(attn, encoder_hidden_states, of_text)
        image = self.image_stream(attn, hidden_states, of_image)
        text, image = attend_jointly(self.core, text, image, mask=mask)
        return self.project_out(attn, image), self.project_text_out(attn, text)


class HunyuanVideoAttnProcessor(StreamAttnProcessor):
    """HunyuanVideo and its kin: image first, only the image is rotated.

    Blocks without projections for the text project both by the same.
    """

    replaces = ("HunyuanVideoAttnProcessor2_0", "HunyuanImageAttnProcessor")

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        image, text = self.attend(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        if text is None:
            return image, None
        return self.project_out(attn, image), self.project_text_out(attn, text)

    def attend(self, attn, hidden_states, text, mask, rotary):
        rotary = from_pairs(rotary)
        if text is None:
            return attend(self.core, self.image_stream(attn, hidden_states, rotary), mask=mask).flatten(2), None
        if attn.add_q_proj is None:
            lengths = [hidden_states.shape[1], text.shape[1]]
            both = self.image_stream(attn, torch.cat((hidden_states, text), dim=1), join([rotary, None], lengths))
            return attend(self.core, both, mask=mask).flatten(2).split(lengths, dim=1)
        image, text = self.image_stream(attn, hidden_states, rotary), self.text_stream(attn, text)
        return attend_jointly(self.core, image, text, mask=mask)


class MotifVideoAttnProcessor(HunyuanVideoAttnProcessor):
    """Motif-Video: without text, its blocks get the image alone, projected."""

    replaces = ("MotifVideoAttnProcessor2_0",)

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        image, text = self.attend(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        image = self.project_out(attn, image)
        return image if text is None else (image, self.project_text_out(attn, text))


class MotifVideoCrossAttnProcessor(StreamAttnProcessor):
    """Motif-Video's attention to the text, of whose tokens the first are an image's and left out."""

    replaces = ("MotifVideoCrossAttnProcessor2_0",)

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        image_embed_seq_len: int = 0,
    ) -> Tensor:
        text = encoder_hidden_states[:, image_embed_seq_len:]
        if attention_mask is not None:
            attention_mask = attention_mask[..., -text.shape[1] :]  # over the image, if any, and the text
        rotate = (from_pairs(image_rotary_emb), None)
        q, k, v = self.project_heads(attn, hidden_states, text)
        out = attend_across(self.core, q, k, v, norms_of(attn), rotate, mask=attention_mask)
        return self.project_out(attn, out.flatten(2))

    @classmethod
    def attends_to_itself(cls, name, attn):
        return False


class HunyuanVideo15AttnProcessor(HunyuanVideoAttnProcessor):
    """HunyuanVideo 1.5: the mask is over the text, whose padding no token attends to.

    Stock hides the padding as queries too, whose outputs nothing reads; here they attend like the others.
    """

    replaces = ("HunyuanVideo15AttnProcessor2_0",)

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        if attention_mask is not None:
            of_image = attention_mask.new_ones(hidden_states.shape[:2], dtype=torch.bool)
            attention_mask = torch.cat((of_image, attention_mask.bool()), dim=1)
        return super().forward(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)


class EasyAnimateAttnProcessor(StreamAttnProcessor):
    """EasyAnimate: text first, only the image is rotated; some blocks project both by the same."""

    replaces = ("EasyAnimateAttnProcessor2_0",)

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        rotary = from_pairs(image_rotary_emb)
        if attn.add_q_proj is None:
            lengths = [encoder_hidden_states.shape[1], hidden_states.shape[1]]
            both = torch.cat((encoder_hidden_states, hidden_states), dim=1)
            both = self.image_stream(attn, both, join([None, rotary], lengths))
            text, image = attend(self.core, both, mask=attention_mask).flatten(2).split(lengths, dim=1)
        else:
            streams = self.text_stream(attn, encoder_hidden_states), self.image_stream(attn, hidden_states, rotary)
            text, image = attend_jointly(self.core, *streams, mask=attention_mask)
        return self.project_out(attn, image), self.project_text_out(attn, text)
