"""Folders and hub repositories with weights of attention cores: diffattn's own, and LinFusion's checkpoints."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffattn import cores
from diffattn._errors import first_line
from diffattn.cores import AttentionCore, LinearAttention
from diffattn.layers import Layer

WEIGHTS_NAME = "diffattn.safetensors"
CONFIG_NAME = "diffattn.json"
FORMAT_VERSION = 1
#: What diffusers' ModelMixin writes, which LinFusion is.
MODEL_CONFIG = "config.json"
MODEL_WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
#: LinFusion's names of a module's tensors, and ours.
LINFUSION_NAMES = {
    "to_q_.": "core.input_maps.q.",
    "to_k_.": "core.input_maps.k.",
    "to_q.": "core.projections.q.",
    "to_k.": "core.projections.k.",
    "to_v.": "core.projections.v.",
    "to_out.0.": "core.projections.out.",
}


class Stored(NamedTuple):
    """A tensor in a safetensors file."""

    file: Path
    name: str
    shape: tuple[int, ...]


@dataclass
class Checkpoint:
    """What a folder holds, before any of it is in a model.

    Attributes:
        source: as it was asked for.
        cores: layer as it was saved -> name and arguments of its core, {"core": class name, **config}.
        heads: layer -> its heads, where the format tells.
        files: layer -> parameter as in the processor's state dict -> where it is.
    """

    source: str
    cores: dict[str, dict[str, Any]] = field(default_factory=dict)
    heads: dict[str, int] = field(default_factory=dict)
    files: dict[str, dict[str, "Stored"]] = field(default_factory=lambda: defaultdict(dict))

    def match(self, layers: Iterable[Layer]) -> dict[str, str]:
        """Name of a layer -> the name that it was saved under, with its component's name before it or without.

        Raises: ValueError if a saved layer is none of `layers`.
        """
        layers, found = list(layers), {}
        for saved in self.cores:
            hits = [layer for layer in layers if saved == layer.name]
            hits = hits or [layer for layer in layers if saved == layer.path and layer.denoises]
            hits = hits or [layer for layer in layers if not layer.component and saved.partition(".")[2] == layer.path]
            if hits:
                found[hits[0].name] = saved
        missing = [saved for saved in self.cores if saved not in found.values()]
        if missing:
            raise ValueError(
                f"weights: {self.source} is for another model or other layers: {_some(missing)} not found among "
                f"{_some([layer.name for layer in layers])}"
            )
        return found

    def core(self, saved: str, given: AttentionCore | None = None) -> AttentionCore:
        """The core of a layer. One that is given has to be the same, but for the width of its MLPs.

        Raises: ValueError if it is not, or the core cannot be made from what was saved.
        """
        config = self.cores[saved]
        if given is not None and _without_widths(described(given)) != _without_widths(_as_today(config)):
            raise ValueError(f"core: got {given}, but layer {saved} of {self.source} was saved with {config}")
        cls = getattr(cores, str(config.get("core")), None)
        if isinstance(cls, type) and issubclass(cls, AttentionCore):
            try:
                return cls(**{name: value for name, value in config.items() if name != "core"})
            except (TypeError, ValueError) as error:
                failure = error
        else:
            failure = "diffattn has no such core"
        if given is not None:
            return given
        raise ValueError(
            f"weights: layer {saved} of {self.source} was saved with {config}, which cannot be made from that "
            f"({failure}): give the core to patch(..., core)"
        )

    def roles(self, saved: str) -> list[str]:
        """The projections that the checkpoint holds for a layer."""
        prefix = "core.projections."
        return sorted({key.split(".")[2] for key in self.files[saved] if key.startswith(prefix)})

    def read(self, saved: str) -> dict[str, Tensor]:
        """The tensors of a layer by parameter."""
        read = {}
        for file in {stored.file for stored in self.files[saved].values()}:
            with _opened(file) as tensors:
                here = {key: stored.name for key, stored in self.files[saved].items() if stored.file == file}
                read |= {key: tensors.get_tensor(name) for key, name in here.items()}
        return read


def described(core: AttentionCore) -> dict[str, Any]:
    return {"core": type(core).__name__, **core.config()}


def _as_today(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments that a newer version added have their defaults in older files."""
    cls = getattr(cores, str(config.get("core")), None)
    try:
        return described(cls(**{name: value for name, value in config.items() if name != "core"}))
    except (TypeError, ValueError):
        return config


def _without_widths(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != "mid_dim"}


