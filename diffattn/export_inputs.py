"""Inputs of an exported graph: tensors by where they are in a call, axes along which they may change, other sizes."""

import inspect
import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from diffattn.export_models import STABLE_AUDIO_AXES

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

Key = tuple[str | int, ...]  # ("sample",), ("added_cond_kwargs", "time_ids"), ("rotary_embedding", 0)
COMPLEX = "real and imaginary"  # ("image_rotary_emb", COMPLEX): a last dimension of 2


def label(key: Key) -> str:
    """The name of an input of the graph."""
    last = key[-1]
    return key[0] if last == COMPLEX else f"{key[0]}_{last}" if isinstance(last, int) else last


def flatten(model: nn.Module, samples: dict[str, Any]) -> tuple[dict[Key, Tensor], dict[str, Any]]:
    """Tensors by where they are, on the model's device, and all that is none; models that can return a tuple do."""
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
    if "return_dict" in inspect.signature(type(model).forward).parameters:
        fixed["return_dict"] = False
    return found, fixed


def unflatten(keys, tensors, real: bool = False) -> dict[str, Any]:
    """The arguments that `flatten` took apart; `real` leaves complex ones as pairs, for one-graph forwards."""
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


def size_of(axis: str, sizes: dict[str, Any]) -> Any:
    """The size of `length` or of `length + 1`."""
    name, _, more = axis.partition(" + ")
    return sizes[name] + int(more or 0)


def choose_axes(inputs: dict[Key, Tensor], dynamic: bool | dict, own: dict[str, dict]) -> dict[Key, dict[int, str]]:
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
    for key, d, axis in named_axes(axes):
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
        if size_of(axis, sizes) != size:
            raise ValueError(f"sample_inputs: {axis} is {size}, expected {size_of(axis, sizes)}")
    return axes


def named_axes(axes: dict[Key, dict[int, str]]) -> list[tuple[Key, int, str]]:
    return [(key, d, axis) for key, named in axes.items() for d, axis in named.items()]


def other_sizes(inputs, axes) -> list[dict[str, int]]:
    """Three choices of sizes, none of them traced. Pictures stay multiples of what height and width share."""
    every = {axis: inputs[key].shape[d] for key, d, axis in named_axes(axes)}
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
        choices.append({axis: size_of(axis, sizes) for axis in every})
    return choices


def _mask_values(key: Key, t: Tensor) -> tuple[float, float] | None:
    """What stands in a mask for tokens that count and for others, 1 and 0, or 0 and -1e4; None if t is none."""
    if "mask" not in label(key) or t.dim() == 0 or t.numel() == 0:
        return None
    if bool(((t == 0) | (t == 1)).all()):
        return 1.0, 0.0
    low, high = float(t.min()), float(t.max())
    return (high, low) if bool(((t == low) | (t == high)).all()) else None


def resized(inputs, axes, sizes, seed: int) -> dict[Key, Tensor]:
    """Tensors of other sizes, with numbers like those of the samples."""
    generator = torch.Generator().manual_seed(seed)
    fresh = {}
    for key, t in inputs.items():
        shape = [sizes.get(axes[key].get(d), size) for d, size in enumerate(t.shape)]
        if "rotary" in key[0] and isinstance(key[-1], int):  # cos and sin, whose columns belong together
            new = t.cpu()
            for d in axes[key]:
                new = new.index_select(d, (torch.arange(shape[d]) + seed) % t.shape[d])
        elif values := _mask_values(key, t):  # right padding, of the last prompt alone
            new = torch.full(shape, values[0])
            new[-1, ..., shape[-1] - shape[-1] // 3 :] = values[1]
        elif t.is_floating_point():
            spread = t.float().std(correction=0) if t.numel() > 1 else 1.0
            new = t.float().mean().cpu() + torch.randn(shape, generator=generator) * float(spread)
        else:
            new = torch.randint(int(t.min()), int(t.max()) + 1, shape, generator=generator)
        fresh[key] = new.to(t.device, t.dtype)
    return fresh
