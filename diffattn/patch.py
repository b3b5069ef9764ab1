"""Swap the processors of layers, and undo: `patch`, `unpatch`, `patched`, `status`."""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FunctionType, NoneType
from typing import Any

from torch import nn

from diffattn._config import COMPILE_MODES, config
from diffattn.compiling import COMPILED, compile_models, compiled, uncompile
from diffattn.cores import AttentionCore
from diffattn.layers import Layer, find_layers, find_unreachable, models_of, names_of, refuse_finalized
from diffattn.parallel import take_back_refused
from diffattn.plan import Layers, as_core, make_plan, no_family
from diffattn.processors import CoreAttnProcessor
from diffattn.running import refuse_if_running


def _forget_fused(model: nn.Module, forgets: Callable[[nn.Module, CoreAttnProcessor], bool] | None = None) -> None:
    """Let unfuse_qkv_projections() put back stock, where fuse_qkv_projections() put diffattn's processors aside.

    Args:
        forgets: of the layer and its processor, whether to; None: always.
    """
    aside = getattr(model, "original_attn_processors", None) or {}
    for name, processor in aside.items():
        attn = model.get_submodule(name.removesuffix(".processor"))
        ours = isinstance(processor, CoreAttnProcessor) and "_diffattn_stock" in attn.__dict__
        if ours and (forgets is None or forgets(attn, processor)):
            aside[name] = attn.__dict__["_diffattn_stock"]


@dataclass(eq=False)
class PatchHandle:
    """What `patch` did. Printing it shows a table.

    Attributes:
        installed: layer name -> the processor that is there now.
        skipped: layer name -> why it kept the processor that it had: stock's, or an earlier patch's.
    """

    installed: dict[str, CoreAttnProcessor] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    _order: list[str] = field(default_factory=list, repr=False)
    _layers: dict[str, Layer] = field(default_factory=dict, repr=False)
    _kept: dict[str, CoreAttnProcessor] = field(default_factory=dict, repr=False)  # skipped, of an earlier patch
    _earlier: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)  # layers that were patched already
    _compiled: list[nn.Module] = field(default_factory=list, repr=False)
    _compiled_earlier: list[nn.Module] = field(default_factory=list, repr=False)
    _models: dict[str, nn.Module] = field(default_factory=dict, repr=False)

    def undo(self) -> None:
        """Put the stock processors back, the very same objects, where this patch's are still installed.

        Raises: RuntimeError if another thread is running the model, or a layer is finalized: all stays patched.
        """
        self._take_out({}, [])

    def _take_out(self, earlier: dict[str, dict[str, Any]], stay: list[nn.Module]) -> None:
        """`undo`, but layers in `earlier` get back what they had, which `Layer.state` told, and modules in `stay` stay
        compiled."""
        refuse_if_running(_swapped(self._models, self._layers.values()), "undo")
        installed = {n: p for n, p in self.installed.items() if n not in earlier or earlier[n]["processor"] is not p}
        here = [self._layers[name] for name, p in installed.items() if self._layers[name].processor is p]
        refuse_finalized(here)
        take_back_refused(self._models.values())
        for layer in here:
            if layer.name in earlier:
                layer.reset(earlier[layer.name])
            elif layer.patched:
                layer.restore()
        for model in self._models.values():
            _forget_fused(model, lambda attn, processor: any(processor is p for p in installed.values()))
        uncompile([m for m in self._compiled if m not in stay])
        self._compiled.clear()

    def __str__(self) -> str:
        rows = [
            (name, type(p).__name__, f"{p.core}{', finalized' if self._layers[name].finalized else ''}")
            for name, p in self.installed.items()
        ]
        for name, reason in self.skipped.items():
            rows.append((name, type(self._kept[name]).__name__ if name in self._kept else "stock", reason))
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
            (`"unet.mid_block.*"`; a glob may leave it out). A module that is swapped itself goes by its own name, with
            the module around it as `attn`. Chosen layers get the core whatever they attend to.
        weights: folder or hub id with weights of the cores, see `load_weights`. They say which layers get which
            core; `core`, if given, has to be the one they are for.
        compile: `"regional"` compiles the model's repeated blocks, `"full"` the whole model; None takes
            `diffattn.config.compile`, which compiles nothing unless set.

    Returns: a handle with what was installed, what was skipped and why, and `undo()`.

    Raises:
        TypeError: `target` or `core` is of no type that can be patched or installed.
        ValueError: a pattern or a core that takes no layer, an unknown family, a core or weights that do not fit.
        FileNotFoundError: `weights` is neither such a folder nor such a repository.
        RuntimeError: another thread is running a model that would be patched.
        The model is then as it was.
    """
    core = as_core(core)
    if compile is None:
        compile = config.compile
    if compile not in COMPILE_MODES:
        raise ValueError(f"compile: got {compile!r}, expected one of {COMPILE_MODES}")
    found = find_layers(target)
    unreachable = find_unreachable(target)
    take_back_refused(models_of(target).values())
    if not any(layer.family for layer in found):
        reasons = {layer.name: no_family(layer) for layer in found} | unreachable
        listed = "".join(f"\n  {name}: {reason}" for name, reason in reasons.items())
        raise ValueError(
            f"target: no attention layer of {type(target).__name__} can be patched; found {listed or 'none'}"
        )
    checkpoint = None
    if weights is not None:
        from diffattn.checkpoints import load_into, open_checkpoint

        checkpoint = open_checkpoint(weights)
    plan, skipped, converted = make_plan(found, core, layers, checkpoint)
    if (core is not None or checkpoint is not None) and not plan:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in skipped.items())
        raise ValueError(f"core: {core} fits no layer of {type(target).__name__}:\n{reasons}")

    handle = PatchHandle(skipped=skipped | unreachable, _order=names_of(target), _models=models_of(target))
    for layer in found:
        if layer.name in skipped and layer.patched:
            handle._kept[layer.name] = layer.processor
            if not layer.finalized:
                reason = f"keeps {layer.processor.core} of an earlier patch ({skipped[layer.name]})"
                handle.skipped[layer.name] = reason
    swapped = _swapped(models_of(target), [layer for layer, _ in plan])
    refuse_if_running(swapped, "patch")
    done: list[tuple[Layer, dict[str, Any]]] = []
    compiled_before = compiled(target)
    saved = {} if checkpoint is None else checkpoint.match(found)
    aside = [f for model in swapped if (f := getattr(model, "original_attn_processors", None))]
    aside = [(processors, dict(processors)) for processors in aside]
    try:
        # Once this patch is over fused processors, those of an earlier one must not come back in their place.
        again = {id(layer.attn) for layer, _ in plan if layer.replaced}
        for model in swapped:
            _forget_fused(model, lambda attn, _: id(attn) in again)
        for layer, processor in plan:
            roles = None if checkpoint is None else checkpoint.roles(saved[layer.name])
            if layer.patched and _same(layer.processor, processor, roles):
                processor = layer.processor  # patching twice keeps loaded weights
                if layer.name in converted and any(True for _ in processor.parameters()):
                    converted.remove(layer.name)
            done.append((layer, layer.state()))
            if layer.patched:
                handle._earlier[layer.name] = done[-1][1]
            layer.install(processor)
            handle.installed[layer.name] = processor
            handle._layers[layer.name] = layer
        if compile is not None:
            compile_models(target, compile)
            ours = [m for m in compiled(target) if m not in compiled_before or COMPILED in m.__dict__]
            handle._compiled, handle._compiled_earlier = ours, compiled_before
            for module in ours:
                module.__dict__[COMPILED] = True
        if checkpoint is not None:  # last: what it wrote into a kept processor could not be taken back
            load_into(checkpoint, {saved[layer.name]: layer for layer, _ in plan})
        refuse_if_running(swapped, "patch")  # a call that began meanwhile
    except BaseException:
        uncompile([m for m in compiled(target) if m not in compiled_before])
        for layer, before in done:
            layer.reset(before)
        for processors, before in aside:
            processors.update(before)
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

    What `patch(..., compile=...)` compiled runs eagerly again.

    A processor that was set over diffattn's since (`set_attention_slice`, `load_ip_adapter`, you) stays too.

    Raises: RuntimeError if another thread is running a patched model, or a layer is finalized; all stays patched.
    """
    status(target).undo()
    uncompile([m for m in compiled(target) if COMPILED in m.__dict__])
    for model in models_of(target).values():
        _forget_fused(model)


