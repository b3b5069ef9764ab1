"""A layer's projections, a core's own in their place, and what adapters on the layer's still add."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from diffattn.cores import AttentionCore

#: The names that diffusers' attention classes have for their projections, by role, and for those of text.
QKV = {"q": "to_q", "k": "to_k", "v": "to_v"}
OWN = QKV | {"out": "to_out"}
JOINT = OWN | {"text_q": "add_q_proj", "text_k": "add_k_proj", "text_v": "add_v_proj", "text_out": "to_add_out"}
TEXT = ("text_q", "text_k", "text_v")
#: For processors whose core can have none of its own.
NOTHING: Mapping[str, str] = {}


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


def head_dim_of(attn: nn.Module, heads: int | None = None) -> int | None:
    """D of a layer: by whichever name the attention class has for it, else of its query projection.

    Args:
        heads: of the queries; None is `attn.heads`.
    """
    if hasattr(attn, "inner_dim"):  # first: a module takes 3 microseconds to find that it lacks an attribute
        return attn.inner_dim // (attn.heads if heads is None else heads)
    for name in ("head_dim", "attention_head_dim", "dim_heads"):
        if isinstance(getattr(attn, name, None), int):
            return getattr(attn, name)
    heads = attn.heads if heads is None else heads
    for name, joined in (("to_q", 1), ("to_query", 1), ("qkv", 3)):
        module = getattr(attn, name, None)
        width = getattr(module, "out_features", None) or getattr(module, "out_channels", None)
        if width is not None:
            return width // joined // heads
    return None


def project_heads(attn: nn.Module, hidden_states: Tensor, context: Tensor | None, core: AttentionCore | None = None):
    """Project to q (B, N, H, D), k and v (B, M, Hkv, D), without the layer's query/key norms.

    Args:
        context: what keys and values come from; None is `hidden_states`.
        core: given by processors that let it call its own projections and input maps.
    """
    source = hidden_states if context is None else context
    # Some classes fuse q, k, v of cross-attention too, which stock then leaves alone.
    if _has_own(core) or not calls_fused(attn) or (context is not None and not hasattr(attn, "to_kv")):
        modules = {"q": attn.to_q, "k": attn.to_k, "v": attn.to_v}
        return project_by(core, modules, (hidden_states, source, source), head_dim_of(attn))
    if context is None:
        parts = attn.to_qkv(hidden_states).chunk(3, dim=-1)
    else:
        parts = (attn.to_q(hidden_states), *attn.to_kv(context).chunk(2, dim=-1))
    return split_heads(core, dict(zip("qkv", parts, strict=True)), head_dim_of(attn))


def project_added(attn: nn.Module, hidden_states: Tensor, core: AttentionCore | None = None):
    """q, k and v (B, N, H, D) of text: `project_heads` by the projections for added tokens."""
    head_dim = head_dim_of(attn)
    if calls_fused(attn) and not _has_own(core):
        parts = attn.to_added_qkv(hidden_states).chunk(3, dim=-1)
        return split_heads(core, dict(zip(TEXT, parts, strict=True)), head_dim)
    modules = {role: getattr(attn, JOINT[role]) for role in TEXT}
    return project_by(core, modules, [hidden_states] * 3, head_dim)


def _has_own(core: AttentionCore | None) -> bool:
    return core is not None and (core.projections is not None or core.input_maps is not None)


def project_by(core: AttentionCore | None, modules: Mapping[str, nn.Module], inputs: Iterable[Tensor], head_dim: int):
    """The output of each module (role -> projection) on its input, or of the core's own in its place.

    Returns: (B, N, H, D) of each.
    """
    own, maps = (None, None) if core is None else (core.projections, core.input_maps)
    heads = []
    for (role, module), x in zip(modules.items(), inputs, strict=True):
        if maps is not None and role in maps:
            x = maps[role](x)
        if own is not None and role in own:
            out = own[role](x).unflatten(-1, (-1, head_dim))
            heads.append(_with_adapters(core, module, x, out))
        else:
            out = module(x).unflatten(-1, (-1, head_dim))
            heads.append(out if core is None else core.projected(role, out))
    return tuple(heads)


def split_heads(core: AttentionCore | None, outputs: Mapping[str, Tensor], head_dim: int) -> tuple[Tensor, ...]:
    """(B, N, H D) of each role to (B, N, H, D), as the core wants them before norms and rotation."""
    heads = {role: out.unflatten(-1, (-1, head_dim)) for role, out in outputs.items()}
    return tuple(out if core is None else core.projected(role, out) for role, out in heads.items())


def output(attn: nn.Module, hidden_states: Tensor, core: AttentionCore | None = None) -> Tensor:
    """Merge (B, N, H, D), project out and apply the layer's dropout."""
    return project_out(attn, hidden_states.flatten(2), core)


def project_out(attn: nn.Module, hidden_states: Tensor, core: AttentionCore | None = None) -> Tensor:
    """The output projection of merged heads (B, N, H D), and the dropout behind it if there is one."""
    return out_by(core, "out", attn.to_out, hidden_states)


def out_by(core: AttentionCore | None, role: str, module: nn.Module, hidden_states: Tensor) -> Tensor:
    """`project_out` by a module of another role or name."""
    first, *rest = module if isinstance(module, nn.ModuleList) else (module,)
    if core is None or core.projections is None or role not in core.projections:
        hidden_states = first(hidden_states)
    else:
        hidden_states = _with_adapters(core, first, hidden_states, core.projections[role](hidden_states))
    for module in rest:
        hidden_states = module(hidden_states)
    return hidden_states


def _with_adapters(core: AttentionCore, module: nn.Module, x: Tensor, out: Tensor) -> Tensor:
    """The output of a core's own projection of x, (B, N, C) or (B, N, H, D), and what adapters on the layer's add."""
    # by type first, as in most calls: a module takes microseconds to find that it lacks an attribute
    added = None if type(module) is nn.Linear else adapters(module, x)
    if added is None:
        return out
    if not torch.compiler.is_compiling():
        vars(core.projections)["adapted"] = True  # for `refuse_changed_weights`
    if core.refuses_adapters:
        raise RuntimeError(_refusal("adapter", core.refuses_adapters))
    if out.dim() == 4:
        added = added.unflatten(-1, (-1, out.shape[-1]))
        if added.shape[2] != out.shape[2]:  # pooled, as the weights they were trained for
            added = added.unflatten(2, (out.shape[2], -1)).mean(3)
    return out + added.to(out.dtype)


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


def modules_of(attn: nn.Module, names: Mapping[str, str]) -> dict[str, tuple[str, nn.Module]]:
    """Role -> path and module of each projection that a layer has: of the output, without its dropout."""
    found = {}
    for role, name in names.items():
        module = getattr(attn, name, None)
        if isinstance(module, nn.ModuleList):
            name, module = f"{name}.0", module[0]
        if module is not None:
            found[role] = name, module
    return found


def weights_of(attn: nn.Module, names: Mapping[str, str]) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Weights of a layer's projections, as `LayerInfo.weights` holds them: those that are plain linear layers.

    Adapters are left out, merged ones too: `adapters` adds them in each call. Offloaded weights are read where
    accelerate keeps them.

    Args:
        names: role -> attribute of the layer.
    """
    if calls_fused(attn):
        return {}
    found = {role: _weight_of(module) for role, (_, module) in modules_of(attn, names).items()}
    return {role: weights for role, weights in found.items() if weights is not None}


def _weight_of(module: nn.Module) -> tuple[Tensor, Tensor | None] | None:
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
