"""What every attention processor shares: its core, its call signature, projections and masks."""

import functools
import inspect

from torch import Tensor, nn

from diffattn.cores import AttentionCore, GroupedQueryAttention, SoftmaxAttention


class CoreAttnProcessor(nn.Module):
    """An attention processor of diffusers as an nn.Module: project to q, k, v, call the core, merge.

    A subclass writes `forward` with the names of the stock processor that it replaces and lists that
    processor's class in `replaces`. Nothing else is needed to patch a model with it.

    `__call__` is made from `forward`: diffusers drops every keyword argument that it does not find in
    `inspect.signature(processor.__call__)`, while hooks, compilers and OneDiff need `nn.Module.__call__`.

    Args:
        core: what turns q, k, v into the output; None is softmax attention.
    """

    #: Class names of the stock processors that this one stands in for.
    replaces: tuple[str, ...] = ()

    def __init__(self, core: AttentionCore | None = None):
        super().__init__()
        self.core = SoftmaxAttention() if core is None else core

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "forward" in cls.__dict__:

            @functools.wraps(cls.forward)
            def __call__(self, *args, **kwargs):
                return nn.Module.__call__(self, *args, **kwargs)

            # diffusers looks at it in every call of every layer.
            __call__.__signature__ = inspect.signature(cls.forward)
            cls.__call__ = __call__

    @property
    def _parallel_config(self):
        return None

    @_parallel_config.setter
    def _parallel_config(self, value):
        # enable_parallelism() assigns this; without it the ranks would attend to their own tokens only.
        if value is not None:
            raise NotImplementedError(
                f"{type(self).__name__} cannot run with context parallelism: call diffattn.unpatch(model) "
                "before enable_parallelism()"
            )

    @classmethod
    def exact_core(cls, attn: nn.Module) -> AttentionCore:
        """The core that computes what the stock processor computes on this layer."""
        heads, kv_heads = cls.heads(attn)
        return SoftmaxAttention() if heads == kv_heads else GroupedQueryAttention()

    @classmethod
    def heads(cls, attn: nn.Module) -> tuple[int, int]:
        """Query heads and key/value heads of a layer."""
        return attn.heads, attn.inner_kv_dim // (attn.inner_dim // attn.heads)

    @classmethod
    def attends_to_itself(cls, name: str, attn: nn.Module) -> bool:
        """True for self-attention over image, video or audio tokens: what a converted core may replace."""
        return not attn.is_cross_attention


def project(attn: nn.Module, hidden_states: Tensor, context: Tensor | None, *, norm_all_heads: bool = False):
    """Project to q (B, N, H, D), k and v (B, M, Hkv, D), with the layer's query/key norms.

    Args:
        context: what keys and values come from; None is `hidden_states`.
        norm_all_heads: the norms run over all heads at once, before the split into heads.
    """
    if not attn.fused_projections:
        source = hidden_states if context is None else context
        q, k, v = attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source)
    elif context is None:
        q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
    else:
        q = attn.to_q(hidden_states)
        k, v = attn.to_kv(context).chunk(2, dim=-1)

    head_dim = q.shape[-1] // attn.heads
    if norm_all_heads:
        q, k = _norm(attn, q, k)
    q, k, v = (t.unflatten(-1, (-1, head_dim)) for t in (q, k, v))
    if not norm_all_heads:
        q, k = _norm(attn, q, k)
    return q, k, v


def _norm(attn: nn.Module, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    if attn.norm_q is not None:
        q = attn.norm_q(q)
    if attn.norm_k is not None:
        k = attn.norm_k(k)
    return q, k


def output(attn: nn.Module, hidden_states: Tensor) -> Tensor:
    """Merge (B, N, H, D), project out and apply the layer's dropout."""
    return attn.to_out[1](attn.to_out[0](hidden_states.flatten(2)))


def broadcast_mask(attn: nn.Module, mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """Bring a mask of diffusers, (B, 1 or N, M) or (B H, 1 or N, M), to (B, 1 or H, 1 or N, M).

    `Attention.prepare_attention_mask` copies it once per head; here heads broadcast.
    """
    if mask is None:
        return None
    if mask.shape[-1] != length or mask.dim() != 3:
        mask = attn.prepare_attention_mask(mask, length, batch)
    if mask.shape[0] >= batch * attn.heads:
        return mask.view(batch, attn.heads, -1, mask.shape[-1])
    return mask.unsqueeze(1)
