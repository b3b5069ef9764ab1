"""Choose layers, swap their processors, undo: `patch`, `unpatch`, `patched`, `status`."""

import contextlib
import copy
import fnmatch
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from diffattn._config import COMPILE_MODES, config
from diffattn.cores import AttentionCore, GroupedQueryAttention, LinearAttention
from diffattn.processors import BY_STOCK_NAME, CoreAttnProcessor
from diffattn.processors.unsupported import BY_REASON, NOT_CONVERTED, PERTURBED_BY_PIPELINE, WITHOUT_PROCESSOR

CORES_BY_NAME = {"linear": LinearAttention, "mqa": lambda: GroupedQueryAttention(kv_heads=1)}
DENOISERS = ("unet", "transformer", "prior", "decoder")
# Attributes of a patched attention module: the processor that was there, and what core replaced it.
RECORDS = ("_diffattn_stock", "_diffattn_core")
STOCK_IS_BEST = "softmax, one key/value head a query head: stock is the fast path"

Layers = str | Sequence[str] | Callable[[str, nn.Module], bool]


@dataclass
class Layer:
    """An attention module of a diffusers model: it calls whatever its `processor` attribute holds."""

    component: str  # its key in `pipe.components`; "" for a bare model
    path: str  # as in `model.attn_processors`, without ".processor"
    attn: nn.Module
    denoises: bool
    model: str = ""  # class name of the model that it is part of
    perturbed: bool = False  # the pipeline's perturbed attention guidance sets processors here

    @property
    def name(self) -> str:
        return f"{self.component}.{self.path}" if self.component else self.path

    @property
    def stock(self) -> Any:
        """The processor that was there before diffattn's."""
        return self.attn.__dict__["_diffattn_stock"] if self.patched else self.attn.processor

    @property
    def family(self) -> type[CoreAttnProcessor] | None:
        return BY_STOCK_NAME.get(type(self.stock).__name__)

    @property
    def patched(self) -> bool:
        return "_diffattn_stock" in self.attn.__dict__ and isinstance(self.attn.processor, CoreAttnProcessor)

    def install(self, processor: CoreAttnProcessor) -> None:
        stock = self.stock
        _set_processor(self.attn, processor)
        # In __dict__, past nn.Module's bookkeeping: a stock processor with weights must not add to the
        # model's state dict while it is out of use.
        self.attn.__dict__["_diffattn_stock"] = stock
        self.attn.__dict__["_diffattn_core"] = repr(processor.core)

    def restore(self) -> None:
        _set_processor(self.attn, self.attn.__dict__["_diffattn_stock"])
        for record in RECORDS:  # last: an interruption must not leave a patch that nothing tells of
            self.attn.__dict__.pop(record, None)

    def state(self) -> dict[str, Any]:
        """What `reset` needs to bring this moment back."""
        records = {name: self.attn.__dict__[name] for name in RECORDS if name in self.attn.__dict__}
        return {"processor": self.attn.processor, "records": records}

    def reset(self, state: dict[str, Any]) -> None:
        _set_processor(self.attn, state["processor"])
        for record in RECORDS:
            self.attn.__dict__.pop(record, None)
        self.attn.__dict__.update(state["records"])


def _set_processor(attn: nn.Module, processor: Any) -> None:
    # nn.Module refuses a plain object over a registered submodule, and keeps a stale attribute under one.
    attn._modules.pop("processor", None)
    attn.__dict__.pop("processor", None)
    attn.processor = processor


def _forget_fused(model: nn.Module, processors: list[CoreAttnProcessor] | None = None) -> None:
    """Let unfuse_qkv_projections() put back stock, where fuse_qkv_projections() put diffattn's processors aside."""
    aside = getattr(model, "original_attn_processors", None) or {}
    for name, processor in aside.items():
        attn = model.get_submodule(name.removesuffix(".processor"))
        ours = isinstance(processor, CoreAttnProcessor) and "_diffattn_stock" in attn.__dict__
        if ours and (processors is None or any(processor is p for p in processors)):
            aside[name] = attn.__dict__["_diffattn_stock"]


