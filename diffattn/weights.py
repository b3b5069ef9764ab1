"""Weights of installed cores: safetensors beside a JSON config, only what diffattn added to the model."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffattn.patch import status

WEIGHTS_NAME = "diffattn.safetensors"
CONFIG_NAME = "diffattn.json"
FORMAT_VERSION = 1


def save_weights(target: Any, path: str | Path) -> Path:
    """Write the weights of every installed core to a folder.

    Args:
        target: a patched pipeline or model.
        path: the folder, made if need be. `diffattn.safetensors` gets tensors named
            `{layer}.{parameter}`, `diffattn.json` each layer's core and its arguments.

    Returns: the folder.

    Raises: ValueError if nothing is installed in `target`.
    """
    from safetensors.torch import save_file

    installed = status(target).installed
    if not installed:
        raise ValueError(f"target: {type(target).__name__} has no diffattn processor installed, so no weights")
    tensors = {name: t.detach().contiguous().cpu() for name, t in _tensors(installed).items()}
    layers = {
        name: {"core": type(processor.core).__name__, **processor.core.config()}
        for name, processor in installed.items()
    }
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    # Write, then rename: a run that dies in between leaves the old files whole.
    save_file(tensors, folder / (WEIGHTS_NAME + ".part"), metadata={"format": "pt"})
    config = {"format_version": FORMAT_VERSION, "layers": layers}
    (folder / (CONFIG_NAME + ".part")).write_text(json.dumps(config, indent=2) + "\n")
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        (folder / (name + ".part")).replace(folder / name)
    return folder


def load_weights(target: Any, path_or_repo: str | Path) -> None:
    """Fill the installed cores from a folder that `save_weights` wrote, or from a hub repository of one.

    Args:
        target: a pipeline or model patched with the same cores on the same layers.
        path_or_repo: the folder, or a hub id like `"user/sdxl-linear"`.

    Raises:
        FileNotFoundError: neither a folder with the two files nor a hub repository of them.
        ValueError: the layers, cores, parameters or shapes differ; nothing is changed then.
    """
    from safetensors.torch import load_file

    folder = _folder(path_or_repo)
    config = json.loads((folder / CONFIG_NAME).read_text())
    if config.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"path_or_repo: {folder / CONFIG_NAME} has format_version {config.get('format_version')!r}, "
            f"expected {FORMAT_VERSION}"
        )
    saved = config["layers"]
    installed = status(target).installed
    if saved.keys() != installed.keys():
        raise ValueError(
            "path_or_repo: the weights are for other layers than those patched: "
            + _difference(saved.keys(), installed.keys())
        )
    for name, processor in installed.items():
        here = {"core": type(processor.core).__name__, **processor.core.config()}
        if saved[name] != here:
            raise ValueError(f"path_or_repo: layer {name} was saved with {saved[name]}, the model has {here}")
    source, destination = load_file(folder / WEIGHTS_NAME), _tensors(installed)
    if source.keys() != destination.keys():
        raise ValueError("path_or_repo: parameters differ: " + _difference(source.keys(), destination.keys()))
    for name, tensor in destination.items():
        if source[name].shape != tensor.shape:
            raise ValueError(
                f"path_or_repo: {name} was saved with shape {tuple(source[name].shape)}, "
                f"the model has {tuple(tensor.shape)}"
            )
    with torch.no_grad():
        for name, tensor in destination.items():
            tensor.copy_(source[name])


def _tensors(installed: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    return {
        f"{layer}.{name}": tensor
        for layer, processor in installed.items()
        for name, tensor in processor.state_dict(keep_vars=True).items()
    }


def _folder(path_or_repo: str | Path) -> Path:
    folder = Path(path_or_repo)
    if folder.is_dir():
        missing = [n for n in (CONFIG_NAME, WEIGHTS_NAME) if not (folder / n).is_file()]
        if missing:
            raise FileNotFoundError(f"path_or_repo: {folder} has no {' and no '.join(missing)}")
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(str(path_or_repo), allow_patterns=[CONFIG_NAME, WEIGHTS_NAME]))
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(
            f"path_or_repo: got {str(path_or_repo)!r}, expected a folder with {CONFIG_NAME} and {WEIGHTS_NAME} "
            "or the id of a hub repository with them"
        ) from error


def _difference(saved, here) -> str:
    only_saved, only_here = sorted(saved - here), sorted(here - saved)
    return f"only in the file: {only_saved or 'none'}; only in the model: {only_here or 'none'}"
