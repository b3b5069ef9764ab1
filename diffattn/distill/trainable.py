"""Which weights a distillation trains."""

from typing import Any

import torch
from torch import nn

from diffattn.cores import AttentionCore
from diffattn.cores.base import ROLES
from diffattn.distill.settings import Settings
from diffattn.patch import PatchHandle
from diffattn.processors.projections import modules_of


def check_trainable(handle: PatchHandle, core: AttentionCore, settings: Settings) -> None:
    """Raises: ValueError if there is nothing to train, ImportError if peft is wanted and missing."""
    half = [name for name in handle.installed if _dtype(handle, name) != torch.float32]
    if half and settings.mixed_precision == "no":
        raise ValueError(
            f"mixed_precision: got 'no' for a model in {_dtype(handle, half[0])}: its weights would lose small steps; "
            "expected 'bf16' or 'fp16', or a pipeline loaded in float32"
        )
    if settings.train == "core":
        if not any(True for processor in handle.installed.values() for _ in processor.parameters()):
            raise ValueError(
                f"train: {core} has no weights of its own; expected 'projections' or 'lora', or a core that learns"
            )
        return
    if settings.train == "lora":
        try:
            import peft  # noqa: F401
        except ImportError:
            raise ImportError("train: 'lora' needs peft (pip install 'diffattn[distill]')") from None
    for name in handle.installed:
        layer, roles = handle._layers[name], _layer_info(handle, name).weights
        wanted = modules_of(layer.attn, layer.family.hands_over)
        if not wanted or set(roles) != set(wanted):
            raise ValueError(
                f"train: got {settings.train!r}, but of the projections {', '.join(wanted or ROLES[:4])} of layer "
                f"{name} a core can have {', '.join(roles) or 'none'} here; expected 'core', or layers "
                "without it"
            )


def make_trainable(handle: PatchHandle, settings: Settings) -> None:
    """Give each core what it trains, in float32. Everything else of the model stays frozen."""
    torch.manual_seed(settings.seed)  # low-rank updates begin with random numbers
    for name, processor in handle.installed.items():
        core = processor.core
        if settings.train != "core":
            layer = _layer_info(handle, name)
            core.own(layer, list(layer.weights))
        processor.requires_grad_(True)
        if settings.train == "lora":
            _add_lora(core.projections, settings.rank)
        for parameter in processor.parameters():
            # Small steps are lost in the rounding of half precision; autocast computes in it all the same.
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def merge(handle: PatchHandle) -> None:
    """Add the low-rank updates to the weights that they update."""
    for processor in handle.installed.values():
        projections = processor.core.projections
        for role, module in {} if projections is None else dict(projections).items():
            if hasattr(module, "lora_A"):
                module.get_base_layer().float()  # an update may be less than a rounding of half precision
                module.merge()
                projections[role] = module.get_base_layer()


def settle(handle: PatchHandle) -> None:
    """Freeze the student and bring it to the dtype that its layers compute in, as `patch` leaves a processor."""
    for name, processor in handle.installed.items():
        processor.requires_grad_(False).to(_dtype(handle, name))


def _dtype(handle: PatchHandle, name: str) -> torch.dtype:
    """Of the layer's own weights, which the processor's are not."""
    attn = handle._layers[name].attn
    own = {id(p) for p in handle.installed[name].parameters()}
    found = (p.dtype for p in attn.parameters() if p.is_floating_point() and id(p) not in own)
    return next(found, torch.float32)


def _add_lora(projections: nn.ModuleDict, rank: int) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(projections))
    inject_adapter_in_model(config, projections)
    for name, parameter in projections.named_parameters():
        parameter.requires_grad_("lora_" in name)


def _layer_info(handle: PatchHandle, name: str) -> Any:
    layer = handle._layers[name]
    return layer.family.layer_info(layer.attn)
