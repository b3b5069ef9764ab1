"""What the processors of transformers share: streams of tokens, each with projections, norms and a rotation."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffattn.cores import AttentionCore, Rotary
from diffattn.processors.base import (
    CoreAttnProcessor,
    along,
    norm_and_rotate,
    normalize,
    refuse_other_than_tensor,
)
from diffattn.processors.projections import JOINT, out_by, project_added, project_heads
from diffattn.processors.rotary import HeadRotary, attend_by_head, join


class StreamAttnProcessor(CoreAttnProcessor):
    """A processor of a transformer's own attention class: as many key/value heads as heads, unless it says more.

    One whose `forward` calls modules of those names by itself sets `hands_over` to what it does hand over.
    """

    hands_over = JOINT

    def project_heads(self, attn, hidden_states: Tensor, context: Tensor | None = None):
        """q, k, v, each (B, N, H, D), by the layer's projections or the core's own; `context` is for keys, values."""
        return project_heads(attn, hidden_states, context, self.core)

    def image_stream(self, attn, hidden_states: Tensor, rotary=None) -> "Stream":
        """The tokens that `to_q`, `to_k`, `to_v` (or `to_qkv`) project, and the layer's norms."""
        return Stream(*self.project_heads(attn, hidden_states), norms_of(attn), rotary)

    def text_stream(self, attn, hidden_states: Tensor, rotary=None) -> "Stream":
        """The tokens that `add_q_proj`, `add_k_proj`, `add_v_proj` (or `to_added_qkv`) project, and their norms."""
        projected = project_added(attn, hidden_states, self.core)
        return Stream(*projected, (attn.norm_added_q, attn.norm_added_k), rotary)

    def project_out(self, attn, hidden_states: Tensor) -> Tensor:
        """The output projection of merged heads (B, N, H D), and the dropout behind it, of layers that have one."""
        return self._project_out("out", getattr(attn, "to_out", None), hidden_states)

    def project_text_out(self, attn, hidden_states: Tensor) -> Tensor:
        """`project_out` of text, by `to_add_out`."""
        return self._project_out("text_out", getattr(attn, "to_add_out", None), hidden_states)

    def _project_out(self, role, module, hidden_states):
        return hidden_states if module is None else out_by(self.core, role, module, hidden_states)

    @classmethod
    def heads(cls, attn):
        heads = attn.num_heads if hasattr(attn, "num_heads") else attn.heads
        return heads, heads

    @classmethod
    def attends_to_itself(cls, name, attn):
        return True


class Stream(NamedTuple):
    """Queries, keys and values (B, N, H, D) of one kind of tokens, with what happens to q and k before attention."""

    q: Tensor
    k: Tensor
    v: Tensor
    norms: tuple[nn.Module | None, nn.Module | None] = (None, None)
    rotary: Rotary | None = None


def attend(core: AttentionCore, stream: Stream, mask: Tensor | None = None) -> Tensor:
    """Self-attention of one stream. `mask` as in `mask_for`. Returns (B, N, H, D)."""
    rotate = None if stream.rotary is None else (stream.rotary, stream.rotary)
    return attend_across(core, stream.q, stream.k, stream.v, stream.norms, rotate, mask=mask)


def attend_across(core: AttentionCore, q, k, v, norms=(None, None), rotate=None, *, mask=None, all_heads=False):
    """Norms, rotation and core, where q and k have rotations of their own (or none: cross-attention)."""
    mask = mask_for(mask, q)
    if rotate is not None and isinstance(rotate[0], HeadRotary):
        q, k = normalize(q, k, norms, all_heads=all_heads)
        return attend_by_head(core, q, k, v, rotate, mask=mask)
    if rotate == (None, None):
        rotate = None
    q, k, rotate = norm_and_rotate(core, q, k, norms, rotate, all_heads=all_heads)
    # Some norms return float32; stock casts back too.
    return core(q.to(v.dtype), k.to(v.dtype), v, mask=mask, rotate=rotate)


def attend_jointly(core: AttentionCore, *streams: Stream, mask: Tensor | None = None) -> list[Tensor]:
    """Attention over the tokens of all streams together, in the order given; the output of each, (B, N, H D)."""
    lengths = [stream.q.shape[1] for stream in streams]
    q, k, v = join_streams(core, *streams)
    out = core(q, k, v, mask=mask_for(mask, q), **left(core, *streams))
    return list(out.flatten(2).split(lengths, dim=1))


def join_streams(core: AttentionCore, *streams: Stream, all_heads: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of all streams, each normalized by its own norms and rotated, unless the core has to rotate."""
    parts = []
    for q, k, v, norms, rotary in streams:
        rotate = None if rotary is None else (rotary, rotary)
        q, k, _ = norm_and_rotate(core, q, k, norms, rotate, all_heads=all_heads)
        parts.append((q.to(v.dtype), k.to(v.dtype), v))
    if len(parts) == 1:
        return parts[0]
    return tuple(torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True))


def left(core: AttentionCore, *streams: Stream) -> dict:
    """The core's `rotate` for joined streams: nothing is left where `join_streams` has rotated."""
    if core.rotates_first:
        return {}
    rotary = join([stream.rotary for stream in streams], [stream.q.shape[1] for stream in streams])
    return {} if rotary is None else {"rotate": along((rotary, rotary), streams[0].q)}


def norms_of(attn: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    return attn.norm_q, attn.norm_k


def mask_for(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """The masks that diffusers' attention backends take, as the cores do: one of shape (B, M) hides keys."""
    if mask is None:
        return None
    refuse_other_than_tensor(mask)
    if mask.dim() > 2:
        return mask
    return mask[:, None, None, :] if mask.shape[0] == q.shape[0] else mask[None, None]


def causal_mask(q: Tensor) -> Tensor:
    """(1, 1, N, N): True where the key is no later than the query."""
    return torch.ones(1, 1, q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).tril()


def refuse(processor: nn.Module, why: str, **arguments) -> None:
    """Raises: ValueError if an argument is not None that the stock processor takes and drops, or that has no
    counterpart here."""
    for name, value in arguments.items():
        if value is not None:
            came = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name}: got {came}, expected None: {type(processor).__name__} {why}")