def open_checkpoint(path_or_repo: str | Path) -> Checkpoint:
    """Read what a folder or a hub repository holds.

    Raises:
        FileNotFoundError: neither a folder with such files nor a hub repository of them.
        ValueError: files that are broken, pickles, or something else.
    """
    folder = _folder(path_or_repo)
    if (folder / CONFIG_NAME).is_file():
        return _own(folder, str(path_or_repo))
    return _linfusion(folder, str(path_or_repo))


def _own(folder: Path, source: str) -> Checkpoint:
    config = _json(folder / CONFIG_NAME)
    if config.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"weights: {folder / CONFIG_NAME} has format_version {config.get('format_version')!r}, "
            f"expected {FORMAT_VERSION}"
        )
    layers = config.get("layers")
    if not isinstance(layers, dict) or not all(isinstance(core, dict) for core in layers.values()):
        raise ValueError(f"weights: {folder / CONFIG_NAME} names no layers: expected {{layer: {{'core': ...}}}}")
    checkpoint = Checkpoint(source, layers)
    strangers = []
    for stored in _contents(folder / WEIGHTS_NAME):
        name = stored.name
        layer = next((layer for layer in layers if name.startswith(f"{layer}.")), None)
        if layer is None:
            strangers.append(name)
        else:
            checkpoint.files[layer][name.removeprefix(f"{layer}.")] = stored
    if strangers:
        raise ValueError(f"weights: {folder / WEIGHTS_NAME} has tensors of no layer in its config: {_some(strangers)}")
    return checkpoint


def _linfusion(folder: Path, source: str) -> Checkpoint:
    """A checkpoint of LinFusion (Huage001/LinFusion, src/linfusion/linfusion.py): tensors of module i begin `{i}.`."""
    config = _json(folder / MODEL_CONFIG)
    modules = config.get("modules_list")
    needed = {"module_name", "dim_n", "heads", "projection_mid_dim"}
    if not isinstance(modules, list) or not modules or not all(needed <= dict(m).keys() for m in modules):
        what = config.get("_class_name")
        raise ValueError(
            f"weights: {folder / MODEL_CONFIG} ({what or 'of no class'}) has no LinFusion modules_list: a list of "
            f"{{{', '.join(sorted(needed))}}}"
        )
    checkpoint = Checkpoint(source)
    names = [module["module_name"] for module in modules]
    for module in modules:
        core = LinearAttention.linfusion(mid_dim=module["projection_mid_dim"])
        checkpoint.cores[module["module_name"]] = described(core)
        checkpoint.heads[module["module_name"]] = module["heads"]
    strangers = []
    for file in _model_files(folder):
        for stored in _contents(file):
            index, _, rest = stored.name.partition(".")
            ours = next(
                (rest.replace(old, new, 1) for old, new in LINFUSION_NAMES.items() if rest.startswith(old)), ""
            )
            if not ours or not index.isdecimal() or int(index) >= len(names):
                strangers.append(stored.name)
            else:
                checkpoint.files[names[int(index)]][ours] = stored
    if strangers:
        raise ValueError(f"weights: {source} has tensors that LinFusion has not: {_some(strangers)}")
    for i, name in enumerate(names):
        if not checkpoint.files[name]:
            raise ValueError(f"weights: {source} has no tensors of its module {i}, {name}")
    return checkpoint


def _model_files(folder: Path) -> list[Path]:
    """The safetensors of a ModelMixin folder: one file, several with an index, or one of a variant (fp16)."""
    index = folder / (MODEL_WEIGHTS + ".index.json")
    if index.is_file():
        # Of this folder alone, whatever the index says.
        return [folder / Path(name).name for name in sorted(set(_json(index).get("weight_map", {}).values()))]
    whole = folder / MODEL_WEIGHTS
    return [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))[:1]


