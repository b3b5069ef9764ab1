"""Weights of installed cores: safetensors beside a JSON config, only what diffattn added to the model."""

import json
from pathlib import Path
from typing import Any

from diffattn.checkpoints import CONFIG_NAME, FORMAT_VERSION, WEIGHTS_NAME, described, load_into, open_checkpoint
from diffattn.layers import find_layers
from diffattn.patch import status


def save_weights(target: Any, path: str | Path) -> Path:
    """Write the weights of every installed core to a folder.

    Args:
        target: a patched pipeline or model.
        path: the folder, made if need be. `diffattn.safetensors` gets tensors named
            `{layer}.{parameter}`, `diffattn.json` each layer's core and its arguments.

    Returns: the folder.

    Raises: ValueError if nothing is installed in `target`, or the cores' weights are offloaded. TypeError for a path
        that is none.
    """
    from safetensors.torch import save_file

    if not isinstance(path, (str, Path)):
        raise TypeError(f"path: got {type(path).__name__}, expected a string or a path")
    installed = status(target).installed
    if not installed:
        raise ValueError(f"target: {type(target).__name__} has no diffattn processor installed, so no weights")
    tensors = {
        f"{layer}.{name}": tensor
        for layer, processor in installed.items()
        for name, tensor in processor.state_dict().items()
    }
    offloaded = [name for name, tensor in tensors.items() if tensor.is_meta]
    if offloaded:
        raise ValueError(f"target: {offloaded[0]} is offloaded: save the weights before, or remove the hooks")
    # Copies: safetensors refuses two names of one tensor, which a user's feature map may have.
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    layers = {name: described(processor.core) for name, processor in installed.items()}
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

    Checkpoints of LinFusion (Liu et al. 2024; a folder with `config.json` and its `modules_list`) are read too, onto
    cores of `LinearAttention.linfusion()`. Projections that a checkpoint holds become the core's own, called in place
    of the layer's: LoRA on the layer's still acts, and `unpatch` brings the layer's back.

    Args:
        target: a pipeline or model patched with the same cores on the same layers. `patch(target, weights=...)` does
            both at once.
        path_or_repo: the folder, or a hub id like `"user/sdxl-linear"`. Layers may have been saved from a pipeline,
            with the component's name before theirs, or from its model.

    Raises:
        FileNotFoundError: neither a folder with such files nor a hub repository of them.
        ValueError: a broken file, a pickle, or other layers, cores, parameters or shapes; nothing is changed then.
    """
    checkpoint = open_checkpoint(path_or_repo)
    layers = {layer.name: layer for layer in find_layers(target) if layer.patched}
    if not layers:
        raise ValueError(
            f"target: {type(target).__name__} has no diffattn processor installed; patch(target, weights=...) "
            "installs those that the weights are for"
        )
    saved = checkpoint.match(layers.values())
    extra = [name for name in layers if name not in saved]
    if extra:
        raise ValueError(
            f"weights: {path_or_repo} has nothing for {', '.join(extra[:3])}{' ...' if extra[3:] else ''}, which "
            "diffattn patched too"
        )
    load_into(checkpoint, {saved[name]: layer for name, layer in layers.items()})
