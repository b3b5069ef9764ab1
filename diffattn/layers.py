"""Attention layers of a pipeline or a model, and the processors in them."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from diffattn.processors import BY_STOCK_NAME, STOCK_MODULES, CoreAttnProcessor
from diffattn.processors.unsupported import WITHOUT_PROCESSOR

DENOISERS = ("unet", "transformer", "prior", "decoder")
# Where IP-Adapters put the modules that turn pictures into prompts, some of which attend.
IMAGE_PROJECTIONS = ("encoder_hid_proj.", "image_proj.")
# What a patched attention module remembers, as attributes `_diffattn_...`: the processor that was there, what core
# replaced it, and whether `finalize` dropped what that processor needs.
RECORDS = ("stock", "core", "finalized")


@dataclass
class Layer:
    """An attention module of a diffusers model: it calls whatever its `processor` attribute holds.

    Where a module has no processor and calls children that attend and hold no weights, each child is a layer, with the
    child in the processor's place: `slot` is its name.
    """

    component: str  # its key in `pipe.components`; "" for a bare model
    path: str  # as in `model.attn_processors`, without ".processor"; of a child, its own
    attn: nn.Module
    denoises: bool
    model: str = ""  # class name of the model that it is part of
    perturbed: bool = False  # guidance sets a processor of its own here, or hooks that know stock's
    slot: str = "processor"  # the attribute of `attn` that is swapped

    @property
    def name(self) -> str:
        return f"{self.component}.{self.path}" if self.component else self.path

    @property
    def processor(self) -> Any:
        """What attends now."""
        return getattr(self.attn, self.slot)

    def record(self, what: str) -> str:
        """The name of an attribute in RECORDS: an attention module may have several slots."""
        return f"_diffattn_{what}" if self.slot == "processor" else f"_diffattn_{what}_{self.slot}"

    @property
    def stock(self) -> Any:
        """The processor that was there before diffattn's."""
        return self.attn.__dict__[self.record("stock")] if self.patched else self.processor

    @property
    def family(self) -> type[CoreAttnProcessor] | None:
        return BY_STOCK_NAME.get(type(self.stock).__name__)

    @property
    def patched(self) -> bool:
        return self.record("stock") in self.attn.__dict__ and isinstance(self.processor, CoreAttnProcessor)

    @property
    def replaced(self) -> bool:
        """Whether something else was set over diffattn's processor."""
        return self.record("stock") in self.attn.__dict__ and not self.patched

    @property
    def parallel_config(self) -> Any:
        """What enable_parallelism() gave the processor; None: all tokens are on this rank."""
        return getattr(self.processor, "_parallel_config", None)

    @property
    def finalized(self) -> bool:
        return self.record("finalized") in self.attn.__dict__

    def install(self, processor: CoreAttnProcessor) -> None:
        stock = self.stock
        processor._parallel_config = self.parallel_config
        set_processor(self.attn, processor, self.slot)
        # In __dict__, past nn.Module's bookkeeping: a stock processor with weights must not add to the
        # model's state dict while it is out of use.
        self.attn.__dict__[self.record("stock")] = stock
        self.attn.__dict__[self.record("core")] = repr(processor.core)

    def restore(self) -> None:
        refuse_finalized([self])
        stock = self.attn.__dict__[self.record("stock")]
        if getattr(stock, "_parallel_config", None) is not self.parallel_config:
            stock._parallel_config = self.parallel_config  # enable_parallelism() came after the patch
        if self.slot != "processor":
            stock.train(self.attn.training)  # model.train() and eval() passed it by
        set_processor(self.attn, stock, self.slot)
        for what in RECORDS:  # last: an interruption must not leave a patch that nothing tells of
            self.attn.__dict__.pop(self.record(what), None)

    def where_it_computes(self) -> dict[str, Any]:
        """Device and dtype of a layer's inputs, which offloaded or cast weights are brought to for each call."""
        like = next((p for p in self.attn.parameters() if p.is_floating_point()), None)
        where = dict(device=None, dtype=None) if like is None else dict(device=like.device, dtype=like.dtype)
        for module in self.attn.modules():
            device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)  # accelerate's
            if device is not None:
                where["device"] = device
            hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
            if "group_offloading" in hooks:
                where["device"] = hooks["group_offloading"].group.onload_device
            if "layerwise_casting" in hooks:
                where["dtype"] = hooks["layerwise_casting"].compute_dtype
        return where

    def state(self) -> dict[str, Any]:
        """What `reset` needs to bring this moment back."""
        names = map(self.record, RECORDS)
        records = {name: self.attn.__dict__[name] for name in names if name in self.attn.__dict__}
        return {"processor": self.processor, "records": records}

    def reset(self, state: dict[str, Any]) -> None:
        set_processor(self.attn, state["processor"], self.slot)
        for what in RECORDS:
            self.attn.__dict__.pop(self.record(what), None)
        self.attn.__dict__.update(state["records"])


