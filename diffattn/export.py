"""Models as ONNX files, checked in ONNX Runtime: `to_onnx`."""

import contextlib
import inspect
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffattn._versions import in_dtype
from diffattn.export_models import SAMPLE_INPUTS, STABLE_AUDIO_AXES
from diffattn.export_operators import translations
from diffattn.kernels._backend import onnx_attention
from diffattn.layers import DENOISERS, find_layers
from diffattn.patch import patched
from diffattn.traceable import traceable

#: A file of more bytes of weights keeps them beside it: protobuf, which ONNX files are, ends at 2 GiB.
EXTERNAL_BYTES = 1 << 30
TOLERANCE = 1e-4

_PICTURE = {0: "batch", 2: "height", 3: "width"}
_TEXT = {0: "batch", 1: "text"}
#: Axes that may change, by input and its number of dimensions; of other inputs the batch alone.
AXES = {
    ("sample", 4): _PICTURE,
    ("hidden_states", 4): _PICTURE,
    ("hidden_states", 5): {0: "batch", 2: "frames", 3: "height", 4: "width"},
    ("encoder_hidden_states", 3): _TEXT,
    ("encoder_attention_mask", 2): _TEXT,
    ("encoder_mask", 2): _TEXT,
}
#: The same for classes whose inputs have dimensions of their own.
AXES_OF = {"StableAudioDiTModel": STABLE_AUDIO_AXES}


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
    if streaming:
        from diffattn.export_streaming import to_onnx_streaming

        samples, training = _samples(model, sample_inputs), model.training
        model.eval()
        try:
            return to_onnx_streaming(
                model, path, sample_inputs=samples, dynamic=dynamic, opset=opset, check=check, say=say
            )
        finally:
            model.train(training)
    inputs, fixed = _flatten(model, _samples(model, sample_inputs))
    axes = _axes(inputs, dynamic, AXES_OF.get(type(model).__name__, {}))

    if opset is not None and (not isinstance(opset, int) or opset < 18):
        raise ValueError(f"opset: got {opset!r}, expected 18 or more, or None")
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            with _exact(model):
                program = _export(model, inputs, fixed, axes, opset, say)
            external = sum(w.numel() * w.element_size() for w in weights) > EXTERNAL_BYTES
            program.save(path, external_data=external)
            megabytes = sum(f.stat().st_size for f in (path, Path(f"{path}.data")) if f.exists()) / 1e6
            say(f"wrote {path}, {megabytes:.1f} MB{', weights beside it' if external else ''}")
            if check:
                _compare(path, model, inputs, fixed, axes, say)
    finally:
        model.train(training)
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


Key = tuple[str | int, ...]  # ("sample",), ("added_cond_kwargs", "time_ids"), ("rotary_embedding", 0)
COMPLEX = "real and imaginary"  # ("image_rotary_emb", COMPLEX): a last dimension of 2


def label(key: Key) -> str:
    """The name of an input of the graph."""
    last = key[-1]
    return key[0] if last == COMPLEX else f"{key[0]}_{last}" if isinstance(last, int) else last


