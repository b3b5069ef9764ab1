"""One stream of tokens with rotary embedding: Z-Image, Krea 2, Ernie-Image, Flux 3, Ideogram 4, OmniGen, ..."""

import torch
from torch import Tensor, nn

from diffattn.cores import AttentionCore
from diffattn.processors.base import normalize
from diffattn.processors.projections import QKV, project_by
from diffattn.processors.rotary import from_complex, from_halves, from_pairs
from diffattn.processors.streams import (
    Stream,
    StreamAttnProcessor,
    attend,
    attend_across,
    mask_for,
    norms_of,
    refuse,
)


class ZImageAttnProcessor(StreamAttnProcessor):
    """Z-Image: image and text tokens in one stream; its refiners see one of the two."""

    replaces = ("ZSingleStreamAttnProcessor",)

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        refuse(self, "attends within one stream", encoder_hidden_states=encoder_hidden_states)
        stream = self.image_stream(attn, hidden_states, from_complex(freqs_cis))
        return self.project_out(attn, attend(self.core, stream, mask=attention_mask).flatten(2))

    @classmethod
    def attends_to_itself(cls, name, attn):
        return "context_refiner" not in name and "siglip_refiner" not in name  # what they refine is no picture


class BriaFibo2AttnProcessor(StreamAttnProcessor):
    """Bria Fibo 2: self-attention over image tokens and the gist of the text, cross-attention to the text."""

    replaces = ("BriaFibo2AttnProcessor",)

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        rotary = from_complex(freqs_cis)
        q, k, v = self.project_heads(attn, hidden_states, encoder_hidden_states)
        out = attend_across(self.core, q, k, v, norms_of(attn), (rotary, rotary), mask=attention_mask)
        return self.project_out(attn, out.flatten(2))

    @classmethod
    def attends_to_itself(cls, name, attn):
        return not any(part in name for part in ("perceiver", "cross", "text"))


class ErnieImageAttnProcessor(StreamAttnProcessor):
    """Ernie-Image: image and text tokens in one stream.

    Its table gives the two features of a pair an angle each, so what it does to them is no rotation: it comes before
    any core, which then has nothing to rotate.
    """

    replaces = ("ErnieImageSingleStreamAttnProcessor",)

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        q, k, v, norms, _ = self.image_stream(attn, hidden_states)
        q, k = normalize(q, k, norms)
        if freqs_cis is not None:
            cos, sin = freqs_cis.cos().to(q.dtype), freqs_cis.sin().to(q.dtype)  # [B, N, 1, R]
            q, k = mix(q, cos, sin), mix(k, cos, sin)
        return self.project_out(attn, self.core(q, k, v, mask=mask_for(attention_mask, q)).flatten(2))


