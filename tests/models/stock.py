"""What stock makes of the tiny models, computed once, and what the tests of them share."""

import fnmatch
import functools
from dataclasses import dataclass

import torch
from torch.utils._pytree import tree_map

from diffattn.patch import find_layers
from tests.models.base import TinyModel


@dataclass(frozen=True)
class Stock:
    """A model, what stock makes of it, and the first call of each attention layer: arguments and result.

    Tests share it: each takes out what it put in.
    """

    model: torch.nn.Module
    results: tuple[torch.Tensor, ...]
    inference: torch.Tensor
    calls: dict[str, tuple]


@functools.cache
def built(tiny: TinyModel) -> Stock:
    model = tiny.model()
    calls, hooks = {}, []
    for layer in find_layers(model):
        # Cloned before the call, since some processors write into their arguments.
        given = {}

        def before(attn, args, kwargs, given=given):
            given.setdefault("first", copied((args, kwargs)))

        def after(attn, args, kwargs, out, given=given, name=layer.name):
            calls.setdefault(name, (*given["first"], copied(out)))

        module = model.get_submodule(layer.name)
        hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(module.register_forward_hook(after, with_kwargs=True))
    with tiny.reference():
        with torch.no_grad():
            inference = tiny.run(model)
        for hook in hooks:
            hook.remove()
        return Stock(model, run(tiny, model), inference, calls)


def copied(tree):
    return tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, tree)


def run(tiny: TinyModel, model, **changes):
    """Output and gradient."""
    if not tiny.differentiable:
        with torch.no_grad():
            return (tiny.run(model, **changes),)
    model.zero_grad()
    out = tiny.run(model, **changes)
    out.square().mean().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return out.detach(), gradient


def relative_error(ours, stock) -> float:
    return ((ours - stock).norm() / stock.norm()).item()


def layers(model, globs: str | None) -> set[str]:
    patterns = globs.split() if globs else []
    return {layer.name for layer in find_layers(model) if any(fnmatch.fnmatch(layer.name, p) for p in patterns)}


def is_linear(layer) -> bool:
    return _formula(layer) == "linear"


def is_softmax(layer) -> bool:
    return _formula(layer) == "softmax"


def _formula(layer) -> str:
    return layer.family.exact_core(layer.attn).formula(1, 1)[0]
