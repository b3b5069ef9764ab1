"""Models as ONNX files, checked in ONNX Runtime: `to_onnx`."""

import contextlib
import inspect
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffattn._errors import first_line
from diffattn._versions import in_dtype
from diffattn.cores import SoftmaxAttention
from diffattn.export_inputs import (
    AXES_OF,
    Key,
    choose_axes,
    flatten,
    label,
    named_axes,
    other_sizes,
    resized,
    size_of,
    unflatten,
)
from diffattn.export_models import SAMPLE_INPUTS
from diffattn.export_operators import has_attention, translations
from diffattn.kernels._backend import onnx_attention
from diffattn.layers import DENOISERS, find_layers
from diffattn.patch import patched
from diffattn.traceable import traceable

#: A file of more bytes of weights keeps them beside it: protobuf, which ONNX files are, ends at 2 GiB.
EXTERNAL_BYTES = 1 << 30
TOLERANCE = 1e-4


class ExportError(RuntimeError):
    """A model that cannot be exported, or a file that does not compute what the model computes."""


def to_onnx(
    model_or_pipe: Any,
    path: str | Path,
    *,
    sample_inputs: dict[str, Any] | None = None,
    dynamic: bool | dict[str, dict[int, str]] = True,
    opset: int | None = None,
    check: bool = True,
    streaming: bool = False,
    progress: Callable[[str], None] | None = lambda line: print(f"diffattn: {line}", file=sys.stderr),
) -> Path:
    """Write a model, or a pipeline's denoiser, as an ONNX file of standard operators, then compare the two.

    Layers that still have their stock processor get their exact one for as long as this takes: some stock ones do
    not export, or give NaN, see docs/export.md. Patched layers are exported as they are.

    Args:
        model_or_pipe: a diffusers model, or a pipeline with one of `unet`, `transformer`, `prior`, `decoder`.
        path: ends in `.onnx`. An existing file is replaced. More than 1 GiB of weights go to `<path>.data`.
        sample_inputs: keyword arguments of the model's call, batch of 2 or more. Tensors become inputs of the graph,
            those in a dict or a tuple too, complex ones as pairs of real numbers; anything else is fixed. None makes
            them of the config, for the classes in `diffattn.export_models.SAMPLE_INPUTS`.
        dynamic: True lets batch, height, width and length of the text change, False nothing; a dict names the axes
            itself, {input: {dimension: axis}}. Dimensions with one axis name are of one size, `length + 1` is one
            more than `length`. Tensors of a tuple are the inputs `name_0`, `name_1`.
        opset: of ONNX. None takes torch's default, which more runtimes know. From 23 on layers with shared key/value
            heads become one Attention operator each, where lower ones write out products and a softmax.
        check: compare ONNX Runtime (CPU) with the model, at three sizes that were not traced (the same one, if
            nothing is dynamic); the largest difference may be 1e-4 of the largest number in the result. float32 only.
        streaming: write one step of `diffattn.streaming` instead: the model called with some frames, whose layers'
            states are inputs and outputs too; `diffattn.export_streaming.describe(path)` lists them. Batch and frames
            (or tokens) of a step may change. The model has to be one that streams.
        progress: told what happens now, in one line; None: nobody is.

    Returns: the path.

    Raises:
        TypeError, ValueError: an argument does not fit, or sample inputs are needed. Nothing was written.
        ExportError: torch cannot export the model; or the file differs: it is kept, and the error says where.
        ImportError: onnx, onnxscript or onnxruntime is missing: `pip install diffattn[export]`.
    """
    say = progress or (lambda line: None)
    path = Path(path)
    if path.suffix != ".onnx":
        raise ValueError(f"path: got {path.name}, expected a file name that ends in .onnx")
    if not path.parent.is_dir():
        raise ValueError(f"path: there is no folder {path.parent}")
    _require("onnx", "onnxscript", *(["onnxruntime"] if check else []))
    model = _denoiser(model_or_pipe)
    weights = [*model.parameters(), *model.buffers()]
    if check and any(w.is_floating_point() and w.dtype != torch.float32 for w in weights):
        raise ValueError("check: the comparison needs a model in float32; use model.float(), or check=False")
    if opset is not None and (not isinstance(opset, int) or opset < 18):
        raise ValueError(f"opset: got {opset!r}, expected 18 or more, or None")
    samples = _samples(model, sample_inputs)
    if streaming:
        from diffattn.export_streaming import to_onnx_streaming

        with _evaluating(model):
            return to_onnx_streaming(
                model, path, sample_inputs=samples, dynamic=dynamic, opset=opset, check=check, say=say
            )
    inputs, fixed = flatten(model, samples)
    axes = choose_axes(inputs, dynamic, AXES_OF.get(type(model).__name__, {}))

    with _evaluating(model), torch.no_grad():
        with _our_processors(model):
            program = _export(model, inputs, fixed, axes, opset, say)
        external = sum(w.numel() * w.element_size() for w in weights) > EXTERNAL_BYTES
        program.save(path, external_data=external)
        megabytes = sum(f.stat().st_size for f in (path, Path(f"{path}.data")) if f.exists()) / 1e6
        say(f"wrote {path}, {megabytes:.1f} MB{', weights beside it' if external else ''}")
        if check:
            _compare(path, model, inputs, fixed, axes, say)
    return path


