"""Attention layers of a pipeline or a model, and the processors in them."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from diffattn.processors import BY_STOCK_NAME, CoreAttnProcessor
from diffattn.processors.unsupported import WITHOUT_PROCESSOR

DENOISERS = ("unet", "transformer", "prior", "decoder")
# Where IP-Adapters put the modules that turn pictures into prompts, some of which attend.
IMAGE_PROJECTIONS = ("encoder_hid_proj.", "image_proj.")
# Attributes of a patched attention module: the processor that was there, what core replaced it, and whether `finalize`
# dropped what that processor needs.
RECORDS = ("_diffattn_stock", "_diffattn_core", "_diffattn_finalized")


@dataclass
class Layer:
    """An attention module of a diffusers model: it calls whatever its `processor` attribute holds."""

    component: str  # its key in `pipe.components`; "" for a bare model
    path: str  # as in `model.attn_processors`, without ".processor"
    attn: nn.Module
    denoises: bool
    model: str = ""  # class name of the model that it is part of
    perturbed: bool = False  # guidance sets a processor of its own here, or hooks that know stock's

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

    @property
    def parallel_config(self) -> Any:
        """What enable_parallelism() gave the processor; None: all tokens are on this rank."""
        return getattr(self.attn.processor, "_parallel_config", None)

    @property
    def finalized(self) -> bool:
        return "_diffattn_finalized" in self.attn.__dict__

    def install(self, processor: CoreAttnProcessor) -> None:
        stock = self.stock
        processor._parallel_config = self.parallel_config
        set_processor(self.attn, processor)
        # In __dict__, past nn.Module's bookkeeping: a stock processor with weights must not add to the
        # model's state dict while it is out of use.
        self.attn.__dict__["_diffattn_stock"] = stock
        self.attn.__dict__["_diffattn_core"] = repr(processor.core)

    def restore(self) -> None:
        refuse_finalized([self])
        stock = self.attn.__dict__["_diffattn_stock"]
        if getattr(stock, "_parallel_config", None) is not self.parallel_config:
            stock._parallel_config = self.parallel_config  # enable_parallelism() came after the patch
        set_processor(self.attn, stock)
        for record in RECORDS:  # last: an interruption must not leave a patch that nothing tells of
            self.attn.__dict__.pop(record, None)

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
        records = {name: self.attn.__dict__[name] for name in RECORDS if name in self.attn.__dict__}
        return {"processor": self.attn.processor, "records": records}

    def reset(self, state: dict[str, Any]) -> None:
        set_processor(self.attn, state["processor"])
        for record in RECORDS:
            self.attn.__dict__.pop(record, None)
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


def set_processor(attn: nn.Module, processor: Any) -> None:
    """Put a processor in the place of another; there is one at any moment, for a thread that runs the layer.

    Past `nn.Module.__setattr__`, which refuses a plain object over a registered submodule and keeps a stale attribute
    under one.
    """
    if isinstance(processor, nn.Module):
        attn._modules["processor"] = processor
        attn.__dict__.pop("processor", None)
    else:
        attn.__dict__["processor"] = processor
        attn._modules.pop("processor", None)


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
            # transformers' models have no such attribute; a processor is called with the module.
            if callable(getattr(module, "processor", None)) and id(module) not in seen:
                seen.add(id(module))
                skipped = _hooked(module) or (denoises and any(re.search(p, name) for p in perturbed))
                draws = denoises and not name.startswith(IMAGE_PROJECTIONS)
                found.append(Layer(component, name, module, draws, type(model).__name__, skipped))
    return found


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
