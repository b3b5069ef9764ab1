"""What every attention processor shares: its core, its call signature, projections and masks."""

import functools
import inspect
import re
import sys
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from diffattn.cores import AttentionCore, GroupedQueryAttention, LayerInfo, SoftmaxAttention, rotate_heads
from diffattn.kernels.qk_norm_rope import DTYPES, qk_norm_rope, runs_fused
from diffattn.processors.projections import calls_fused as calls_fused
from diffattn.processors.projections import head_dim_of, project_heads, weights_of
from diffattn.processors.projections import output as output
from diffattn.processors.replaced import refuse_changed_weights


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

    #: Whether it stands in for modules that attend by themselves and hold no weights, in the place of the module and
    #: with its arguments: then `attn` below is the module that calls it.
    is_module = False

    #: Why `attends_to_itself` is False where it is: what `patch` says of a layer that keeps its attention.
    kept = "attends to text"

    #: Role -> the layer's attribute, of the projections in whose place `forward` calls the core's own and before which
    #: it calls the core's input maps: `project_heads`, `project_by`, `output` and their kin do, given the core.
    hands_over: Mapping[str, str] = {}

    #: Whether what happens to k before the core needs all its heads: norms over all of them, a rotation for each.
    fixes_key_heads = False

    #: Whether each call of the core attends over the whole sequence, whose tokens context parallelism splits. Where
    #: a core may be called for other keys too, which every rank has, stock alone knows the difference.
    joins_all_tokens = False

    def __init__(self, core: AttentionCore | None = None):
        super().__init__()
        self._split = None
        self.refused = None  # what enable_parallelism() assigned, and stopped at
        self.core = SoftmaxAttention() if core is None else core
        self._without_settings = core is None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "forward" in cls.__dict__:

            @functools.wraps(cls.forward)
            def __call__(self, *args, **kwargs):
                if self._without_settings:
                    _refuse_lost_settings(self, args[0] if args else kwargs["attn"])
                if self.core.projections is not None:
                    refuse_changed_weights(self.core, args[0] if args else kwargs["attn"], self.hands_over)
                if self.refused is not None:
                    raise RuntimeError(f"enable_parallelism() set parts of this model only: {self._cannot_split()}")
                return nn.Module.__call__(self, *args, **kwargs)

            # diffusers looks at it in every call of every layer.
            __call__.__signature__ = inspect.signature(cls.forward)
            cls.__call__ = __call__

    @property
    def _parallel_config(self):
        """What enable_parallelism() assigns: the tokens are split over ranks, which attention has to know."""
        return self._split

    @_parallel_config.setter
    def _parallel_config(self, value):
        if value is None:
            self.refused = None
            if self._split is not None:
                self._split = self.core.dispatch = None
            return
        if not self.splits(self.core):
            # The ranks would attend to their own tokens only.
            self.refused = value
            raise NotImplementedError(self._cannot_split())
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        self._split = value
        self.core.dispatch = functools.partial(dispatch_attention_fn, parallel_config=value)

    def _cannot_split(self) -> str:
        return (
            f"{type(self).__name__} with {self.core} cannot run with context parallelism. Call "
            "diffattn.unpatch(model), which takes back what was set, then enable_parallelism()"
        )

    def named_modules(self, memo=None, prefix: str = "", remove_duplicate: bool = True):
        if not torch.compiler.is_compiling():
            _refuse_perturbed_attention(prefix.removesuffix(".processor"), sys._getframe(1))
        return super().named_modules(memo, prefix, remove_duplicate)

    @classmethod
    def splits(cls, core: AttentionCore) -> bool:
        """Whether attention over tokens that are split over ranks is right: softmax, by diffusers' own dispatch."""
        return cls.joins_all_tokens and isinstance(core, SoftmaxAttention)

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
    def layer_info(cls, attn: nn.Module) -> LayerInfo:
        """What a core is told of a layer."""
        heads, kv_heads = cls.heads(attn)
        weights = weights_of(attn, cls.hands_over)
        plain, fixed = cls.plain_scores(attn), cls.fixes_key_heads
        return LayerInfo(heads, kv_heads, head_dim_of(attn, heads), weights, plain, fixed)

    @classmethod
    def plain_scores(cls, attn: nn.Module) -> bool:
        """Whether q and k go from their projections to the core as they are: no norm, no rotation."""
        return False

    @classmethod
    def attends_to_itself(cls, name: str, attn: nn.Module) -> bool:
        """True for self-attention over image, video or audio tokens: what a converted core may replace."""
        return not attn.is_cross_attention