def load(source: str | Path) -> Any:
    """A pipeline, or a model alone, in float32 on the CPU: where the file is compared.

    Raises: OSError or ValueError, from diffusers, where `source` is neither's folder or hub id.
    """
    from diffusers import AutoModel, DiffusionPipeline

    folder = Path(source)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        return AutoModel.from_pretrained(source, torch_dtype=torch.float32)
    return DiffusionPipeline.from_pretrained(source, **in_dtype(torch.float32))


def _require(*packages: str) -> None:
    import importlib.util

    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"to_onnx needs {', '.join(missing)}: pip install diffattn[export]")


def _denoiser(target: Any) -> nn.Module:
    if isinstance(target, nn.Module):
        return target
    components = getattr(target, "components", None)
    if not isinstance(components, dict):
        raise TypeError(f"model_or_pipe: got {type(target).__name__}, expected a diffusers pipeline or model")
    for name in DENOISERS:
        if isinstance(components.get(name), nn.Module):
            return components[name]
    raise ValueError(
        f"model_or_pipe: {type(target).__name__} has none of {', '.join(DENOISERS)}; pass one model of it"
    )


def _samples(model: nn.Module, given: dict[str, Any] | None) -> dict[str, Any]:
    name = type(model).__name__
    if given is None:
        make = SAMPLE_INPUTS.get(name)
        made = make and make(model.config)
        if not made:
            why = "a config of it that" if make else "a class that"
            raise ValueError(
                f"sample_inputs: {name} is {why} they are not known for; pass the keyword arguments of its call. "
                f"Known are {', '.join(SAMPLE_INPUTS)}"
            )
        return made
    if not isinstance(given, dict):
        raise TypeError(f"sample_inputs: got {type(given).__name__}, expected a dict of the model's keyword arguments")
    if unknown := sorted(set(given) - set(inspect.signature(type(model).forward).parameters)):
        raise ValueError(f"sample_inputs: {name} takes no {', '.join(unknown)}")
    return given


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode; then each part in its own again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def _our_processors(model: nn.Module) -> Iterator[None]:
    """Exact processors in the place of stock ones, and where these are torch's own attention, that of diffattn."""
    with contextlib.ExitStack() as patches:
        for core in (None, SoftmaxAttention()):
            stock = {layer.name for layer in find_layers(model) if layer.family and not layer.patched}
            if stock:
                patches.enter_context(patched(model, core, layers=lambda name, attn, names=stock: name in names))
        yield


class _Call(nn.Module):
    """A model's call with tensors in a row, which says what sizes are equal, and returns its first tensor."""

    def __init__(self, model: nn.Module, keys, fixed, axes):
        super().__init__()
        self.model = traceable(model)
        self.keys, self.fixed, self.axes = list(keys), fixed, axes

    def forward(self, *tensors: Tensor) -> Tensor:
        given = dict(zip(self.keys, tensors, strict=True))
        sizes: dict[str, Any] = {}
        for key, d, axis in named_axes(self.axes):
            torch._check(sizes.setdefault(axis, given[key].shape[d]) == given[key].shape[d])
        for axis, size in sizes.items():
            torch._check(size_of(axis, sizes) == size)
        return _first(self.model(**unflatten(self.keys, tensors, real=True), **self.fixed))


def _first(result: Any) -> Tensor:
    """The tensor that a model returns, alone or before others."""
    while not isinstance(result, Tensor):
        result = result[0]
    return result