@dataclass(eq=False)
class PatchHandle:
    """What `patch` did. Printing it shows a table.

    Attributes:
        installed: layer name -> the processor that is there now.
        skipped: layer name -> why it kept its stock processor.
    """

    installed: dict[str, CoreAttnProcessor] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    _order: list[str] = field(default_factory=list, repr=False)
    _layers: dict[str, Layer] = field(default_factory=dict, repr=False)
    _compiled: list[nn.Module] = field(default_factory=list, repr=False)
    _models: list[nn.Module] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Put the stock processors back, the very same objects, where this patch's are still installed."""
        for name, processor in self.installed.items():
            layer = self._layers[name]
            if layer.patched and layer.attn.processor is processor:
                layer.restore()
        for model in self._models:
            _forget_fused(model, list(self.installed.values()))
        _uncompile(self._compiled)
        self._compiled.clear()

    def __str__(self) -> str:
        rows = [(name, type(p).__name__, str(p.core)) for name, p in self.installed.items()]
        rows += [(name, "stock", reason) for name, reason in self.skipped.items()]
        rows.sort(key=lambda row: self._order.index(row[0]))
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
        lines = [f"{name:<{widths[0]}}  {kind:<{widths[1]}}  {what}" for name, kind, what in rows]
        head = f"diffattn: {len(self.installed)} of {len(rows)} attention layers patched"
        return "\n".join([head, *lines])


def patch(
    target: Any,
    core: AttentionCore | str | None = None,
    *,
    layers: Layers | None = None,
    weights: str | None = None,
    compile: str | None = None,
) -> PatchHandle:
    """Replace attention processors of a pipeline or a model.

    Args:
        target: a diffusers pipeline (every component that has attention) or a diffusers model.
        core: None installs the exact core wherever stock is not torch's own fused attention already: the
            same formula, only rounding differs. `"linear"`, `"mqa"` or a core instance (copied per layer) is installed
            where it computes what stock computes and, being another mechanism, in place of softmax
            self-attention over image, video or audio tokens of the denoiser.
        layers: a glob, a list of globs or `f(name, attn) -> bool` over layer names as in
            `model.attn_processors` without `.processor`; in a pipeline the component's name comes first
            (`"unet.mid_block.*"`; a glob may leave it out). Chosen layers get the core whatever they
            attend to.
        weights: folder or hub id with weights of the cores, see `load_weights`.
        compile: `"regional"` compiles the model's repeated blocks, `"full"` the whole model; None takes
            `diffattn.config.compile`, which compiles nothing unless set.

    Returns: a handle with what was installed, what was skipped and why, and `undo()`.

    Raises:
        TypeError: `target` or `core` is of no type that can be patched or installed.
        ValueError: a pattern or a core that takes no layer, an unknown family, a core that does not fit.
            The model is then as it was.
    """
    core = as_core(core)
    if compile is None:
        compile = config.compile
    if compile not in COMPILE_MODES:
        raise ValueError(f"compile: got {compile!r}, expected one of {COMPILE_MODES}")
    found = find_layers(target)
    unreachable = find_unreachable(target)
    if not any(layer.family for layer in found):
        reasons = {layer.name: _no_family(layer) for layer in found} | unreachable
        listed = "".join(f"\n  {name}: {reason}" for name, reason in reasons.items())
        raise ValueError(
            f"target: no attention layer of {type(target).__name__} can be patched; found {listed or 'none'}"
        )
    plan, skipped, converted = make_plan(found, core, layers)
    if core is not None and not plan:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in skipped.items())
        raise ValueError(f"core: {core} fits no layer of {type(target).__name__}:\n{reasons}")

    handle = PatchHandle(
        skipped=skipped | unreachable, _order=names_of(target), _models=list(_models(target).values())
    )
    done: list[tuple[Layer, dict[str, Any]]] = []
    compiled_before = _compiled(target)
    try:
        for layer, processor in plan:
            if layer.patched and _same(layer.attn.processor, processor):
                processor = layer.attn.processor  # patching twice keeps loaded weights
            done.append((layer, layer.state()))
            layer.install(processor)
            handle.installed[layer.name] = processor
            handle._layers[layer.name] = layer
        if compile is not None:
            _compile(target, compile)
            handle._compiled = [m for m in _compiled(target) if m not in compiled_before]
        if weights is not None:  # last: what it wrote into a kept processor could not be taken back
            from diffattn.weights import load_weights

            load_weights(target, weights)
    except BaseException:
        _uncompile([m for m in _compiled(target) if m not in compiled_before])
        for layer, before in done:
            layer.reset(before)
        raise
    if converted and weights is None:
        warnings.warn(
            f"diffattn: {len(converted)} layers now compute {core}, another mechanism than they were trained "
            "with, and no distilled weights were given: expect noise until you train or load some "
            "(patch(..., weights=...)).",
            stacklevel=2,
        )
    return handle


