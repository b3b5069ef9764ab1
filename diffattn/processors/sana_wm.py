"""SANA-WM's gated delta rule over frames. Its attention modules hold no processor: these stand in their place."""

import torch
from torch import Tensor

from diffattn.cores import AttentionCore, FrameDeltaRule, Rotary
from diffattn.kernels import ray_encoding
from diffattn.processors.base import CoreAttnProcessor
from diffattn.processors.rotary import from_complex


class SanaWMDeltaRuleProcessor(CoreAttnProcessor):
    """SANA-WM's self-attention: ReLU features, RoPE on the numerator, a delta rule in both directions of time.

    Stock rounds scaled and rotated keys to the model's dtype before its float32 scan; here at most one operand of
    their products is. Its `chunk_size` cuts a loop and changes no number; `recall_gate` it ignores too.

    Cores other than `FrameDeltaRule` get the queries, keys and values without the gates.
    """

    replaces = ("SanaWMBidirectionalGDNAttention",)
    is_module = True

    def __init__(self, core: AttentionCore | None = None):
        super().__init__(FrameDeltaRule() if core is None else core)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        beta: Tensor,
        decay: Tensor,
        recall_gate: Tensor,
        num_frames: int,
        rotary_emb: Tensor | None = None,
        token_valid_mask: Tensor | None = None,
        beta_valid_mask: Tensor | None = None,
        decay_valid_mask: Tensor | None = None,
    ) -> Tensor:
        query, key, value = (_masked(x, token_valid_mask) for x in (query, key, value))
        rotary = _tables(rotary_emb)
        gates = _gates(beta, decay, num_frames, query, beta_valid_mask, decay_valid_mask)
        rotate = None if rotary is None else (rotary, rotary)
        out = _attend(self.core, query, key, value, gates, token_valid_mask, rotate=rotate)
        return _masked(out, token_valid_mask).flatten(2)

    @classmethod
    def exact_core(cls, attn):
        return FrameDeltaRule(eps=attn.eps)

    @classmethod
    def heads(cls, attn):
        return attn.heads, attn.heads

    @classmethod
    def attends_to_itself(cls, name, attn):
        return True


class SanaWMCameraDeltaRuleProcessor(SanaWMDeltaRuleProcessor):
    """SANA-WM's camera attention: the same rule without its denominator, on features turned into each token's ray.

    Turning is done in float32 (float64 stays) and rounded once, where stock rounds each step to the model's dtype; an
    inference in eager mode on a GPU does it in one pass.
    """

    replaces = ("SanaWMBidirectionalGDNCamAttention",)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        ray_transforms: tuple,
        beta: Tensor,
        decay: Tensor,
        num_frames: int,
        token_valid_mask: Tensor | None = None,
        beta_valid_mask: Tensor | None = None,
        decay_valid_mask: Tensor | None = None,
    ) -> Tensor:
        out_of_ray, of_query, into_ray, rotary_emb = ray_transforms
        rotary = _tables(rotary_emb)
        tables = None if rotary is None else (rotary.cos, rotary.sin)
        back = None if rotary is None else (rotary.cos, -rotary.sin)
        tokens = query.shape[1] // num_frames
        scale = (key.shape[-1] * tokens) ** -0.5
        q, _ = ray_encoding(query, of_query, tables, limit=True)
        k, growth = ray_encoding(key, into_ray, tables, scale=scale, limit=True)
        v, _ = ray_encoding(value, into_ray, tables, limit=True)
        q, k, v = (_masked(x, token_valid_mask) for x in (q, k, v))
        beta, kept = _gates(beta, decay, num_frames, query, beta_valid_mask, decay_valid_mask)
        # what turning adds to the keys of a frame, for all the limit, is taken from its correction
        growth = growth.unflatten(1, (num_frames, tokens)).mean(2, keepdim=True).clamp_min(1.0)  # [B, T, 1, H]
        beta = (beta.unflatten(1, (num_frames, tokens)) / growth).flatten(1, 2)
        out = _masked(_attend(self.core, q, k, v, (beta, kept), token_valid_mask, scale=1.0), token_valid_mask)
        out, _ = ray_encoding(out, out_of_ray, back)
        return _masked(out, token_valid_mask).flatten(2)

    @classmethod
    def exact_core(cls, attn):
        return FrameDeltaRule(normalize=False)


def _attend(core, q, k, v, gates, valid, **options):
    """The core's output in the dtype of v: under autocast q and k are float32, as their norms left them."""
    given, dtype = v.dtype, torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if isinstance(core, FrameDeltaRule):
        return core(q, k, v, beta=gates[0], kept=gates[1], **options).to(given)
    # the factor of k is the delta rule's
    options.pop("scale", None)
    return core(q, k, v, mask=None if valid is None else valid.bool()[:, None, None], **options).to(given)


def _gates(beta, decay, num_frames, query, beta_mask, decay_mask) -> tuple[Tensor, Tensor]:
    """beta (B, H, T, S) or (B, H, T) as (B, N, H), decay (B, H, T) as (B, T, H); masked frames correct and lose
    nothing."""
    if beta.dim() == 3:
        beta = beta.unsqueeze(-1).expand(-1, -1, -1, query.shape[1] // num_frames)
    if beta_mask is not None:
        beta = beta * beta_mask.to(beta.dtype)
    if decay_mask is not None:
        decay_mask = decay_mask.to(decay.dtype)
        decay = decay * decay_mask + (1.0 - decay_mask)
    return beta.permute(0, 2, 3, 1).flatten(1, 2), decay.transpose(1, 2)


def _masked(x: Tensor, valid: Tensor | None) -> Tensor:
    """x (B, N, H, D), 0 where the mask (B, N) is."""
    return x if valid is None else x * valid.to(x.dtype)[:, :, None, None]


def _tables(freqs: Tensor | None) -> Rotary | None:
    """Complex tables (1 or B, 1, N, R/2), or without leading ones."""
    if freqs is not None and freqs.dim() == 4:
        if freqs.shape[1] != 1:
            raise ValueError(f"rotary_emb: got shape {tuple(freqs.shape)}, expected one table for all heads")
        freqs = freqs.squeeze(1)
    return from_complex(freqs)
