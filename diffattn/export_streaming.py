"""One step of a stream as an ONNX graph, its memory as inputs and outputs: `to_onnx(..., streaming=True)`."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffattn._errors import first_line
from diffattn.cores import CausalState
from diffattn.export import ExportError, _name_axes, _require
from diffattn.export_inputs import flatten, label, unflatten
from diffattn.export_operators import has_attention, translations
from diffattn.kernels._backend import onnx_attention
from diffattn.stream_layers import rotate
from diffattn.streaming import _RUNNING, Stream, streaming

#: What the file's metadata are found under: a JSON list of {name, input, output, shape, dtype}.
METADATA = "diffattn.states"
FRAME = "frame"
TOLERANCE = 1e-4
# Axes that may change, by the number of dimensions of an input that comes frame by frame.
TIME_AXES = {5: {0: "batch", 2: "frames"}, 3: {0: "batch", 1: "tokens"}}


def to_onnx_streaming(
    model, path, *, sample_inputs, dynamic=True, opset=None, check=True, say=lambda line: None
) -> Path:
    """`to_onnx` with streaming=True. Arguments and errors as there, checked there.

    Inputs: those of the model, then `frame`, the number of frames seen (where a rotary embedding counts them, up to
    the rows of its table), then the memory of each layer, zeros to begin with. Outputs: `out`, then that memory after
    the step.
    """
    _require("onnx", "onnxscript", *(["onnxruntime"] if check else []))
    inputs, fixed = flatten(model, sample_inputs)
    first = next(iter(inputs))
    axes = _axes(inputs, first, dynamic)
    with streaming(model, None) as stream, torch.no_grad():
        stream(**unflatten(inputs, inputs.values()), **fixed)
        names = _memory_names(stream)
        states = {name: torch.zeros_like(t) for name, t in _tensors(stream, names).items()}
        counts = any(handler is rotate for handler in stream._plan.values())
        keys = [*inputs, *([(FRAME,)] if counts else []), *((name,) for name in states)]
        tensors = [*inputs.values(), *([torch.tensor(3)] if counts else []), *states.values()]
        batch = {0: "batch"} if "batch" in {a for named in axes.values() for a in named.values()} else {}
        for key in keys[len(inputs) :]:
            axes[key] = {} if key == (FRAME,) else dict(batch)
        step = _Step(model, stream, keys, len(inputs), fixed, axes, names).eval()
        program = _export(step, keys, tensors, axes, list(states), opset)
        described = [
            dict(
                name=name, input=name, output=f"next_{name}", dtype=str(t.dtype).removeprefix("torch."),
                shape=["batch" if batch else t.shape[0], *t.shape[1:]],
            )
            for name, t in states.items()
        ]  # fmt: skip
        program.model.metadata_props[METADATA] = json.dumps(described)
        if counts:
            program.model.metadata_props["diffattn.frame"] = FRAME
        program.save(path, external_data=False)
        say(f"wrote {path}: {len(states)} states")
        if check:
            _compare(path, stream, inputs, fixed, axes[first], describe(path), say)
    return path


def describe(path: str | Path) -> list[dict[str, Any]]:
    """The states of an exported step: name, input, output, shape, dtype."""
    import onnx

    found = {entry.key: entry.value for entry in onnx.load(str(path), load_external_data=False).metadata_props}
    if METADATA not in found:
        raise ValueError(f"path: {path} has no states, it was not exported with streaming=True")
    return json.loads(found[METADATA])


def _axes(inputs, first, dynamic):
    if dynamic is False:
        return {key: {} for key in inputs}
    if dynamic is not True:
        raise TypeError(f"dynamic: got {dynamic!r}, expected True or False with streaming=True")
    batch = inputs[first].shape[0]
    for d, axis in {0: "batch", **TIME_AXES.get(inputs[first].dim(), {})}.items():
        if inputs[first].shape[d] < 2:
            raise ValueError(
                f"sample_inputs: {axis} is {inputs[first].shape[d]} in {label(first)}, expected 2 or more: 1 is fixed"
            )
    axes = {key: {0: "batch"} if t.dim() and t.shape[0] == batch else {} for key, t in inputs.items()}
    axes[first] = TIME_AXES.get(inputs[first].dim(), axes[first])
    return axes


def _memory_names(stream: Stream) -> dict[str, nn.Module]:
    """State name -> module, in the order in which the model met them. A layer may have two: its name, `.z`."""
    names = {}
    for module, memory in stream.memory.items():
        if isinstance(memory, dict):
            raise ExportError(
                f"{stream.names[module]}: softmax self-attention in a stream keeps keys whose number changes; only "
                "layers with a state of fixed size export"
            )
        names[stream.names[module]] = module
    return names


def _tensors(stream: Stream, names) -> dict[str, Tensor]:
    found = {}
    for name, module in names.items():
        memory = stream.memory[module]
        if isinstance(memory, CausalState):
            for suffix, t in zip(("", ".z"), memory.tensors(), strict=False):
                found[name + suffix] = t
        else:
            found[name] = memory
    return found


class _Step(nn.Module):
    """A call of the stream with its memory among the tensors, in and out."""

    def __init__(self, model, stream, keys, n_inputs, fixed, axes, names):
        super().__init__()
        self.model = model
        self.stream, self.keys, self.n_inputs, self.fixed, self.axes = stream, keys, n_inputs, fixed, axes
        self.names = names
        self.templates = {module: stream.memory[module] for module in names.values()}

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        sizes: dict[str, Any] = {}
        for key, t in zip(self.keys, tensors, strict=True):
            for d, axis in self.axes[key].items():
                torch._check(sizes.setdefault(axis, t.shape[d]) == t.shape[d])
        given = dict(zip(self.keys, tensors, strict=True))
        inputs = {key: given[key] for key in self.keys[: self.n_inputs]}
        stream = self.stream
        arguments = unflatten(inputs, inputs.values())
        stream._signature = None
        stream._broken = False
        stream.frames = 0
        stream._begin((next(iter(inputs.values())),), {}, None)
        stream.frames = given.get((FRAME,), 0)
        for name, module in self.names.items():
            template = self.templates[module]
            if isinstance(template, CausalState):
                memory = template.clone()
                for suffix, part in zip(("", ".z"), memory, strict=False):
                    part.tensor = given[(name + suffix,)].clone()
            else:
                memory = given[(name,)].clone()
            stream.memory[module] = memory
        token = _RUNNING.set(stream)
        try:
            out = self.model(**arguments, **self.fixed)
        finally:
            _RUNNING.reset(token)
        out = out[0] if isinstance(out, (tuple, list)) else out
        return out, *_tensors(stream, self.names).values()


def _export(step, keys, tensors, axes, states, opset):
    free = torch.export.Dim.DYNAMIC
    shapes = (tuple({d: free for d in axes[key]} for key in keys),)
    try:
        with onnx_attention(has_attention(opset)):
            program = torch.onnx.export(
                step,
                tuple(tensors),
                dynamic_shapes=shapes,
                input_names=[label(key) for key in keys],
                output_names=["out", *(f"next_{name}" for name in states)],
                opset_version=opset,
                custom_translation_table=translations(opset),
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # torch raises whatever it hits, in a wrapper or not
        last = str(error.__cause__ or error).strip() or type(error).__name__
        raise ExportError(f"{type(step.model).__name__} cannot be exported as a step: {last}") from error
    foreign = {f"{n.domain}::{n.op_type}" for n in program.model.graph if n.domain not in ("", "ai.onnx")}
    if foreign:
        raise ExportError(f"the step needs operators that are not ONNX's own: {', '.join(sorted(foreign))}")
    _name_axes(program.model.graph, [axes[key] for key in keys])
    return program


def _compare(path, stream, inputs, fixed, axes, states, say) -> None:
    """Two steps that were not traced, after one another, of another batch and length."""
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # it has an exception class for each of its codes
        raise ExportError(f"ONNX Runtime cannot load {path} (the file is kept): {first_line(error)}") from error
    known = {value.name for value in session.get_inputs()}
    stream.reset()
    memory, frame = {}, 0
    batch = next(iter(inputs.values())).shape[0]
    for i in range(2):
        fresh = {}
        for key, t in inputs.items():
            varied = key == next(iter(inputs))
            if varied:
                time = next((d for d, axis in axes.items() if axis != "batch"), None)
                if time is not None:
                    t = torch.cat((t, t), time) if i else t
                t = t * (0.5 + 0.5 * i)
            fresh[key] = t[:1] if t.dim() and t.shape[0] == batch and axes else t
        expected = stream(**unflatten(fresh, fresh.values()), **fixed)
        expected = expected[0] if isinstance(expected, (tuple, list)) else expected
        feed = {label(key): t.cpu().numpy() for key, t in fresh.items()} | memory
        feed[FRAME] = torch.tensor(frame).numpy()
        for state in states:
            rows = [feed[label(next(iter(inputs)))].shape[0] if n == "batch" else n for n in state["shape"]]
            feed.setdefault(state["input"], torch.zeros(rows).numpy())
        try:
            out, *after = session.run(None, {name: x for name, x in feed.items() if name in known})
        except Exception as error:
            raise ExportError(f"{path}: ONNX Runtime fails at step {i + 1}: {first_line(error)}") from error
        difference = ((torch.from_numpy(out) - expected).abs().max() / expected.abs().max()).item()
        say(f"step {i + 1}: differs by {difference:.1e} of the largest number")
        if not difference <= TOLERANCE:
            raise ExportError(f"{path} is not what the stream computes: step {i + 1} differs by {difference:.1e}")
        memory = {state["input"]: x for state, x in zip(states, after, strict=True)}
        frame = stream.frames