def mix(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + rotate_half(x) sin on the first R features, in the dtype of x."""
    width = cos.shape[-1]
    a, b = x[..., :width].chunk(2, dim=-1)
    mixed = x[..., :width] * cos + torch.cat((-b, a), dim=-1) * sin
    return torch.cat((mixed, x[..., width:]), dim=-1)


class Flux3AttnProcessor(StreamAttnProcessor):
    """Flux 3: text and image tokens apart, then in one stream; norms and rotation in float32."""

    replaces = ("Flux3AttnProcessor",)

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        q, k, v, norms, rotary = self.image_stream(attn, hidden_states, from_pairs(image_rotary_emb))
        stream = Stream(q.float(), k.float(), v, norms, rotary)
        return self.project_out(attn, attend(self.core, stream, mask=attention_mask).flatten(2))

    @classmethod
    def attends_to_itself(cls, name, attn):
        return "context" not in name and "txt" not in name and "text" not in name


class Ideogram4AttnProcessor(StreamAttnProcessor):
    """Ideogram 4: several pictures and prompts packed in one stream, each attending within itself."""

    replaces = ("Ideogram4AttnProcessor",)
    kept = "masks pairs of tokens"

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        stream = Stream(*unfused(self.core, attn, hidden_states), norms_of(attn), from_halves(image_rotary_emb))
        out = attend(self.core, stream, mask=attention_mask).flatten(2)
        return self.project_out(attn, out)

    @classmethod
    def attends_to_itself(cls, name, attn):
        return False


def unfused(core: AttentionCore, attn: nn.Module, hidden_states: Tensor):
    """q, k and v of layers whose stock processor leaves fused projections alone."""
    modules = {role: getattr(attn, name) for role, name in QKV.items()}
    return project_by(core, modules, [hidden_states] * 3, attn.head_dim)


class Krea2AttnProcessor(StreamAttnProcessor):
    """Krea 2: grouped-query attention over text and image tokens in one stream, with a gate on its output."""

    replaces = ("Krea2AttnProcessor",)

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        stream = Stream(*unfused(self.core, attn, hidden_states), norms_of(attn), from_pairs(image_rotary_emb))
        gate = attn.to_gate(hidden_states)
        out = attend(self.core, stream, mask=attention_mask).flatten(2)
        return self.project_out(attn, out * gate.sigmoid())

    @classmethod
    def heads(cls, attn):
        return attn.num_heads, attn.num_kv_heads

    @classmethod
    def attends_to_itself(cls, name, attn):
        return "text_fusion" not in name


class OmniGenAttnProcessor(StreamAttnProcessor):
    """OmniGen: text, time and image tokens in one stream, under a mask that is causal for the text."""

    replaces = ("OmniGenAttnProcessor2_0",)
    kept = "masks pairs of tokens"

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        rotary = from_halves(image_rotary_emb)
        q, k, v = self.project_heads(attn, hidden_states, encoder_hidden_states)
        out = attend_across(self.core, q, k, v, rotate=(rotary, rotary), mask=attention_mask)
        return self.project_out(attn, out.flatten(2))

    @classmethod
    def heads(cls, attn):
        return attn.heads, attn.inner_kv_dim // (attn.inner_dim // attn.heads)

    @classmethod
    def attends_to_itself(cls, name, attn):
        return False


class MiniMaxH3AttnProcessor(StreamAttnProcessor):
    """MiniMax-H3: video, sound and text tokens in one stream, part of the features rotated."""

    replaces = ("MiniMaxH3AttnProcessor",)

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        stream = self.image_stream(attn, hidden_states, from_halves(rotary_emb))
        return self.project_out(attn, attend(self.core, stream, mask=attention_mask).flatten(2))

    @classmethod
    def attends_to_itself(cls, name, attn):
        return "token_refiner" not in name


class QwenImage21AttnProcessor(StreamAttnProcessor):
    """QwenImage 2.1: blocks of text and images in one stream, each attending to itself and to those before it.

    Text attends causally within its block. The keys and values in front of the last image can be cached.
    """

    replaces = ("QwenImage21AttnProcessor",)
    kept = "attends to the blocks before"

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_emb: Tensor | None = None,
        layer_cache=None,
        kv_cache_mode: str | None = None,
        cache_write_slice: slice | None = None,
        segments: list[tuple[int, int, bool]] | None = None,
        key_valid: Tensor | None = None,
    ) -> Tensor:
        if not self.core.rotates_first:
            raise ValueError(f"core: {self.core} cannot attend to the blocks before; expected a softmax core")
        rotary = from_complex(rotary_emb)
        q, k, v = self.project_heads(attn, hidden_states)
        q, k = normalize(q, k, norms_of(attn), None if rotary is None else (rotary, rotary))
        q, k = q.to(v.dtype), k.to(v.dtype)
        if layer_cache is not None:
            if kv_cache_mode == "extract" and cache_write_slice is not None:
                layer_cache.store(k[:, cache_write_slice].clone(), v[:, cache_write_slice].clone())
            elif kv_cache_mode == "cached":
                k, v = (torch.cat(pair, dim=1) for pair in zip(layer_cache.get(), (k, v), strict=True))
        if segments is None:
            out = self.core(q, k, v, mask=mask_for(attention_mask, q))
        else:
            out = self.by_segments(q, k, v, segments, key_valid)
        return self.project_out(attn, out.flatten(2))

    def by_segments(self, q, k, v, segments, key_valid):
        prefix = segments[-1][1] if segments else 0
        parts = []
        for start, end, causal in [*segments, (prefix, q.shape[1], False)]:
            mask = None if key_valid is None else key_valid[:, None, None, :end]
            if causal:
                seen = torch.ones(end - start, end, dtype=torch.bool, device=q.device).tril(start)
                mask = seen[None, None] if mask is None else mask & seen
            parts.append(self.core(q[:, start:end], k[:, :end], v[:, :end], mask=mask))
        return torch.cat(parts, dim=1)

    @classmethod
    def attends_to_itself(cls, name, attn):
        return False
