"""How near converted attention is to the attention that it replaces, layer by layer, with a model's weights."""

import contextlib
import inspect
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffattn._errors import CANNOT_LOAD, first_line
from diffattn._versions import in_dtype
from diffattn.cores import AttentionCore
from diffattn.inspect import Inspection
from diffattn.inspect_inputs import Inputs
from diffattn.layers import Layer, is_autoencoder
from diffattn.patch import PatchHandle, patch

STEPS = 4
PROMPT = "a cat with heart eyes"


def measure_fidelity(
    target: Any,
    run: Callable[[], Any],
    core: AttentionCore | str | None = None,
    *,
    layers: Any = None,
    weights: str | None = None,
) -> dict[str, float]:
    """Relative error of each converted layer's output, on what the stock model gives that layer.

    error_l = |student_l(x) - teacher_l(x)| / |teacher_l(x)|, Frobenius norms over all calls of the layer in `run`

    x are the teacher's: errors of the layers before are not in it. 0 is the teacher, 1 as bad as returning 0. The
    output is the attention module's, after its output projection.

    Args:
        target: a pipeline or model; patched, it is unpatched for this and left so.
        run: a call that runs it, on pictures or noise.
        core, layers, weights: as `patch` takes them.

    Returns: layer -> error. Layers that `run` did not reach are missing.
    Raises: what `patch` and `run` raise; the model is stock then.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="diffattn: ", category=UserWarning)
        handle = patch(target, core, layers=layers, weights=weights)
    try:
        with _comparing(handle) as sums, torch.no_grad():
            run()
    finally:
        handle.undo()
    return {name: (squares[0] / squares[1]) ** 0.5 for name, squares in sums.items()}


@contextlib.contextmanager
def _comparing(handle: PatchHandle) -> Iterator[dict[str, list[float]]]:
    """Stock attention, and beside each call of it the converted one on the same inputs."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    layers, students = handle._layers, handle.installed

    def hook_of(name: str, layer: Layer):
        def hook(attn, args, kwargs, teacher):
            layer.install(students[name])
            try:
                student = attn.forward(*args, **kwargs)
            finally:
                layer.restore()
            for ours, theirs in zip(_tensors(student), _tensors(teacher), strict=True):
                sums[name][0] += (ours.double() - theirs.double()).square().sum().item()
                sums[name][1] += theirs.double().square().sum().item()

        return hook

    hooks = []
    for name, layer in layers.items():
        layer.restore()
        hooks.append(layer.attn.register_forward_hook(hook_of(name, layer), with_kwargs=True))
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [t for t in output if t is not None]


def load(source: str | Path) -> Any:
    """A pipeline, or a model, with its weights, in float32, on the GPU if there is one.

    Raises: ValueError, OSError: `source` is no folder or hub id with weights.
    """
    import diffusers

    if isinstance(getattr(diffusers, str(source), None), type):
        raise ValueError(f"{source}: fidelity is measured with weights: name a folder or hub id, not a class")
    try:
        if Path(source).is_dir() and not (Path(source) / "model_index.json").is_file():
            loaded = diffusers.AutoModel.from_pretrained(source, torch_dtype=torch.float32)
        else:
            loaded = diffusers.DiffusionPipeline.from_pretrained(source, **in_dtype(torch.float32))
            loaded.set_progress_bar_config(disable=True)
    except CANNOT_LOAD as error:
        raise ValueError(f"{source}: its weights cannot be loaded: {first_line(error)}") from None
    return loaded.to("cuda" if torch.cuda.is_available() else "cpu")


def runner(target: Any, prompt: str, height: int | None, width: int | None) -> tuple[Callable[[], Any], str]:
    """A call that runs a pipeline on a prompt, or a model on noise, and what that is in words."""
    if isinstance(target, nn.Module):
        return lambda: target(**noise_for(target, height, width)), "noise in place of latents and text"
    names = inspect.signature(type(target).__call__).parameters
    if "prompt" not in names:
        raise ValueError(f"{type(target).__name__} takes no prompt: name the folder of its model")
    options = {"num_inference_steps": STEPS, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    options |= {"height": height, "width": width}
    options = {name: value for name, value in options.items() if name in names and value is not None}

    def run():
        options["generator"].manual_seed(0)
        return target(prompt, **options)

    return run, f"{STEPS} steps of {prompt!r}"


def noise_for(model: nn.Module, height: int | None, width: int | None) -> dict[str, Any]:
    """Arguments of a model's forward at a size, random where they are latents or text, as its weights' device."""
    if is_autoencoder(model):
        raise ValueError(f"{type(model).__name__} is no denoiser: there is nothing to convert")
    generator = torch.Generator().manual_seed(0)
    like = next(model.parameters())

    def real(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: real(key, v) for key, v in value.items()}
        if isinstance(value, list) and value and isinstance(value[0], Tensor):
            return [real(name, v) for v in value]
        if not isinstance(value, Tensor):
            return value
        if not value.is_floating_point():
            return torch.ones(value.shape, dtype=value.dtype, device=like.device)  # masks and classes
        if "ids" in name:
            return torch.randint(64, value.shape, generator=generator).to(like)
        if value.dim() == 1:
            return torch.full(value.shape, 0.5 if name in ("t", "guidance") else 500.0).to(like)
        return torch.randn(value.shape, generator=generator).to(like)

    arguments = next(Inputs(model, height, width).variants())
    return {name: real(name, value) for name, value in arguments.items()}


def add_fidelity(
    inspection: Inspection,
    source: str | Path,
    core: AttentionCore | str | None = None,
    *,
    layers: Any = None,
    weights: str | None = None,
    prompt: str = PROMPT,
    height: int | None = None,
    width: int | None = None,
) -> Inspection:
    """What `inspect_model` found of a folder or hub id, with each row's `error`: `measure_fidelity` on its weights."""
    target = load(source)
    run, words = runner(target, prompt, height, width)
    errors = measure_fidelity(target, run, core, layers=layers, weights=weights)
    rows = [replace(row, error=errors.get(row.name)) for row in inspection.rows]
    return replace(inspection, rows=rows, measured_on=words)
