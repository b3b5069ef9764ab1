"""Look at a model's attention without its weights: every layer, what `patch` would do, what share of time it has."""

import contextlib
import difflib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffattn._errors import first_line
from diffattn.checkpoints import open_checkpoint
from diffattn.cores import AttentionCore
from diffattn.inspect_cost import Layers, SeeingCore
from diffattn.inspect_inputs import Inputs, is_video
from diffattn.layers import Layer, find_layers, find_unreachable, is_autoencoder, names_of
from diffattn.plan import as_core, make_plan

EXACT = "computes what stock computes"
CONVERTED = "another mechanism: needs distilled weights"


@dataclass(frozen=True)
class AttentionRow:
    """One attention layer. None where it could not be found out.

    Attributes:
        name: as `patch(layers=...)` takes it.
        attention: class name of the module; processor: of its stock processor, "" if it has none.
        tokens: queries and keys of the largest attention in the layer.
        mechanism: of stock: "softmax", "softmax, GQA", "softmax, MQA", "relu linear", ...
        context: "itself", or what else it attends to as `patch` sees it.
        share: estimate of the part of a forward's time that it spends in attention proper, projections left out.
        installs: the core that `patch` would install; None if it would leave the layer.
        why: `patch` would do so.
        error: of that core's layer, relative to what it replaces, if it was measured: `diffattn.fidelity`.
    """

    name: str
    attention: str
    processor: str = ""
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    tokens: tuple[int, int] | None = None
    mechanism: str = "?"
    context: str = "?"
    share: float | None = None
    installs: str | None = None
    why: str = ""
    error: float | None = None


@dataclass(frozen=True)
class Inspection:
    """What `inspect_model` found.

    Attributes:
        inputs: component ("" for a bare model) -> what its forward was run with, in words, or why it was not run.
        share: component -> estimate of attention's part of its forward's time.
        measured_on: what `error` of the rows was measured on, in words; "" if it was not.
    """

    rows: list[AttentionRow] = field(default_factory=list)
    inputs: dict[str, str] = field(default_factory=dict)
    share: dict[str, float] = field(default_factory=dict)
    measured_on: str = ""


