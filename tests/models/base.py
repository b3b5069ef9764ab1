"""What a tiny model is: a real diffusers class, at a size that runs in milliseconds on a CPU."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn


class Rand:
    """Random inputs from one generator, on its device."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.generator.device)

    def tokens(self, vocabulary: int, *shape: int) -> Tensor:
        return torch.randint(vocabulary, shape, generator=self.generator, device=self.generator.device)


@dataclass(frozen=True, eq=False)
class TinyModel:
    """A model class with a config and inputs.

    Attributes:
        cls: name of the class.
        config: the constructor's arguments; `build` instead, where that is not enough.
        inputs: the arguments of the model's call; `run_model` instead, where that is not enough.
        fused: glob of the layers that an exact patch takes; None: stock is the fast path everywhere.
        converts: globs of the layers that a converted core takes by default; None: it takes none.
        unreachable: glob of the layers with a processor that has no counterpart here.
        unused: globs of the layers that these inputs do not reach.
        pair_mask: inputs to drop for a linear core, which refuses the mask that the model makes of them; None: the
            model makes one of any inputs.
        hides_queries: stock's layers return 0 for padding, which nothing reads; ours attend there.
        padded: names of the text and of its mask, where padding behind the mask reaches no image token.
        differentiable: False where stock has no backward on a CPU.
        reference: a context in which stock computes without a rounding of its own.
        name: tells two configs of one class apart.
        module: where the class is.
        since: version of diffusers whose constructor and call this is for; models of older ones are skipped.
    """

    cls: str
    config: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[[Rand], dict[str, Any]] | None = None
    fused: str | None = None
    converts: str | None = None
    unreachable: str | None = None
    unused: str | None = None
    pair_mask: tuple[str, ...] | None = ()
    hides_queries: bool = False
    padded: tuple[str, str] | None = None
    differentiable: bool = True
    reference: Callable[[], Any] = contextlib.nullcontext
    name: str = ""
    module: str = "diffusers"
    since: str = ""
    build: Callable[[], nn.Module] | None = None
    run_model: Callable[[nn.Module, Rand], Any] | None = None

    def absent(self) -> str | None:
        """Why the installed diffusers cannot make this model; None: it can."""
        import diffusers
        from packaging.version import Version

        if self.since and Version(diffusers.__version__) < Version(self.since):
            return f"{self} is as in diffusers {self.since}, not {diffusers.__version__}"
        return f"diffusers {diffusers.__version__} has no {self.cls}" if self._find() is None else None

    def _find(self) -> type[nn.Module] | None:
        packages = self.module.split(".")
        if not all(find_spec(".".join(packages[:i])) for i in range(1, len(packages) + 1)):
            return None
        return getattr(import_module(self.module), self.cls, None)

    def needed(self) -> None:
        """Skip the test that calls this, by the model's name, where diffusers has no such model."""
        if (reason := self.absent()) is not None:
            import pytest

            pytest.skip(reason)

    def model(self, seed: int = 0) -> nn.Module:
        """The model itself; the test is skipped where diffusers has none."""
        self.needed()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.build() if self.build else self._find()(**self.config)
            # Norms and gates start at 0 or 1, some layers at 0; random ones make every path count.
            for parameter in model.parameters():
                if parameter.dim() <= 1:
                    nn.init.normal_(parameter, 0.5, 0.2)
                elif parameter.numel() and not parameter.any():
                    nn.init.normal_(parameter, 0, parameter.shape[-1] ** -0.5)
        return model.eval()

    def run(self, model: nn.Module, generator: torch.Generator | None = None, **changes: Any) -> Tensor:
        """All numbers that the model returns, flat. `changes`: other inputs; functions are given the input itself."""
        rand = Rand(torch.Generator().manual_seed(1) if generator is None else generator)
        if self.run_model:
            return flat(self.run_model(model, rand))
        inputs = self.inputs(rand)
        for name, change in changes.items():
            inputs[name] = change(inputs[name]) if callable(change) else change
        return flat(model(**inputs))

    def __str__(self) -> str:
        return self.name or self.cls


def flat(out: Any) -> Tensor:
    return torch.cat([t.flatten() for t in tensors(out)])


def tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out.float()]
    if isinstance(out, Mapping):
        out = list(out.values())
    if isinstance(out, (list, tuple)):
        return [t for item in out for t in tensors(item)]
    return []


def text_mask(length: int) -> Tensor:
    """The second of two prompts is three tokens shorter."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, -3:] = 0
    return mask


def two_times() -> Tensor:
    return torch.tensor([3, 500])


def grid(*sizes: int) -> Tensor:
    """Coordinates of a grid, (product of sizes, dimensions)."""
    axes = torch.meshgrid(*(torch.arange(size) for size in sizes), indexing="ij")
    return torch.stack(axes, dim=-1).flatten(0, -2)