def unpatch(target: Any) -> None:
    """Put back every stock processor, the very same objects. A model without patches stays as it is.

    A processor that was set over diffattn's since (`set_attention_slice`, `load_ip_adapter`, you) stays too.
    """
    status(target).undo()
    for model in _models(target).values():
        _forget_fused(model)


def status(target: Any) -> PatchHandle:
    """What is installed in a pipeline or model now; `undo()` takes all of it out."""
    handle = PatchHandle()
    for layer in find_layers(target):
        handle._order.append(layer.name)
        if layer.patched:
            handle.installed[layer.name] = layer.attn.processor
            handle._layers[layer.name] = layer
        else:
            replaced = ", which replaced diffattn's" if "_diffattn_stock" in layer.attn.__dict__ else ""
            handle.skipped[layer.name] = type(layer.attn.processor).__name__ + replaced
    return handle


@contextlib.contextmanager
def patched(target: Any, core: AttentionCore | str | None = None, **options: Any) -> Iterator[PatchHandle]:
    """`patch` for the length of a `with` block. Takes the arguments of `patch`."""
    handle = patch(target, core, **options)
    try:
        yield handle
    finally:
        handle.undo()


def find_layers(target: Any) -> list[Layer]:
    """Every attention module below a pipeline or model, in the order of `named_modules`.

    Raises: TypeError if `target` is neither.
    """
    if not isinstance(target, nn.Module) and not isinstance(getattr(target, "components", None), dict):
        raise TypeError(f"target: got {type(target).__name__}, expected a diffusers pipeline or model")

    guided = getattr(target, "pag_applied_layers", None) or []  # patterns, as PAGMixin matches them
    found, seen = [], set()
    for component, model in _models(target).items():
        denoises = component.startswith(DENOISERS) or (not component and not is_autoencoder(model))
        for name, module in model.named_modules():
            # transformers' models have no such attribute; a processor is called with the module.
            if callable(getattr(module, "processor", None)) and id(module) not in seen:
                seen.add(id(module))
                perturbed = component in ("unet", "transformer") and any(re.search(p, name) for p in guided)
                found.append(Layer(component, name, module, denoises, type(model).__name__, perturbed))
    return found


def find_unreachable(target: Any) -> dict[str, str]:
    """Modules that attend without a processor, which no patch can take, and why."""
    reasons = {}
    for component, model in _models(target).items():
        if not type(model).__module__.startswith("diffusers."):
            continue  # text encoders and the like attend in their own ways, and nobody asks to patch them
        for name, module in model.named_modules():
            reason = WITHOUT_PROCESSOR.get(type(module).__name__)
            if reason is not None:
                reasons[f"{component}.{name}" if component else name] = f"{type(module).__name__} {reason}"
    return reasons


def names_of(target: Any) -> list[str]:
    """Every module of a pipeline or model, in the order of `named_modules`."""
    return [
        f"{component}.{name}" if component else name
        for component, model in _models(target).items()
        for name, _ in model.named_modules()
    ]


def is_autoencoder(model: nn.Module) -> bool:
    return hasattr(model, "decode") and hasattr(model, "encode")


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
    patterns = [layers] if isinstance(layers, str) else list(layers)
    return lambda layer: any(fnmatch.fnmatchcase(n, p) for n in (layer.name, layer.path) for p in patterns)


