"""A layer's projections, a core's own in their place, and what adapters on the layer's still add."""

import time

import torch
from torch import Tensor, nn

from diffattn.cores import AttentionCore
from diffattn.cores.base import sample
from diffattn.kernels import exporting

#: Seconds between two looks at whether a layer's own projection changed. Each waits for the GPU, and SDXL has 280.
LOOK_EVERY = 2.0
#: Relative change of a weight above the rounding of bfloat16, which casting a model back and forth leaves.
CHANGED = 2**-8


def calls_fused(attn: nn.Module) -> bool:
    """Whether stock would call a layer's fused projections.

    Unfusing leaves those of diffusers' generic `Attention` behind, out of date after the next LoRA: there it is only
    the Fused* processors that call them.
    """
    if not getattr(attn, "fused_projections", False):
        return False
    if hasattr(attn, "unfuse_projections"):
        return True
    stock = getattr(attn, "_diffattn_stock", None) or attn.processor
    return type(stock).__name__.startswith("Fused")


def project_heads(attn: nn.Module, hidden_states: Tensor, context: Tensor | None, core: AttentionCore | None = None):
    """Project to q (B, N, H, D), k and v (B, M, Hkv, D), without the layer's query/key norms.

    Args:
        context: what keys and values come from; None is `hidden_states`.
        core: given by processors that let it call its own projections and input maps.
    """
    if core is not None and (core.projections is not None or core.input_maps is not None):
        return _project_for(core, attn, hidden_states, hidden_states if context is None else context)
    # Some classes fuse q, k, v of cross-attention too, which stock then leaves alone.
    if not calls_fused(attn) or (context is not None and not hasattr(attn, "to_kv")):
        source = hidden_states if context is None else context
        q, k, v = attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source)
    elif context is None:
        q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
    else:
        q = attn.to_q(hidden_states)
        k, v = attn.to_kv(context).chunk(2, dim=-1)
    head_dim = q.shape[-1] // attn.heads
    return tuple(t.unflatten(-1, (-1, head_dim)) for t in (q, k, v))


def output(attn: nn.Module, hidden_states: Tensor, core: AttentionCore | None = None) -> Tensor:
    """Merge (B, N, H, D), project out and apply the layer's dropout."""
    hidden_states = hidden_states.flatten(2)
    own = None if core is None or core.projections is None else core.projections
    if own is None or "out" not in own:
        return attn.to_out[1](attn.to_out[0](hidden_states))
    out, added = own["out"](hidden_states), _added(core, "out", attn.to_out[0], hidden_states)
    return attn.to_out[1](out if added is None else out + added.to(out.dtype))


def _project_for(core: AttentionCore, attn: nn.Module, hidden_states: Tensor, source: Tensor):
    own = {} if core.projections is None else core.projections
    maps = {} if core.input_maps is None else core.input_maps
    heads = []
    for role, module, x in (("q", attn.to_q, hidden_states), ("k", attn.to_k, source), ("v", attn.to_v, source)):
        if role in maps:
            x = maps[role](x)
        out = own[role](x) if role in own else module(x)
        head_dim = heads[0].shape[-1] if heads else out.shape[-1] // attn.heads
        out = out.unflatten(-1, (-1, head_dim))
        added = _added(core, role, module, x) if role in own else None
        if added is not None:
            added = added.unflatten(-1, (-1, head_dim))
            if added.shape[2] != out.shape[2]:  # pooled, as the weights they were trained for
                added = added.unflatten(2, (out.shape[2], -1)).mean(3)
            out = out + added.to(out.dtype)
        heads.append(out)
    return tuple(heads)


def _added(core: AttentionCore, role: str, module: nn.Module, x: Tensor) -> Tensor | None:
    """What the layer's projection adds to the core's own in its place: its adapters."""
    if hasattr(module, "base_layer"):
        added = adapters(module, x)
        if added is not None and core.refuses_adapters:
            raise RuntimeError(_refusal("adapter", core.refuses_adapters))
        return added
    if not torch.compiler.is_compiling() and not exporting():
        _look(core.projections[role], module, role)
    return None