def status(target: Any) -> PatchHandle:
    """What is installed in a pipeline or model now; `undo()` takes all of it out."""
    layers = find_layers(target)
    handle = PatchHandle(_models=models_of(target))
    for layer in layers:
        handle._order.append(layer.name)
        if layer.patched:
            handle.installed[layer.name] = layer.processor
            handle._layers[layer.name] = layer
        else:
            replaced = ", which replaced diffattn's" if layer.replaced else ""
            handle.skipped[layer.name] = type(layer.processor).__name__ + replaced
    return handle


@contextlib.contextmanager
def patched(target: Any, core: AttentionCore | str | None = None, **options: Any) -> Iterator[PatchHandle]:
    """`patch` for the length of a `with` block. Takes the arguments of `patch`.

    Layers that were patched before the block have that patch again after it.
    """
    handle = patch(target, core, **options)
    try:
        yield handle
    finally:
        handle._take_out(handle._earlier, handle._compiled_earlier)


def _same(one: CoreAttnProcessor, other: CoreAttnProcessor, roles: Sequence[str] | None) -> bool:
    """Whether `one`, which is installed, is what `other` would be; it may have loaded projections besides, but of
    those in `roles` alone, which are loaded anew, if there are any.
    """

    def shapes(processor):
        return {name: tensor.shape for name, tensor in processor.state_dict().items()}

    def modules(core):
        """What was given to the core as modules, like feature maps, whose names alone are in its `repr`."""
        given = {name: getattr(core, name, None) for name in core.config()}
        return {name: _settings(module) for name, module in given.items() if isinstance(module, nn.Module)}

    if type(one) is not type(other) or repr(one.core) != repr(other.core) or modules(one.core) != modules(other.core):
        return False
    here, there = shapes(one), shapes(other)
    loaded = [name for name in here.keys() - there.keys() if name.startswith("core.projections.")]
    if roles is not None and not {name.split(".")[2] for name in loaded} <= set(roles):
        return False
    return {name: shape for name, shape in here.items() if name not in loaded} == there


def _settings(module: nn.Module) -> list[tuple]:
    """What the modules in a module are, but for weights and objects that cannot be compared."""
    plain = (bool, int, float, str, NoneType, FunctionType)
    return [
        (name, type(m), {k: v for k, v in vars(m).items() if k not in ("training", "forward") and type(v) in plain})
        for name, m in module.named_modules()
    ]


def _swapped(models: dict[str, nn.Module], layers: Iterable[Layer]) -> list[nn.Module]:
    """The models that the layers are part of."""
    names = {layer.component for layer in layers}
    return [model for name, model in models.items() if name in names]