def make_plan(found: list[Layer], core: AttentionCore | None, layers: Layers | None):
    """Decide for each layer, changing nothing: (layer, processor) to install, reasons to skip, conversions."""
    matches = _matcher(layers)
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
        reason, exact = _decide(layer, core, explicit=layers is not None)
        if reason is not None:
            skipped[layer.name] = reason
            continue
        new = layer.family.exact_core(layer.attn) if core is None else copy.deepcopy(core)
        processor = layer.family(new)
        processor.to(**_where_it_computes(layer.attn))
        processor.train(layer.attn.training)
        plan.append((layer, processor))
        if not exact:
            converted.append(layer.name)
    return plan, skipped, converted


def _where_it_computes(attn: nn.Module) -> dict[str, Any]:
    """Device and dtype of a layer's inputs, which offloaded or cast weights are brought to for each call."""
    like = next((p for p in attn.parameters() if p.is_floating_point()), None)
    where = dict(device=None, dtype=None) if like is None else dict(device=like.device, dtype=like.dtype)
    for module in attn.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)  # accelerate's
        if device is not None:
            where["device"] = device
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        if "group_offloading" in hooks:
            where["device"] = hooks["group_offloading"].group.onload_device
        if "layerwise_casting" in hooks:
            where["dtype"] = hooks["layerwise_casting"].compute_dtype
    return where


def _decide(layer: Layer, core: AttentionCore | None, explicit: bool) -> tuple[str | None, bool]:
    """Why the layer is skipped (None: it is not) and whether the core computes what stock computes."""
    family = layer.family
    if layer.perturbed:
        return PERTURBED_BY_PIPELINE, True
    if family is None:
        if explicit:
            raise ValueError(f"layers: {layer.name}: {_no_family(layer)}")
        return _no_family(layer), True
    heads, kv_heads = family.heads(layer.attn)
    formula = family.exact_core(layer.attn).formula(heads, kv_heads)
    if core is None:
        return (STOCK_IS_BEST if formula == ("softmax", heads) else None), True
    exact = core.formula(heads, kv_heads) == formula
    if not exact and not explicit:
        if formula[0] != "softmax":
            return f"stock is {formula[0]} attention already", True
        if not family.attends_to_itself(layer.name, layer.attn):
            return family.kept, True
        if layer.model in NOT_CONVERTED:
            return NOT_CONVERTED[layer.model], True
        if not layer.denoises:
            return "not part of the denoiser", True
    try:
        core.check(heads, kv_heads)
    except ValueError as error:
        raise ValueError(f"{layer.name}: {error}") from None
    return None, exact


def _no_family(layer: Layer) -> str:
    name = type(layer.stock).__name__
    reason = BY_REASON.get(name)
    return f"no processor for {name}" + (f": {reason}" if reason else "")


def _same(one: CoreAttnProcessor, other: CoreAttnProcessor) -> bool:
    def identity(processor):
        shapes = {name: tensor.shape for name, tensor in processor.state_dict().items()}
        return type(processor), repr(processor.core), shapes

    return identity(one) == identity(other)


def _models(target: Any) -> dict[str, nn.Module]:
    if isinstance(target, nn.Module):
        return {"": target}
    return {name: c for name, c in target.components.items() if isinstance(c, nn.Module)}


def _compile(target: Any, mode: str) -> None:
    """Compile a model, or a pipeline's denoisers, in place: the repeated blocks or the whole."""
    for name, model in _models(target).items():
        if name and not name.startswith(DENOISERS):
            continue
        if mode == "full":
            model.compile(fullgraph=True)
        elif not getattr(model, "_repeated_blocks", None):
            raise ValueError(
                f"compile: got 'regional', but diffusers names no repeated blocks of {type(model).__name__}; "
                "expected 'full' for this model, or None"
            )
        else:
            model.compile_repeated_blocks(fullgraph=True)


def _compiled(target: Any) -> list[nn.Module]:
    return [m for model in _models(target).values() for m in model.modules() if m._compiled_call_impl is not None]


def _uncompile(modules: list[nn.Module]) -> None:
    for module in modules:
        module._compiled_call_impl = None
