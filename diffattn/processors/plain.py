"""Self- and cross-attention without rotary embedding: UNets, VAEs, ControlNets, PixArt, DreamLite, ..."""

import torch
from torch import Tensor

from diffattn.processors.base import (
    CoreAttnProcessor,
    broadcast_mask,
    norm_and_rotate,
    output,
    project_heads,
    rescaled,
)
from diffattn.processors.projections import OWN


class PlainAttnProcessor(CoreAttnProcessor):
    """diffusers' generic attention: the classic block around any core.

    Serves (B, N, C) and (B, C, H, W) inputs, group norm, spatial norm with `temb`, cross-attention norm,
    query/key norms, fused projections, grouped key/value heads, masks, residual and output rescaling.
    """

    replaces = ("AttnProcessor", "AttnProcessor2_0", "FusedAttnProcessor2_0", "DreamLiteAttnProcessor2_0")
    hands_over = OWN

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        return self.attend(attn, hidden_states, encoder_hidden_states, attention_mask, temb)

    @classmethod
    def attends_to_itself(cls, name, attn):
        return not attn.is_cross_attention and "token_refiner" not in name  # which refines text

    @classmethod
    def plain_scores(cls, attn):
        # Subclasses rotate.
        return cls is PlainAttnProcessor and attn.norm_q is None and attn.norm_k is None

    def attend(self, attn, hidden_states, context, mask, temb=None, rotary=None, norm_all_heads=False):
        """The block itself. `rotary` rotates the queries and, in self-attention, the keys."""
        if isinstance(context, tuple):
            raise TypeError(
                f"encoder_hidden_states: {type(self).__name__} got a tuple: text and the image prompts of an "
                "IP-Adapter, which its own processors of cross-attention attend to. Set processors with "
                "diffattn.patch(...), which leaves those alone, or call unload_ip_adapter()"
            )
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        shape = hidden_states.shape
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        length = hidden_states.shape[1] if context is None else context.shape[1]
        mask = broadcast_mask(attn, mask, shape[0], length)

        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        if context is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        core = self.core_for(context)
        q, k, v = project_heads(attn, hidden_states, context, core)
        rotate = None if rotary is None else (rotary, None if attn.is_cross_attention else rotary)
        q, k, rotate = norm_and_rotate(core, q, k, (attn.norm_q, attn.norm_k), rotate, all_heads=norm_all_heads)
        hidden_states = core(q, k, v, mask=mask, scale=layer_scale(attn), rotate=rotate)
        hidden_states = output(attn, hidden_states, core)

        if len(shape) == 4:
            hidden_states = hidden_states.transpose(-1, -2).reshape(shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return rescaled(attn, hidden_states)

    def core_for(self, context):
        """The core of this call; `context` is None in self-attention."""
        return self.core


class AddedKVAttnProcessor(CoreAttnProcessor):
    """Attention over text and image keys together: `add_k_proj`, `add_v_proj` project the text.

    Kandinsky's and DeepFloyd's UNets. The text's keys come first; with `only_cross_attention` they are
    all there is.
    """

    replaces = ("AttnAddedKVProcessor", "AttnAddedKVProcessor2_0")

    def forward(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        residual = hidden_states
        hidden_states = hidden_states.flatten(2).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        q = attn.to_q(hidden_states)
        k, v = attn.add_k_proj(context), attn.add_v_proj(context)
        if not attn.only_cross_attention:
            k = torch.cat((k, attn.to_k(hidden_states)), dim=1)
            v = torch.cat((v, attn.to_v(hidden_states)), dim=1)
        q, k, v = (t.unflatten(-1, (attn.heads, -1)) for t in (q, k, v))
        # diffusers masks the text and pads the mask with zeros for the image.
        mask = attn.prepare_attention_mask(attention_mask, q.shape[1], q.shape[0], out_dim=4)
        hidden_states = output(attn, self.core(q, k, v, mask=mask, scale=layer_scale(attn)))
        return hidden_states.transpose(-1, -2).reshape(residual.shape) + residual

    @classmethod
    def attends_to_itself(cls, name, attn):
        return False  # text keys are always among its keys


def layer_scale(attn) -> float | None:
    """The layer's softmax scale, or None where it is D^-0.5 as every core takes it to be."""
    return None if attn.scale_qk else attn.scale