def _folder(path_or_repo: str | Path) -> Path:
    if not isinstance(path_or_repo, (str, Path)):
        raise TypeError(f"weights: got {type(path_or_repo).__name__}, expected a folder or a hub id")
    path = Path(path_or_repo)
    if path.suffix in PICKLES:
        raise ValueError(
            f"weights: got {str(path_or_repo)!r}, a pickle, which can run any code when it is read: expected a folder "
            "with safetensors; save_file of safetensors.torch writes such"
        )
    if path.is_file():
        raise ValueError(f"weights: got the file {path}, expected its folder, which holds the config too")
    if not path.is_dir():
        path = _downloaded(str(path_or_repo))
    pairs = {CONFIG_NAME: [path / WEIGHTS_NAME], MODEL_CONFIG: _model_files(path)}
    for config, weights in pairs.items():
        if (path / config).is_file() and weights and all(file.is_file() for file in weights):
            return path
    pickled = [file.name for file in path.iterdir() if file.suffix in PICKLES]
    if pickled:
        raise ValueError(
            f"weights: {path_or_repo} has {_some(pickled)}, pickles, which can run any code when they are read, and "
            "no safetensors; from_pretrained and save_pretrained of the library that made them write safetensors"
        )
    missing = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if not (path / name).is_file()]
    raise FileNotFoundError(
        f"weights: {path_or_repo} has no {' and no '.join(missing)}, and no {MODEL_CONFIG} with *.safetensors of "
        f"LinFusion; it has {_some(sorted(file.name for file in path.iterdir())) or 'nothing'}"
    )


def _downloaded(repo: str) -> Path:
    expected = (
        f"expected a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, or a hub id (user/name) of such or of LinFusion"
    )
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise FileNotFoundError(f"weights: got {repo!r}, which is no folder here, {expected}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    patterns = [CONFIG_NAME, WEIGHTS_NAME, MODEL_CONFIG, "diffusion_pytorch_model*.safetensors*"]
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(f"weights: got {repo!r}, {expected}") from error
    except OSError as error:
        raise FileNotFoundError(
            f"weights: got {repo!r}, no folder here, and the hub did not answer: {first_line(error)}"
        ) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"weights: {path} is no JSON: {error}") from None
    if not isinstance(read, dict):
        raise ValueError(f"weights: {path} holds a {type(read).__name__}, expected an object")
    return read


def _contents(file: Path) -> list[Stored]:
    with _opened(file) as tensors:
        return [Stored(file, name, tuple(tensors.get_slice(name).get_shape())) for name in tensors.keys()]


def _opened(file: Path):
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        size = f"{file.stat().st_size} bytes" if file.exists() else "missing"
        raise ValueError(f"weights: {file} ({size}) is cut off or no safetensors file: {error}") from None


def _some(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@torch.inference_mode(False)
@torch.no_grad()
def load_into(checkpoint: Checkpoint, layers: Mapping[str, Layer]) -> None:
    """Fill installed cores, those of `layers` by saved name. All is checked before anything is changed.

    Raises: ValueError, naming the layer, the parameter and both shapes.
    """
    tasks = []
    for saved, layer in layers.items():
        processor, info = layer.processor, layer.family.layer_info(layer.attn)
        checkpoint.core(saved, processor.core)
        if info.heads != checkpoint.heads.get(saved, info.heads):
            raise ValueError(
                f"weights: layer {layer.name} was saved with {checkpoint.heads[saved]} heads, the model's has "
                f"{info.heads}"
            )
        own = processor.core.projections
        roles = [role for role in checkpoint.roles(saved) if own is None or role not in own]
        here = {name: tuple(tensor.shape) for name, tensor in processor.state_dict().items()}
        for role in roles:
            if role not in info.weights:
                processor.core.own(info, [role])  # raises, and says why not
            for part, tensor in zip(("weight", "bias"), info.weights.get(role, ()), strict=False):
                if tensor is not None:
                    here[f"core.projections.{role}.{part}"] = tuple(tensor.shape)
        there = {key: stored.shape for key, stored in checkpoint.files[saved].items()}
        if here.keys() != there.keys():
            raise ValueError(
                f"weights: parameters of layer {layer.name} differ: only in {checkpoint.source}: "
                f"{_some(sorted(there.keys() - here.keys())) or 'none'}; only in the model: "
                f"{_some(sorted(here.keys() - there.keys())) or 'none'}"
            )
        for key, shape in here.items():
            if shape != there[key]:
                raise ValueError(
                    f"weights: {key} of layer {layer.name} was saved with shape {there[key]}, the model has {shape}"
                )
        if any(tensor.is_meta for tensor in processor.state_dict().values()):
            raise ValueError(f"weights: layer {layer.name} is offloaded: load weights first, then offload the model")
        tasks.append((saved, layer, processor, info, roles))
    for saved, layer, processor, info, roles in tasks:
        tensors = checkpoint.read(saved)
        if roles:
            processor.core.own(info, roles)
            processor.core.projections.to(**layer.where_it_computes())
            processor.train(layer.attn.training)
        for key, tensor in processor.state_dict(keep_vars=True).items():
            tensor.copy_(tensors[key])