def _refuse_lost_settings(processor: CoreAttnProcessor, attn: nn.Module) -> None:
    """diffusers makes new processors of self-attention with `type(processor)()`, and the core is gone."""
    patched_with = getattr(attn, "_diffattn_core", None)
    if patched_with is not None and patched_with != repr(processor.core):
        raise RuntimeError(
            f"{type(processor).__name__}: this layer was patched with {patched_with}, and load_ip_adapter() or "
            "unload_ip_adapter() made a new processor without it. Call diffattn.unpatch(...) first, then load or "
            "unload the IP-Adapter, then diffattn.patch(...)"
        )


def _refuse_perturbed_attention(name: str, frame) -> None:
    """Say what to do before `PAGMixin` assigns a plain processor over this one: nn.Module's refusal does not.

    It looks for its layers in `model.named_modules()` before it assigns to any: there is no other word of it, and a
    model knows nothing of its pipeline. So who walks through the model is looked up, as debuggers do.
    """
    while frame is not None and frame.f_code.co_name == "named_modules":
        frame = frame.f_back
    if frame is None or frame.f_code.co_name != "_set_pag_attn_processor":
        return
    pipe, model, patterns = (frame.f_locals.get(local) for local in ("self", "model", "pag_applied_layers"))
    if model is None or not any(re.search(pattern, name) for pattern in patterns or ()):
        return
    if not getattr(model.get_submodule(name), "is_cross_attention", True):
        raise RuntimeError(
            f"{name}: {type(pipe).__name__} sets processors for perturbed attention guidance on layers "
            f"{patterns}, and this one is patched, which torch refuses. Call diffattn.unpatch(...) first, then "
            "diffattn.patch(pipe), the pipeline, or patch(..., layers=...) without these layers: they stay stock"
        )


def project(attn: nn.Module, hidden_states: Tensor, context: Tensor | None, *, norm_all_heads: bool = False):
    """Project to q (B, N, H, D), k and v (B, M, Hkv, D), with the layer's query/key norms.

    For layers without rotary embedding; with one, `project_heads` and `norm_and_rotate`.

    Args:
        context: what keys and values come from; None is `hidden_states`.
        norm_all_heads: the norms run over all heads at once, before the split into heads.
    """
    q, k, v = project_heads(attn, hidden_states, context)
    q, k = normalize(q, k, (attn.norm_q, attn.norm_k), all_heads=norm_all_heads)
    return q, k, v


def norm_and_rotate(core: AttentionCore, q: Tensor, k: Tensor, norms, rotate=None, *, all_heads: bool = False):
    """Apply a layer's query/key norms, and its rotary embedding if the core would begin with that.

    One kernel for all of it in eager mode on a GPU, without gradients; else what the stock processor does, step by
    step. A processor calls it between its projections and its core:

        q, k, v = project_heads(attn, hidden_states, context)
        q, k, rotate = norm_and_rotate(self.core, q, k, (attn.norm_q, attn.norm_k), rotate)
        out = self.core(q, k, v, rotate=rotate)

    Args:
        core: what attends. Only `core.rotates_first` matters, so streams that are joined later (text and image,
            each with its norms and its part of the tables) all rotate here or none does.
        q, k: (B, N, H, D) and (B, M, Hkv, D).
        norms: the modules that normalize q and k, or None.
        rotate: what the core takes as `rotate`.
        all_heads: the norms run over all heads of a token at once.
    Returns: q, k and what is left of `rotate` for the core: None, or all of it.
    """
    rotate = along(rotate, q)
    if not core.rotates_first:
        return *normalize(q, k, norms, all_heads=all_heads), rotate
    return *normalize(q, k, norms, rotate, all_heads=all_heads), None