def _export(model, inputs, fixed, axes, opset, say):
    started = time.perf_counter()
    free = torch.export.Dim.DYNAMIC
    shapes = (tuple({d: free for d in axes[key]} for key in inputs),)
    call = _Call(model, inputs, fixed, axes).eval()
    try:
        say(f"1/2 tracing {type(model).__name__}, and translating it")
        # Not torch.export first: the kernels have to know that the graph is for ONNX.
        with onnx_attention(has_attention(opset)):
            program = torch.onnx.export(
                call,
                tuple(inputs.values()),
                dynamic_shapes=shapes,
                input_names=[label(key) for key in inputs],
                output_names=["out"],
                opset_version=opset,
                custom_translation_table=translations(opset),
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # torch raises whatever it hits, in a wrapper or not
        last = str(error.__cause__ or error).strip() or type(error).__name__
        raise ExportError(f"{type(model).__name__} cannot be exported: {_fixed(last, axes) or last}") from error
    nodes = list(program.model.graph)
    if foreign := sorted({f"{n.domain}::{n.op_type}" for n in nodes if n.domain not in ("", "ai.onnx")}):
        raise ExportError(f"{type(model).__name__} needs operators that are not ONNX's own: {', '.join(foreign)}")
    _name_axes(program.model.graph, axes.values())
    say(f"2/2 {len(nodes)} nodes, opset {program.model.opset_imports['']} ({time.perf_counter() - started:.0f} s)")
    return program


def _fixed(message: str, axes: dict[Key, dict[int, str]]) -> str | None:
    """What torch says of sizes that the model's own code takes for numbers, with their names."""
    found = re.findall(r"static shape of (\d+) for dimension inputs\['tensors'\]\[(\d+)\]\.shape\[(\d+)\]", message)
    if not found:
        return None
    keys = list(axes)
    which = [f"{axes[keys[int(i)]].get(int(d), d)} of {label(keys[int(i)])}, {size}" for size, i, d in found]
    return f"its forward allows one size alone of {'; '.join(which)}. Pass dynamic=False, or the axes that may change"


def _name_axes(graph, axes) -> None:
    """torch calls sizes s21 or s69; give them the names of their axes, in what is made of them too."""
    names = {}
    for value, named in zip(graph.inputs, axes, strict=True):
        names |= {str(value.shape[d]): axis for d, axis in named.items()}
    for value in [*graph.inputs, *(out for node in graph for out in node.outputs)]:
        for d, size in enumerate(value.shape or ()):
            if not isinstance(size, int) and size.value:
                value.shape[d] = re.sub(r"\bs\d+\b", lambda m: names.get(m[0], m[0]), str(size.value))


def _compare(path: Path, model, inputs, fixed, axes, say) -> None:
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # it has an exception class for each of its codes
        raise ExportError(f"ONNX Runtime cannot load {path} (the file is kept): {first_line(error)}") from error
    wrong = []
    for i, sizes in enumerate(other_sizes(inputs, axes)):
        fresh = resized(inputs, axes, sizes, seed=i)
        what = ", ".join(f"{axis} {size}" for axis, size in sizes.items()) or "the traced sizes"
        try:
            expected = _first(model(**unflatten(fresh, fresh.values()), **fixed)).cpu()
        except Exception as error:
            raise ExportError(
                f"check: {type(model).__name__} itself fails at {what}: {first_line(error)}. Pass dynamic={{input: "
                "{dimension: axis}} with one name for sizes that have to be equal (the file is kept)"
            ) from error
        try:
            known = {value.name for value in session.get_inputs()}
            feed = {label(key): t.cpu().numpy() for key, t in fresh.items() if label(key) in known}
            ours = torch.from_numpy(session.run(None, feed)[0])
        except Exception as error:
            wrong.append(f"{what}: ONNX Runtime failed: {str(error).strip()[:300]}")
            continue
        if ours.shape != expected.shape:
            wrong.append(f"{what}: shape {tuple(ours.shape)}, expected {tuple(expected.shape)}")
            continue
        difference = ((ours - expected).abs().max() / expected.abs().max()).item()
        say(f"{what}: differs by {difference:.1e} of the largest number")
        if not difference <= TOLERANCE:  # NaN is no number that is small enough
            bad = int((~ours.isfinite()).sum())
            wrong.append(f"{what}: differs by {difference:.1e}, more than {TOLERANCE}; {bad} numbers are not finite")
    if wrong:
        raise ExportError(
            f"{path} is not what {type(model).__name__} computes (the file is kept):\n" + "\n".join(wrong)
        )