def inspect_model(
    source: str | Path,
    core: AttentionCore | str | None = None,
    *,
    layers: Any = None,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    weights: str | None = None,
) -> Inspection:
    """List the attention layers of a model that is built from its config alone, on the meta device.

    Args:
        source: class name of diffusers (its default config), or a folder or hub id with a `config.json` or a
            pipeline's `model_index.json`.
        core, layers, weights: as `patch` takes them; of weights, only which layers they are for.
        height, width, frames: of the picture or video, in pixels; None takes the config's `sample_size`, else 1024
            (videos 832 x 480, 81 frames).

    Raises:
        TypeError: `source` is no name and no path.
        ValueError: `source` is none of these, its config builds no model, a size that it does not take, or what
            `patch` raises.
        OSError: the hub could not be reached.
    """
    core = as_core(core)
    models, compression = build(source)
    target = models[""] if list(models) == [""] else _Components(models)
    found, unreachable = find_layers(target), find_unreachable(target)
    names = ", ".join(type(model).__name__ for model in models.values())
    if not found and not unreachable:
        raise ValueError(f"{source}: no attention in {names} with this config (a class's name takes its default)")
    if frames is not None and not any(map(is_video, models.values())):
        raise ValueError(f"frames: got {frames}, expected none: {names} takes no video")
    checkpoint = None if weights is None else open_checkpoint(weights)
    planned, reasons, converted = make_plan(found, core, layers, checkpoint) if found else ([], {}, [])
    installs = {layer.name: str(processor.core) for layer, processor in planned}
    reasons = reasons | {name: CONVERTED if name in converted else EXACT for name in installs} | unreachable

    inspection = Inspection()
    rows = {layer.name: _row(layer, installs, reasons) for layer in found}
    for name, reason in unreachable.items():
        rows[name] = AttentionRow(name, reason.split()[0], why=reason)
    # An autoencoder last: its picture is the one that the denoiser before it draws.
    for component, model in sorted(models.items(), key=lambda item: is_autoencoder(item[1])):
        mine = [layer for layer in found if layer.component == component]
        prefix = f"{component}." if component else ""
        paths = {layer.name: layer.path for layer in mine}
        paths |= {prefix + n: n for n, _ in model.named_modules() if prefix + n in unreachable}
        if not paths:
            continue
        if not mine:
            inspection.inputs[component] = "not run: none of its attention has a processor"
            continue
        inputs = Inputs(model, height, width, frames, compression)
        height, width = inputs.size.height, inputs.size.width
        try:
            stock, bare = _run(model, mine, paths, inputs)
        except Exception as error:  # a model's own forward: it may fail in any way on inputs that do not suit it
            inspection.inputs[component] = f"could not be run with inputs made up for it: {first_line(error)}"
            continue
        if not stock.seen and not bare.seen:
            inspection.inputs[component] = "its forward runs none of its attention"
            continue
        inspection.inputs[component] = str(inputs)
        reached = {layer.name for layer in mine if layer.family}
        for name in paths:
            seconds = stock.seconds[name] - bare.seconds[name] if name in reached else stock.fused[name]
            seen = bare.seen[name] or stock.seen[name]
            if seen:
                heads, head_dim, queries, keys = max(seen, key=lambda s: s[2] * s[3])
                rows[name] = replace(
                    rows[name],
                    heads=rows[name].heads or heads,
                    head_dim=head_dim,
                    tokens=(queries, keys),
                    share=max(seconds, 0.0) / stock.total,
                )
        inspection.share[component] = sum(rows[name].share or 0 for name in paths)
    order = {name: i for i, name in enumerate(names_of(target))}
    inspection.rows.extend(sorted(rows.values(), key=lambda row: order[row.name]))
    return inspection


def build(source: str | Path) -> tuple[dict[str, nn.Module], int | None]:
    """Models of `source` on the meta device by component, and their autoencoder's compression if it tells."""
    import diffusers

    if not isinstance(source, (str, Path)):
        raise TypeError(f"source: got {type(source).__name__}, expected a class name, a folder or a hub id")
    cls = getattr(diffusers, str(source), None)
    if isinstance(cls, type) and issubclass(cls, nn.Module):
        return {"": _on_meta(cls, {})}, None
    folder = _folder(source)
    if (folder / "config.json").is_file():
        return {"": _from_config(folder)}, None
    models = {}
    for component, described in _read(folder / "model_index.json").items():
        if isinstance(described, list) and (folder / component / "config.json").is_file():
            if isinstance(getattr(diffusers, str(described[1]), None), type):
                with contextlib.suppress(_NotAModel):
                    models[component] = _from_config(folder / component)
    if not models:
        raise ValueError(f"{source}: its model_index.json names no model of diffusers with a config.json")
    compression = None
    for model in models.values():
        if type(model).__name__.startswith("AutoencoderKL") and "block_out_channels" in model.config:
            compression = 2 ** (len(model.config["block_out_channels"]) - 1)
    return models, compression


class _NotAModel(ValueError):
    pass


class _Components:
    """What `find_layers` looks at in a pipeline."""

    def __init__(self, components: dict[str, nn.Module]):
        self.components = components


