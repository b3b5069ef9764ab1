"""Teacher and student in one model: the same weights, stock processors or diffattn's."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diffattn.patch import PatchHandle


class Pair:
    """A patched denoiser whose stock processors, which `patch` keeps, make it its own teacher.

    The student is what is installed; `teacher()` puts the stock processors back for the length of a `with` block.

    Args:
        denoiser: the model whose layers were patched.
        handle: what `patch` returned.
    """

    def __init__(self, denoiser: nn.Module, handle: PatchHandle):
        self.denoiser = denoiser
        self.layers = {name: handle._layers[name] for name in handle.installed}
        self.students = dict(handle.installed)
        self.names = list(self.students)

    @contextlib.contextmanager
    def teacher(self) -> Iterator[None]:
        for layer in self.layers.values():
            layer.restore()
        try:
            yield
        finally:
            for name, layer in self.layers.items():
                layer.install(self.students[name])

    @contextlib.contextmanager
    def _student_of(self, name: str) -> Iterator[None]:
        self.layers[name].install(self.students[name])
        try:
            yield
        finally:
            self.layers[name].restore()

    @contextlib.contextmanager
    def _listening(self, hear: Any) -> Iterator[None]:
        """Call `hear(name, attn, args, kwargs, output)` after each of the patched layers' first call."""
        heard: set[str] = set()

        def hook_of(name):
            def hook(attn, args, kwargs, output):
                if name not in heard:  # gradient checkpointing calls a layer again
                    heard.add(name)
                    hear(name, attn, args, kwargs, output)

            return hook

        handles = [
            layer.attn.register_forward_hook(hook_of(name), with_kwargs=True) for name, layer in self.layers.items()
        ]
        try:
            yield
            if missing := [name for name in self.layers if name not in heard]:
                raise ValueError(f"layers: {missing[0]} was patched, and the denoiser did not call it")
        finally:
            for handle in handles:
                handle.remove()

    def layer_losses(self, inputs: dict[str, Any]) -> Tensor:
        """Stage 1: each student layer on the very input of its teacher layer, (layers,), in one teacher pass.

        loss_l = sum (student_l(x_l) - teacher_l(x_l))^2 / sum teacher_l(x_l)^2, so that a loss of 1 is as bad as
        returning 0, whatever the layer.
        """
        losses: dict[str, Tensor] = {}

        def hear(name, attn, args, kwargs, output):
            with self._student_of(name), torch.enable_grad():
                losses[name] = relative_error(attn.forward(*args, **kwargs), output)

        with self.teacher(), torch.no_grad(), self._listening(hear):
            self.denoiser(**inputs)
        return torch.stack([losses[name] for name in self.names])

    def model_losses(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Stage 2: the relative errors of the prediction, (), and of every layer's output, (layers,), of two passes.

        Here a student layer sees what the student layers before it made.
        """
        taught: dict[str, Any] = {}
        shown: dict[str, Any] = {}

        def into(outputs):
            return lambda name, attn, args, kwargs, output: outputs.update({name: output})

        with self.teacher(), torch.no_grad(), self._listening(into(taught)):
            expected = prediction(self.denoiser(**inputs))
        with self._listening(into(shown)):
            loss = relative_error(prediction(self.denoiser(**inputs)), expected)
        # Compared out here: inside a block that gradient checkpointing runs twice it would have to happen twice.
        return loss, torch.stack([relative_error(shown[name], taught[name]) for name in self.names])


def prediction(output: Any) -> Tensor:
    """The tensor of samples in what a denoiser returns."""
    return output if isinstance(output, Tensor) else output[0]


def relative_error(output: Any, expected: Any) -> Tensor:
    """Sum of squared differences over sum of squares, in float32. Layers of two streams return two tensors."""
    pairs = [(output, expected)] if isinstance(output, Tensor) else list(zip(output, expected, strict=True))
    pairs = [(one.float(), other.float()) for one, other in pairs if one is not None]
    squares = sum(other.square().sum() for _, other in pairs)
    return sum((one - other).square().sum() for one, other in pairs) / squares.clamp_min(1e-20)