def _flatten(model: nn.Module, samples: dict[str, Any]) -> tuple[dict[Key, Tensor], dict[str, Any]]:
    """Tensors by where they are, on the model's device, and all that is none."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    found, fixed = {}, {}
    for name, value in samples.items():
        pairs = {(name,): value}
        if isinstance(value, dict):
            pairs = {(name, k): v for k, v in value.items()}
        elif isinstance(value, (tuple, list)):
            pairs = {(name, i): v for i, v in enumerate(value)}
        elif isinstance(value, Tensor) and value.is_complex():
            pairs = {(name, COMPLEX): torch.view_as_real(value)}
        if pairs and all(isinstance(t, Tensor) for t in pairs.values()):
            for key, t in pairs.items():
                found[key] = t.to(weight.device, weight.dtype if t.is_floating_point() else t.dtype)
        elif name != "return_dict":
            fixed[name] = value
    if not found:
        raise ValueError("sample_inputs: holds no tensor")
    return found, fixed


def _unflatten(keys, tensors, real: bool = False) -> dict[str, Any]:
    """The arguments that `_flatten` took apart; `real` leaves complex ones as pairs, for one-graph forwards."""
    arguments: dict[str, Any] = {}
    for key, t in zip(keys, tensors, strict=True):
        if len(key) == 1:
            arguments[key[0]] = t
        elif key[1] == COMPLEX:
            arguments[key[0]] = t if real else torch.view_as_complex(t)
        else:
            arguments.setdefault(key[0], {})[key[1]] = t
    for name, value in arguments.items():
        if isinstance(value, dict) and 0 in value:
            arguments[name] = tuple(value[i] for i in range(len(value)))
    return arguments


def _size(axis: str, sizes: dict[str, Any]) -> Any:
    """The size of `length` or of `length + 1`."""
    name, _, more = axis.partition(" + ")
    return sizes[name] + int(more or 0)


def _axes(inputs: dict[Key, Tensor], dynamic: bool | dict, own: dict[str, dict]) -> dict[Key, dict[int, str]]:
    if isinstance(dynamic, dict):
        names = {label(key): key for key in inputs}
        if unknown := sorted(set(dynamic) - set(names)):
            raise ValueError(f"dynamic: {', '.join(unknown)} is no input; there are {', '.join(names)}")
        axes = {key: dict(dynamic.get(name, {})) for name, key in names.items()}
    elif dynamic is True:
        batch = next(iter(inputs.values())).shape[0]
        rest = {key: {0: "batch"} if t.dim() and t.shape[0] == batch else {} for key, t in inputs.items()}
        axes = {k: own.get(label(k), AXES.get((label(k), t.dim()), rest[k])) for k, t in inputs.items()}
    elif dynamic is False:
        axes = {key: {} for key in inputs}
    else:
        raise TypeError(f"dynamic: got {dynamic!r}, expected True, False or {{input: {{dimension: axis}}}}")
    sizes: dict[str, int] = {}
    for key, d, axis in _named(axes):
        name, t = label(key), inputs[key]
        if not 0 <= d < t.dim():
            raise ValueError(f"dynamic: {name} has {t.dim()} dimensions, got {d}")
        size = t.shape[d]
        if sizes.setdefault(axis, size) != size:
            raise ValueError(f"sample_inputs: {axis} is {size} in {name} and {sizes[axis]} in another input")
        if size < 2:
            raise ValueError(f"sample_inputs: {axis} is {size} in {name}, expected 2 or more: 1 is fixed")
    for axis, size in sizes.items():
        if not re.fullmatch(r"\w+( \+ \d+)?", axis) or axis.partition(" + ")[0] not in sizes:
            raise ValueError(
                f"dynamic: got the axis {axis!r}, expected a name, or a name of another axis as 'name + 1'"
            )
        if _size(axis, sizes) != size:
            raise ValueError(f"sample_inputs: {axis} is {size}, expected {_size(axis, sizes)}")
    return axes


def _named(axes: dict[Key, dict[int, str]]) -> list[tuple[Key, int, str]]:
    return [(key, d, axis) for key, named in axes.items() for d, axis in named.items()]


@contextlib.contextmanager
def _exact(model: nn.Module) -> Iterator[None]:
    """Exact processors in the place of stock ones that are not torch's own attention."""
    stock = {layer.name for layer in find_layers(model) if layer.family and not layer.patched}
    with patched(model, layers=lambda name, attn: name in stock) if stock else contextlib.nullcontext():
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
        for key, d, axis in _named(self.axes):
            torch._check(sizes.setdefault(axis, given[key].shape[d]) == given[key].shape[d])
        for axis, size in sizes.items():
            torch._check(_size(axis, sizes) == size)
        return self.model(**_unflatten(self.keys, tensors, real=True), **self.fixed, return_dict=False)[0]