def _from_config(folder: Path) -> nn.Module:
    import diffusers

    config = _read(folder / "config.json")
    name = config.get("_class_name", "")
    cls = getattr(diffusers, str(name), None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise _NotAModel(f"{folder / 'config.json'}: its _class_name is {name!r}, no model of diffusers")
    return _on_meta(cls, config)


def _on_meta(cls: type[nn.Module], config: dict) -> nn.Module:
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = cls.from_config(config) if config else cls()
    except Exception as error:  # any that a constructor raises on a config that does not fit it
        what = "its config" if config else "its default config (name a folder or hub id with a config.json)"
        raise ValueError(f"{cls.__name__} cannot be built from {what}: {first_line(error)}") from None
    # Tables that came from numpy are on the CPU still. Past diffusers' own `to`, which warns of modules in float32.
    return nn.Module.to(model, device="meta", dtype=torch.bfloat16).eval()


def _folder(source: str | Path) -> Path:
    names = ("model_index.json", "config.json")
    folder = Path(source)
    if str(source) and folder.is_dir():
        if not any((folder / name).is_file() for name in names):
            raise ValueError(f"{source}: the folder has neither a model_index.json nor a config.json")
        return folder
    if str(source).count("/") != 1:
        import diffusers

        if isinstance(getattr(diffusers, str(source), None), type):
            raise ValueError(f"{source}: no model class of diffusers; of a pipeline, name a folder or a hub id")
        close = difflib.get_close_matches(str(source), dir(diffusers), n=1)
        meant = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"{source or repr(source)}: no model class of diffusers, no folder and no hub id{meant}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(str(source), allow_patterns=["model_index.json", "*config.json"]))
    except (HFValidationError, RepositoryNotFoundError):
        raise ValueError(f"{source}: no model class of diffusers, no folder and no hub id") from None
    except OSError as error:
        raise OSError(f"{source}: no folder here, and the hub did not answer ({first_line(error)})") from None
    if not any((folder / name).is_file() for name in names):
        raise ValueError(f"{source}: the repository has neither a model_index.json nor a config.json")
    return folder


def _read(path: Path) -> dict:
    try:
        read = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {first_line(error)}") from None
    if not isinstance(read, dict):
        raise ValueError(f"{path} holds a {type(read).__name__}, expected an object")
    return read


def _row(layer: Layer, installs: dict[str, str], reasons: dict[str, str]) -> AttentionRow:
    row = AttentionRow(
        layer.name,
        type(layer.attn).__name__,
        type(layer.stock).__name__,
        installs=installs.get(layer.name),
        why=reasons[layer.name],
    )
    if layer.family is None:
        return row
    heads, kv_heads = layer.family.heads(layer.attn)
    kind, *details = layer.family.exact_core(layer.attn).formula(heads, kv_heads)
    mechanism = f"{details[0]} {kind}" if kind == "linear" else kind
    if kind == "softmax" and kv_heads < heads:
        mechanism += ", MQA" if kv_heads == 1 else ", GQA"
    itself = layer.family.attends_to_itself(layer.path, layer.attn)
    context = "itself" if itself else layer.family.kept.removeprefix("attends to ")
    head_dim = layer.family.layer_info(layer.attn).head_dim
    return replace(row, heads=heads, kv_heads=kv_heads, head_dim=head_dim, mechanism=mechanism, context=context)


def _run(model: nn.Module, found: list[Layer], paths: dict[str, str], inputs: Inputs) -> tuple[Layers, Layers]:
    """Forwards with stock attention and with none; the costs of both."""
    reached = [layer for layer in found if layer.family]
    return _forward(model, paths, inputs), _forward(model, paths, inputs, reached)


def _forward(model: nn.Module, paths: dict[str, str], inputs: Inputs, bare: Sequence[Layer] = ()) -> Layers:
    """A forward whose `bare` layers do not attend. Raises: what the model's own forward does."""
    failure = None
    for arguments in inputs.variants():
        layers = Layers(model, paths)
        try:
            for layer in bare:
                layer.install(layer.family(SeeingCore(layers)))
            with torch.no_grad(), warnings.catch_warnings(), layers:
                warnings.simplefilter("ignore")
                model(**arguments)
            return layers
        except Exception as error:
            failure = failure or error
        finally:
            for layer in bare:
                if layer.patched:
                    layer.restore()
    raise failure
