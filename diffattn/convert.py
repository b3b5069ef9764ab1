"""The end of a conversion: `finalize` drops the projections that a core's own stand in for."""

from typing import Any

from torch import nn

from diffattn.layers import Layer, find_layers, models_of
from diffattn.processors.projections import modules_of
from diffattn.running import refuse_if_running


def finalize(target: Any) -> int:
    """Drop the layers' own projections where the installed cores call theirs, and the memory with them.

    Afterwards these layers cannot be unpatched or patched with another core; layers whose cores call the layer's
    projections still can, on their own. `status(target)` says which layers are finalized. LoRA on a dropped projection
    cannot be loaded any more (peft says which module), on others it can. Calling it again changes nothing.

    The model's state dict then has the cores' projections (`...attn1.processor.core.projections.k.weight`) in place of
    the dropped ones (`...attn1.to_k.weight`), so what `save_pretrained` writes is no stock model, and
    `from_pretrained` cannot restore it. Save with `save_weights`, before or after, and restore with `from_pretrained`
    of the original model, `patch(..., weights=...)` and `finalize`.

    Args:
        target: a patched pipeline or model.

    Returns: bytes of the parameters that were dropped; memory that something else holds on to (another model that
        shares them, a variable) stays.

    Raises:
        ValueError: nothing is patched, or a projection has adapters or is offloaded: nothing is dropped then.
        RuntimeError: another thread is running the model.
    """
    layers = [layer for layer in find_layers(target) if layer.patched]
    if not layers:
        raise ValueError(f"target: {type(target).__name__} has no diffattn processor installed: nothing to finalize")
    found = [(layer, path) for layer in layers for path in _replaced(layer)]
    for layer, path in found:
        _check(layer, path)
    refuse_if_running(models_of(target).values(), "finalize")
    dropped = 0
    for layer, path in found:
        layer.attn.__dict__[layer.record("finalized")] = True  # first: an interruption must not leave it to unpatch
        module = layer.attn.get_submodule(path)
        dropped += sum(p.numel() * p.element_size() for p in module.parameters())
        parent, _, name = path.rpartition(".")
        setattr(layer.attn.get_submodule(parent), name, Dropped(f"{layer.name}.{path}", module))
    return dropped


def _replaced(layer: Layer) -> list[str]:
    """The layer's projections that its core's own stand in for, less those dropped already."""
    own = layer.processor.core.projections or {}
    found = modules_of(layer.attn, layer.processor.hands_over)
    return [path for role, (path, module) in found.items() if role in own and not isinstance(module, Dropped)]


def _check(layer: Layer, path: str) -> None:
    module = layer.attn.get_submodule(path)
    if hasattr(module, "base_layer"):
        raise ValueError(
            f"target: {layer.name}.{path} has adapters ({', '.join(getattr(module, 'active_adapters', []))}), which "
            "act through it. Unload them first, or stay without finalize; they cannot be loaded after it"
        )
    hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    if getattr(module, "_hf_hook", None) is not None or "group_offloading" in hooks:
        raise ValueError(f"target: {layer.name}.{path} is offloaded: finalize the model first, then offload it")


class Dropped(nn.Module):
    """Where a projection was that `finalize` dropped. It keeps its widths, from which some layers know theirs."""

    def __init__(self, name: str, module: nn.Linear):
        super().__init__()
        self.name = name
        self.in_features, self.out_features = (getattr(module, n, None) for n in ("in_features", "out_features"))

    def forward(self, *args, **kwargs):
        raise RuntimeError(self._why())

    def __getattr__(self, name):
        if name in ("weight", "bias"):
            raise AttributeError(f"{name}: {self._why()}")
        return super().__getattr__(name)

    def _why(self) -> str:
        return (
            f"{self.name} was dropped by diffattn.finalize(): the attention core has a projection of its own in its "
            "place. Load the model anew to get it back"
        )

    def extra_repr(self) -> str:
        return f"{self.name}, by diffattn.finalize()"