def _look(own: nn.Module, module: nn.Module, role: str) -> None:
    """Raise if the layer's weight is not the one that was taken over: that change would have no effect.

    A LoRA that was fused and unloaded leaves no other trace. Its weight has the same address and version.
    """
    now = time.monotonic()
    before = getattr(own, "instead_of", None)
    if before is None or now - getattr(own, "looked", -LOOK_EVERY) < LOOK_EVERY:
        return
    weight = getattr(module, "weight", None)  # none of a dropped one
    if weight is None or weight.is_meta or weight.element_size() < 2:  # float8 storage rounds more than a LoRA adds
        return
    if weight.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    own.looked = now
    after = sample(weight)
    if (after - before).norm() > CHANGED * before.norm():
        raise RuntimeError(
            f"projection {role!r}: the layer's weight has changed since the attention core took it over, by a LoRA "
            "that was fused and unloaded or by other weights loaded into the model; that has no effect on the core's "
            "own. Keep the LoRA loaded, fused or not, and it acts; or call diffattn.unpatch(...), load, and "
            "diffattn.patch(...) again"
        )


def adapters(module: nn.Module, x: Tensor) -> Tensor | None:
    """What LoRA layers of peft on a projection add to its output; None: there are none that are switched on.

    Merged ones (`fuse_lora`) count: they changed weights that are not called.

    Raises: RuntimeError for adapters that are no plain LoRA.
    """
    if not hasattr(module, "base_layer") or module.disable_adapters:
        return None
    if not hasattr(module, "lora_A"):
        raise RuntimeError(_refusal(type(module).__name__, ONLY_LORA))
    out = None
    for name in module.merged_adapters or module.active_adapters:
        if name not in module.lora_A:
            continue
        if name in module.lora_variant:
            raise RuntimeError(_refusal(type(module.lora_variant[name]).__name__, ONLY_LORA))
        down, up = module.lora_A[name], module.lora_B[name]
        added = up(down(module.lora_dropout[name](x.to(down.weight.dtype)))) * module.scaling[name]
        out = added if out is None else out + added
    return out


ONLY_LORA = "a projection of this layer was replaced by the attention core's own, on which only plain LoRA can act"


def _refusal(kind: str, why: str) -> str:
    return (
        f"{kind}: {why}. Call diffattn.unpatch(...), fuse the adapter (fuse_lora) and unload it, then "
        "diffattn.patch(...)"
    )


def weights_of(attn: nn.Module) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Weights of a layer's projections, as `LayerInfo.weights` holds them: those that are plain linear layers.

    Adapters are left out, merged ones too: `adapters` adds them in each call. Offloaded weights are read where
    accelerate keeps them.
    """
    if calls_fused(attn):
        return {}
    out = getattr(attn, "to_out", None)
    modules = {
        "q": getattr(attn, "to_q", None),
        "k": getattr(attn, "to_k", None),
        "v": getattr(attn, "to_v", None),
        "out": out[0] if isinstance(out, nn.ModuleList) else out,
    }
    found = {role: _weight_of(module) for role, module in modules.items()}
    return {role: weights for role, weights in found.items() if weights is not None}


def _weight_of(module: nn.Module | None) -> tuple[Tensor, Tensor | None] | None:
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    # Subclasses and tensors of other types are quantized layers and the like, which compute something else.
    if type(base) is not nn.Linear or type(base.weight.data) is not Tensor or not base.weight.is_floating_point():
        return None
    weight, bias = (_where_it_is(base, name) for name in ("weight", "bias"))
    if base is not module:
        for name in getattr(module, "merged_adapters", ()):
            if name in module.lora_A:
                weight = weight - module.get_delta_weight(name).to(weight.dtype)
    return weight, bias


def _where_it_is(module: nn.Module, name: str) -> Tensor | None:
    tensor = getattr(module, name)
    if tensor is None:
        return None
    kept = getattr(getattr(module, "_hf_hook", None), "weights_map", None)  # accelerate's, while it is offloaded
    if tensor.is_meta and kept is not None:
        tensor = kept[name]
    return tensor.detach()
