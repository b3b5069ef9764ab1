"""Models that `patch(..., compile=...)` compiles, in place, and how they run eagerly again."""

from typing import Any

import torch
from torch import nn

from diffattn.layers import DENOISERS, models_of
from diffattn.traceable import traceable

# Attribute of a module that patch(compile=...) compiled.
COMPILED = "_diffattn_compiled"


def compile_models(target: Any, mode: str) -> None:
    """Compile a model, or a pipeline's denoisers, in place: the repeated blocks or the whole."""
    for name, model in models_of(target).items():
        if name and not name.startswith(DENOISERS):
            continue
        if mode == "full":
            whole = traceable(model)
            if whole is model:
                model.compile(fullgraph=True)
            else:  # as nn.Module.compile does it, with another forward
                model._compiled_call_impl = torch.compile(whole._call_impl, fullgraph=True)
        elif not getattr(model, "_repeated_blocks", None):
            raise ValueError(
                f"compile: got 'regional', but diffusers names no repeated blocks of {type(model).__name__}; "
                "expected 'full' for this model, or None"
            )
        else:
            model.compile_repeated_blocks(fullgraph=True)


def compiled(target: Any) -> list[nn.Module]:
    return [m for model in models_of(target).values() for m in model.modules() if m._compiled_call_impl is not None]


def uncompile(modules: list[nn.Module]) -> None:
    for module in modules:
        module._compiled_call_impl = None
        module.__dict__.pop(COMPILED, None)