def refuse_finalized(layers: Iterable[Layer]) -> None:
    """Raises: RuntimeError if the stock processor of a layer could not run."""
    names = [layer.name for layer in layers if layer.finalized]
    if names:
        more = f" and {len(names) - 1} more" if names[1:] else ""
        raise RuntimeError(
            f"unpatch: {names[0]}{more}: finalized: diffattn.finalize() dropped the projections that stock attention "
            "needs. Load the model anew to get them back"
        )


def set_processor(attn: nn.Module, processor: Any, slot: str = "processor") -> None:
    """Put a processor in the place of another; there is one at any moment, for a thread that runs the layer.

    Past `nn.Module.__setattr__`, which refuses a plain object over a registered submodule and keeps a stale attribute
    under one.
    """
    if isinstance(processor, nn.Module):
        attn._modules[slot] = processor
        attn.__dict__.pop(slot, None)
    else:
        attn.__dict__[slot] = processor
        attn._modules.pop(slot, None)


def find_layers(target: Any) -> list[Layer]:
    """Every attention module below a pipeline or model, in the order of `named_modules`.

    Raises: TypeError if `target` is neither.
    """
    if not isinstance(target, nn.Module) and not isinstance(getattr(target, "components", None), dict):
        raise TypeError(f"target: got {type(target).__name__}, expected a diffusers pipeline or model")

    perturbed = _perturbed_by(target)
    found, seen = [], set()
    for component, model in models_of(target).items():
        denoises = component.startswith(DENOISERS) or (not component and not is_autoencoder(model))
        for name, module in model.named_modules():
            slots = _slots(module)
            if slots and id(module) not in seen:
                seen.add(id(module))
                skipped = _hooked(module) or (denoises and any(re.search(p, name) for p in perturbed))
                draws = denoises and not name.startswith(IMAGE_PROJECTIONS)
                for slot in slots:
                    path = name if slot == "processor" else f"{name}.{slot}"
                    found.append(Layer(component, path, module, draws, type(model).__name__, skipped, slot))
    return found


def _slots(module: nn.Module) -> list[str]:
    """The attributes in which a module holds what attends for it."""
    # transformers' models have no such attribute; a processor is called with the module.
    if callable(getattr(module, "processor", None)):
        return ["processor"]
    return [
        name
        for name, child in module.named_children()
        if type(child).__name__ in STOCK_MODULES or (isinstance(child, CoreAttnProcessor) and child.is_module)
    ]


def _perturbed_by(target: Any) -> list[str]:
    """Patterns of the layers whose attention a pipeline's guidance changes or skips."""
    patterns = list(getattr(target, "pag_applied_layers", None) or [])  # as PAGMixin matches them
    if isinstance(target, nn.Module):
        return patterns
    if hasattr(target, "sag_masking"):  # StableDiffusionSAGPipeline names the layer in its code
        patterns.append(r"^mid_block\.attentions\.0\.transformer_blocks\.0\.attn1$")
    for guider in target.components.values():
        for skip in getattr(guider, "skip_layer_config", None) or []:
            if skip.skip_attention and skip.skip_ff:
                continue  # whole blocks
            stack = r"[^.]+" if skip.fqn == "auto" else re.escape(skip.fqn)
            indices = [skip.indices] if isinstance(skip.indices, int) else skip.indices  # as the guider was given them
            patterns += [rf"^{stack}\.{index}\." for index in indices]
    return patterns


def _hooked(attn: nn.Module) -> bool:
    """Whether diffusers' layer skip is on the attention: it takes the call of torch's attention for the identity."""
    hooks = getattr(getattr(attn, "_diffusers_hook", None), "hooks", {})
    return any(type(hook).__name__ == "AttentionProcessorSkipHook" for hook in hooks.values())


def find_unreachable(target: Any) -> dict[str, str]:
    """Modules that attend without a processor, which no patch can take, and why."""
    reasons = {}
    for component, model in models_of(target).items():
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
        for component, model in models_of(target).items()
        for name, _ in model.named_modules()
    ]


def is_autoencoder(model: nn.Module) -> bool:
    return hasattr(model, "decode") and hasattr(model, "encode")


def models_of(target: Any) -> dict[str, nn.Module]:
    """A pipeline's models by their names; a bare model by "". Of torch.compile(model), the model."""
    named = {"": target} if isinstance(target, nn.Module) else target.components
    return {name: getattr(c, "_orig_mod", c) for name, c in named.items() if isinstance(c, nn.Module)}