def along(rotate, q: Tensor):
    """`rotate` on the device of q: pipelines and models that make tables on the CPU leave it to the layers, as Stable
    Audio's and CogView 4 do."""
    if rotate is None or all(r is None or r.cos.device == q.device for r in rotate):
        return rotate
    of_q, of_k = (r if r is None else r._replace(cos=r.cos.to(q.device), sin=r.sin.to(q.device)) for r in rotate)
    return of_q, of_q if rotate[1] is rotate[0] else of_k


def normalize(q: Tensor, k: Tensor, norms, rotate=None, *, all_heads: bool = False) -> tuple[Tensor, Tensor]:
    """The norms of q and k, then the rotation: `norm_and_rotate` whatever the core."""
    norm_q, norm_k = norms
    if norm_q is None and norm_k is None:
        return rotate_heads(q, k, rotate)
    # Once each: a module takes half a microsecond to find its parameter.
    w_q, w_k = getattr(norm_q, "weight", None), getattr(norm_k, "weight", None)
    if q.dtype == k.dtype and runs_fused(q, k, w_q, w_k):
        if _is_rms_norm(norm_q, w_q, q, all_heads) and _is_rms_norm(norm_k, w_k, k, all_heads):
            fused = None if norm_q is None else (w_q, norm_q.eps), None if norm_k is None else (w_k, norm_k.eps)
            return qk_norm_rope(q, k, norms=fused, rotate=rotate, across_heads=all_heads)
    of_q, of_k = rotate_heads(_call_norm(norm_q, q, all_heads), _call_norm(norm_k, k, all_heads), rotate)
    # Under autocast norms return float32, and the values have the dtype of the projections.
    return of_q.to(q.dtype), of_k.to(k.dtype)


# Each class with the attribute that holds its shape. By name, so that diffusers is not imported for it.
_RMS_NORMS = {
    "diffusers.models.normalization.RMSNorm": "dim",
    "torch.nn.modules.normalization.RMSNorm": "normalized_shape",
}


def _is_rms_norm(norm: nn.Module | None, weight: Tensor | None, x: Tensor, all_heads: bool) -> bool:
    """Whether a module is nothing but an RMS norm of x: then its weight and eps say what it computes.

    Subclasses, hooks and an offloader's `forward` may do more; such modules have to be called.
    """
    if norm is None:
        return True
    shape = _RMS_NORMS.get(f"{type(norm).__module__}.{type(norm).__qualname__}")
    features = x.shape[2] * x.shape[3] if all_heads else x.shape[3]
    return (
        shape is not None
        and getattr(norm, shape) == (features,)
        and norm.eps is not None
        and getattr(norm, "bias", None) is None
        and (weight is None or weight.dtype in DTYPES)
        and not (norm._forward_hooks or norm._forward_pre_hooks or "forward" in vars(norm))
    )


def _call_norm(norm: nn.Module | None, x: Tensor, all_heads: bool) -> Tensor:
    if norm is None:
        return x
    if all_heads:
        return norm(x.flatten(2)).unflatten(-1, x.shape[2:])
    return norm(x)


def refuse_other_than_tensor(mask) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask: got {type(mask).__name__}, expected a tensor or None")


def broadcast_mask(attn: nn.Module, mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """Bring a mask of diffusers, (B, 1 or N, M) or (B H, 1 or N, M), to (B, 1 or H, 1 or N, M).

    `Attention.prepare_attention_mask` copies it once per head; here heads broadcast.
    """
    if mask is None:
        return None
    refuse_other_than_tensor(mask)
    if mask.shape[-1] != length or mask.dim() != 3:
        mask = attn.prepare_attention_mask(mask, length, batch)
    if mask.shape[0] >= batch * attn.heads:
        return mask.view(batch, attn.heads, -1, mask.shape[-1])
    return mask.unsqueeze(1)


def rescaled(attn: nn.Module, hidden_states: Tensor) -> Tensor:
    """Over the layer's output factor. By 1, as nearly everywhere: the same bits without a kernel."""
    return hidden_states if attn.rescale_output_factor == 1 else hidden_states / attn.rescale_output_factor
