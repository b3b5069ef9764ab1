"""Plug-ins that leave processors alone: put on before or after the patch they act alike, and as on stock."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

import diffattn
from tests.plugins.common import PATCHES, error, load_lora, out, processors

pytestmark = pytest.mark.filterwarnings("ignore:diffattn. .* another mechanism")


@dataclass(frozen=True)
class Plugin:
    """What is called on a model, what takes it back, and what must come of it.

    Attributes:
        on: called with the model and its tiny description.
        off: called with the model; None: the plug-in has no undo.
        acts: whether the output changes.
        models: the patches that it is tested with.
        undo_error: how far the model may be from what it was, where stock is not bitwise after `off` either.
    """

    name: str
    on: Callable
    off: Callable | None = None
    acts: bool = True
    models: tuple[str, ...] = tuple(PATCHES)
    undo_error: float = 0.0


def set_two_adapters(model, tiny):
    load_lora(model, tiny, 1, "one")
    load_lora(model, tiny, 2, "two")
    model.set_adapters(["one", "two"], weights=[0.5, -1.0])


def fuse(model, tiny):
    load_lora(model, tiny)
    model.fuse_lora(lora_scale=0.7)


def unfuse(model):
    model.unfuse_lora()
    model.unload_lora()


def swap(model, tiny):
    load_lora(model, tiny, 1)
    load_lora(model, tiny, 2, hotswap=True)


def delete_one(model, tiny):
    load_lora(model, tiny, 1, "one")
    load_lora(model, tiny, 2, "two")
    model.delete_adapters("one")
    model.set_adapters("two")


def disable(model, tiny):
    load_lora(model, tiny)
    model.disable_lora()


def cpu_offload(model, tiny):
    from accelerate import cpu_offload

    cpu_offload(model, execution_device=torch.device("cpu"))


def remove_accelerate(model):
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(model, recurse=True)


CPU = dict(onload_device=torch.device("cpu"), offload_device=torch.device("cpu"))


def needs_an_accelerator():
    """Group offloading asks torch for one, of which torch 2.6 has none on a CPU, nor None."""
    if torch.__version__.startswith("2.6") and not torch.accelerator.is_available():
        pytest.skip("torch 2.6 cannot tell diffusers that there is no accelerator")


def offload_blocks(model, tiny):
    needs_an_accelerator()
    model.enable_group_offload(offload_type="block_level", num_blocks_per_group=1, **CPU)


def offload_leaves(model, tiny):
    needs_an_accelerator()
    model.enable_group_offload(offload_type="leaf_level", **CPU)


def remove_group_offload(model):
    from diffusers.hooks import HookRegistry
    from diffusers.hooks.group_offloading import _GROUP_OFFLOADING

    for module in model.modules():
        if hasattr(module, "_diffusers_hook"):
            HookRegistry.check_if_exists_or_initialize(module).remove_hook(_GROUP_OFFLOADING, recurse=False)


def layerwise_casting(model, tiny):
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def channels_last(model, tiny):
    model.to(memory_format=torch.channels_last)


def free_u(model, tiny):
    model.enable_freeu(s1=0.5, s2=0.2, b1=1.5, b2=1.7)


UNETS = ("unet-softmax", "unet-linear", "unet-learned")


def unload(model):
    model.unload_lora()


PLUGINS = [
    Plugin("lora", load_lora, unload),
    Plugin("lora-set_adapters", set_two_adapters, unload),
    Plugin("lora-fuse", fuse, unfuse, undo_error=1e-5),
    Plugin("lora-hotswap", swap, unload),
    Plugin("lora-delete", delete_one, unload),
    Plugin("lora-disable", disable, unload, acts=False),
    Plugin("accelerate-cpu_offload", cpu_offload, remove_accelerate, acts=False),
    Plugin("group_offload-block", offload_blocks, remove_group_offload, acts=False),
    Plugin("group_offload-leaf", offload_leaves, remove_group_offload, acts=False),
    # Pooled weights: of rounded ones, or rounded themselves.
    Plugin(
        "layerwise_casting", layerwise_casting, models=tuple(name for name in PATCHES if not name.endswith("-mqa"))
    ),
    Plugin("gradient_checkpointing", lambda m, t: m.enable_gradient_checkpointing(), acts=False),
    Plugin("freeu", free_u, lambda m: m.disable_freeu(), models=UNETS),
    Plugin("channels_last", channels_last, acts=False, models=UNETS),
]
CASES = [pytest.param(p, name, id=f"{p.name}-{name}") for p in PLUGINS for name in p.models]


@pytest.mark.parametrize("plugin, patch", CASES)
def test_acts_as_on_stock_in_either_order(plugin, patch):
    tiny, core, exact = PATCHES[patch]
    stock, before, after = tiny.model(), tiny.model(), tiny.model()
    plain = out(tiny, stock)
    plugin.on(stock, tiny)
    expected = out(tiny, stock)

    had = processors(after)
    installed = diffattn.patch(after, core()).installed.keys()
    patched = out(tiny, after)
    plugin.on(after, tiny)
    plugin.on(before, tiny)
    diffattn.patch(before, core())
    assert diffattn.status(after).installed.keys() == diffattn.status(before).installed.keys() == installed
    ours = out(tiny, after)
    assert error(out(tiny, before), ours) <= 1e-6
    if exact:
        assert error(ours, expected) <= 1e-5
    assert (error(ours, patched) > 1e-3) == plugin.acts

    diffattn.unpatch(after)
    assert torch.equal(out(tiny, after), expected)
    assert processors(after) == had
    if plugin.off:
        plugin.off(after)
        assert error(out(tiny, after), plain) <= plugin.undo_error
        diffattn.patch(after, core())
        assert error(out(tiny, after), patched) <= plugin.undo_error