def _export(model, inputs, fixed, axes, opset, say):
    started = time.perf_counter()
    free = torch.export.Dim.DYNAMIC
    shapes = (tuple({d: free for d in axes[key]} for key in inputs),)
    call = _Call(model, inputs, fixed, axes).eval()
    try:
        say(f"1/2 tracing {type(model).__name__}, and translating it")
        # Not torch.export first: the kernels have to know that the graph is for ONNX.
        table = translations(opset)
        with onnx_attention(bool(table)):
            program = torch.onnx.export(
                call,
                tuple(inputs.values()),
                dynamic_shapes=shapes,
                input_names=[label(key) for key in inputs],
                output_names=["out"],
                opset_version=opset,
                custom_translation_table=table,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # torch raises whatever it hits, in a wrapper or not
        last = str(error.__cause__ or error).strip() or type(error).__name__
        raise ExportError(f"{type(model).__name__} cannot be exported: {last}") from error
    nodes = list(program.model.graph)
    if foreign := sorted({f"{n.domain}::{n.op_type}" for n in nodes if n.domain not in ("", "ai.onnx")}):
        raise ExportError(f"{type(model).__name__} needs operators that are not ONNX's own: {', '.join(foreign)}")
    _name_axes(program.model.graph, axes.values())
    say(f"2/2 {len(nodes)} nodes, opset {program.model.opset_imports['']} ({time.perf_counter() - started:.0f} s)")
    return program


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

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    wrong = []
    for i, sizes in enumerate(_other_sizes(inputs, axes)):
        fresh = resized(inputs, axes, sizes, seed=i)
        what = ", ".join(f"{axis} {size}" for axis, size in sizes.items()) or "the traced sizes"
        expected = model(**_unflatten(fresh, fresh.values()), **fixed, return_dict=False)[0].cpu()
        try:
            known = {value.name for value in session.get_inputs()}
            feed = {label(key): t.cpu().numpy() for key, t in fresh.items() if label(key) in known}
            ours = torch.from_numpy(session.run(None, feed)[0])
        except Exception as error:  # ONNX Runtime has an exception class for each of its codes
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


def _other_sizes(inputs, axes) -> list[dict[str, int]]:
    """Three choices of sizes, none of them traced. Pictures stay multiples of what height and width share."""
    every = {axis: inputs[key].shape[d] for key, d, axis in _named(axes)}
    traced = {axis: size for axis, size in every.items() if " + " not in axis}
    step = math.gcd(*(traced[axis] for axis in ("height", "width") if axis in traced))
    choices = []
    for i in range(3):
        sizes = {axis: 2 * size if i else size for axis, size in traced.items()}  # of axes with other names
        for axis, add in (("height", i != 1), ("width", i != 0)):
            if axis in traced:
                sizes[axis] = traced[axis] + step * add
        if "batch" in traced:
            sizes["batch"] = i + 1
        if "text" in traced:
            sizes["text"] = traced["text"] + (5, 2, -1)[i]
        choices.append({axis: _size(axis, sizes) for axis in every})
    return choices


def resized(inputs, axes, sizes, seed: int) -> dict[Key, Tensor]:
    """Tensors of other sizes, with numbers like those of the samples."""
    generator = torch.Generator().manual_seed(seed)
    fresh = {}
    for key, t in inputs.items():
        shape = [sizes.get(axes[key].get(d), size) for d, size in enumerate(t.shape)]
        if t.is_floating_point():
            spread = t.float().std(correction=0) if t.numel() > 1 else 1.0
            new = t.float().mean().cpu() + torch.randn(shape, generator=generator) * float(spread)
        elif "mask" in label(key):  # right padding, of the last prompt alone
            new = torch.ones(shape)
            new[-1, shape[-1] - shape[-1] // 3 :] = 0
        else:
            new = torch.randint(int(t.min()), int(t.max()) + 1, shape, generator=generator)
        fresh[key] = new.to(t.device, t.dtype)
    return fresh
