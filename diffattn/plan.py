"""Which layers a patch takes, with which processors, and why it leaves the others."""

import copy
import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from diffattn.cores import (
    AttentionCore,
    GroupedQueryAttention,
    LinearAttention,
    SparseLinearAttention,
    WindowAttention,
)
from diffattn.layers import Layer
from diffattn.processors import CoreAttnProcessor
from diffattn.processors.unsupported import BY_REASON, NOT_CONVERTED, PERTURBED_BY_GUIDANCE, SET_BY_HAND

CORES_BY_NAME = {
    "linear": LinearAttention,
    "mqa": lambda: GroupedQueryAttention(kv_heads=1),
    "mqa-svd": lambda: GroupedQueryAttention(kv_heads=1, pooling="svd"),
    "linfusion": LinearAttention.linfusion,
    "hedgehog": lambda: LinearAttention("hedgehog"),
    "sparse": SparseLinearAttention,
    "window": WindowAttention,
}
SPLIT = "the model runs with context parallelism, its tokens split over ranks"
STOCK_IS_BEST = "softmax, one key/value head a query head: stock is the fast path"

Layers = str | Sequence[str] | Callable[[str, nn.Module], bool]


def as_core(core: AttentionCore | str | None) -> AttentionCore | None:
    if isinstance(core, str):
        if core not in CORES_BY_NAME:
            raise ValueError(f"core: got {core!r}, expected one of {', '.join(CORES_BY_NAME)} or a core instance")
        return CORES_BY_NAME[core]()
    if core is not None and not isinstance(core, AttentionCore):
        raise TypeError(f"core: got {type(core).__name__}, expected None, a name or an AttentionCore instance")
    return core


def _matcher(layers: Layers | None) -> Callable[[Layer], bool]:
    if layers is None:
        return lambda layer: True
    if callable(layers):
        return lambda layer: bool(layers(layer.name, layer.attn))
    several = isinstance(layers, Iterable) and not isinstance(layers, str)
    patterns = list(layers) if several else [layers]
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"layers: got {layers!r}, expected a glob, a list of globs or a function (name, attn) -> bool")
    return lambda layer: any(fnmatch.fnmatchcase(n, p) for n in (layer.name, layer.path) for p in patterns)


def make_plan(found: list[Layer], core: AttentionCore | None, layers: Layers | None, checkpoint: Any = None):
    """Decide for each layer, changing nothing: (layer, processor) to install, reasons to skip, conversions.

    A `diffattn.checkpoints.Checkpoint` has cores of its own, which `core` must be like.
    """
    matches = _matcher(layers)
    saved = None if checkpoint is None else checkpoint.match(found)
    plan: list[tuple[Layer, CoreAttnProcessor]] = []
    skipped: dict[str, str] = {}
    converted: list[str] = []
    chosen = [layer for layer in found if matches(layer)]
    if not chosen:
        names = "\n".join(f"  {layer.name}" for layer in found)
        raise ValueError(f"layers: {layers!r} matches none of these attention layers:\n{names}")
    for layer in found:
        if layer not in chosen:
            skipped[layer.name] = "not chosen by `layers`"
            continue
        if saved is not None and layer.name not in saved:
            skipped[layer.name] = "not among the weights"
            continue
        wanted = core if saved is None else checkpoint.core(saved[layer.name], core)
        if layer.finalized:
            if not layer.patched:
                name = type(layer.processor).__name__
                skipped[layer.name] = f"finalized, then {name} was set, which cannot run it: load the model anew"
            elif repr(wanted) == repr(layer.processor.core):
                plan.append((layer, layer.processor))
            else:
                skipped[layer.name] = f"finalized: it keeps {layer.processor.core}"
            continue
        reason, exact = _decide(layer, wanted, explicit=layers is not None or saved is not None)
        if reason is not None:
            skipped[layer.name] = reason
            continue
        plan.append((layer, _made(layer, wanted, loading=saved is not None)))
        if not exact:
            converted.append(layer.name)
    return plan, skipped, converted


@torch.inference_mode(False)
@torch.no_grad()
def _made(layer: Layer, core: AttentionCore | None, loading: bool) -> CoreAttnProcessor:
    """The processor for a layer. Whoever patches under inference_mode() may train or load weights later."""
    new = layer.family.exact_core(layer.attn) if core is None else copy.deepcopy(core)
    try:
        new.prepare(replace(layer.family.layer_info(layer.attn), loading=loading))
    except ValueError as error:
        raise ValueError(f"{layer.name}: {error}") from None
    processor = layer.family(new)
    processor.to(**layer.where_it_computes())
    processor.train(layer.attn.training)
    return processor


def _decide(layer: Layer, core: AttentionCore | None, explicit: bool) -> tuple[str | None, bool]:
    """Why the layer is skipped (None: it is not) and whether the core computes what stock computes."""
    family = layer.family
    if layer.perturbed:
        return PERTURBED_BY_GUIDANCE, True
    if family is None:
        if explicit:
            raise ValueError(f"layers: {layer.name}: {no_family(layer)}")
        return no_family(layer), True
    heads, kv_heads = family.heads(layer.attn)
    formula = family.exact_core(layer.attn).formula(heads, kv_heads)
    if core is None:
        if formula == ("softmax", heads):
            return STOCK_IS_BEST, True
        return (SPLIT if layer.parallel_config is not None else None), True
    exact = core.formula(heads, kv_heads) == formula
    if not exact and not explicit:
        if formula[0] != "softmax":
            return f"stock is {formula[0]} attention already", True
        if not layer.denoises:
            return "not part of the denoiser", True
        if not family.attends_to_itself(layer.name, layer.attn):
            return family.kept, True
        if layer.model in NOT_CONVERTED:
            return NOT_CONVERTED[layer.model], True
    if layer.parallel_config is not None and not family.splits(core):
        raise ValueError(f"core: {core} on {layer.name}: {SPLIT}, and of the cores SoftmaxAttention() alone can do it")
    try:
        core.check(heads, kv_heads)
    except ValueError as error:
        raise ValueError(f"{layer.name}: {error}") from None
    return None, exact


def no_family(layer: Layer) -> str:
    name = type(layer.stock).__name__
    reason = SET_BY_HAND if isinstance(layer.stock, CoreAttnProcessor) else BY_REASON.get(name)
    return f"no processor for {name}" + (f": {reason}" if reason else "")
