"""What the teacher's denoiser is called with while its pipeline draws the prompts, recorded once and kept on disk."""

import hashlib
import inspect
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FORMAT_VERSION = 1
#: Tensors of one shape for the whole batch, of which a row is not a sample's: positions and rotary tables.
SHARED = {"img_ids", "txt_ids", "image_rotary_emb", "rotary_embedding", "freqs_cis", "position_ids"}


class TrajectoryError(ValueError):
    """The pipeline calls its denoiser with something that cannot be recorded, or a recording is damaged."""


@dataclass(frozen=True)
class Sampling:
    """How the teacher draws: all of it is part of the recording's address.

    Attributes:
        prompts: what is drawn. With more `trajectories` than prompts, each is drawn again from other noise.
        trajectories: how many pictures; None is one a prompt.
        steps, guidance: of the pipeline's call; guidance None is the pipeline's own.
        height, width: in pixels; None is the pipeline's own.
        seed: of the first trajectory's noise; the next has the next.
        batch: prompts in one call of the pipeline. More is faster and takes more memory.

    Raises: ValueError for numbers that are no positive integers.
    """

    prompts: tuple[str, ...]
    trajectories: int | None = None
    steps: int = 20
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    seed: int = 0
    batch: int = 16

    def __post_init__(self):
        for name in ("trajectories", "steps", "height", "width", "batch"):
            value, optional = getattr(self, name), name in ("trajectories", "height", "width")
            if not (optional and value is None) and (type(value) is not int or value < 1):
                raise ValueError(
                    f"{name}: got {value!r}, expected a positive integer{' or None' if optional else ''}, of the "
                    "pictures that the teacher draws"
                )

    @property
    def count(self) -> int:
        return len(self.prompts) if self.trajectories is None else self.trajectories

    def options(self) -> dict[str, Any]:
        """Arguments of the pipeline's call, those that were chosen."""
        chosen = dict(
            num_inference_steps=self.steps, guidance_scale=self.guidance, height=self.height, width=self.width
        )
        return {name: value for name, value in chosen.items() if value is not None}

    def shards(self) -> list[range]:
        return [range(i, min(i + self.batch, self.count)) for i in range(0, self.count, self.batch)]


def cache_root() -> Path:
    """`DIFFATTN_CACHE`, or `~/.cache/diffattn`."""
    return Path(os.environ.get("DIFFATTN_CACHE", Path.home() / ".cache" / "diffattn"))


def fingerprint(pipe: Any) -> str:
    """sha256 of all that decides a trajectory but the sampling: classes, configs, weights and their dtypes.

    Autoencoders do not count, nor what diffattn added.
    """
    from diffattn.layers import is_autoencoder

    digest = hashlib.sha256(type(pipe).__name__.encode())
    for name, component in sorted(pipe.components.items()):
        config = getattr(component, "config", None)
        if isinstance(component, nn.Module):
            if is_autoencoder(component):
                continue
            digest.update(f"{name} {type(component).__name__}".encode())
            for key, tensor in sorted(component.state_dict().items()):
                if ".processor." in key:
                    continue
                digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(_bytes(tensor))
        elif hasattr(component, "step") and config is not None:
            settings = {k: v for k, v in sorted(dict(config).items()) if not k.startswith("_")}
            digest.update(f"{name} {type(component).__name__} {settings}".encode())
    return digest.hexdigest()


def address(model_fingerprint: str, sampling: Sampling) -> str:
    """The name of a recording's folder: another model, prompt, seed, size or step count makes another."""
    content = {"format": FORMAT_VERSION, "model": model_fingerprint, **vars(sampling)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


def record(
    pipe: Any,
    denoiser: nn.Module,
    sampling: Sampling,
    folder: Path,
    *,
    rank: int = 0,
    ranks: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Draw every trajectory that is not in `folder` yet, and write the denoiser's calls there.

    A file is written whole or not at all, so that a run that was cut off goes on with the next. Of several
    processes each draws its share.

    Returns: the files, this rank's and the others'.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = sampling.shards()
    files = [folder / f"{i:05d}.safetensors" for i in range(len(shards))]
    mine = [i for i in range(rank, len(shards), ranks) if not files[i].exists()]
    for done, i in enumerate(mine):
        progress(done, len(mine))
        chosen = [sampling.prompts[j % len(sampling.prompts)] for j in shards[i]]
        seeds = [sampling.seed + j for j in shards[i]]
        began = time.monotonic()
        compact = _compact(_listen(pipe, denoiser, chosen, seeds, sampling.options()))
        _write(files[i], compact, time.monotonic() - began)
    progress(len(mine), len(mine))
    return files


@torch.no_grad()
def _listen(pipe: Any, denoiser: nn.Module, prompts: list[str], seeds: list[int], options: dict) -> list[dict]:
    """Arguments by name, as nested dicts of CPU tensors and constants, of each call while the pipeline draws."""
    calls = []
    # A wrapper's signature (*args, **kwargs) names nothing.
    signature = inspect.signature(type(denoiser).forward)

    def hear(module, args, kwargs):
        arguments = dict(signature.bind(module, *args, **kwargs).arguments)
        arguments.pop("self", None)
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                arguments |= arguments.pop(name, {})
        calls.append({k: _to_cpu(v, k) for k, v in arguments.items() if v is not None})

    handle = denoiser.register_forward_pre_hook(hear, with_kwargs=True)
    try:
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        pipe(prompts, generator=generators, output_type="latent", **options)
    finally:
        handle.remove()
    if not calls:
        raise TrajectoryError(f"model: {type(pipe).__name__} drew without calling its {type(denoiser).__name__}")
    return calls


def _to_cpu(value: Any, path: str) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    if isinstance(value, dict):
        return {k: _to_cpu(v, f"{path}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_cpu(v, f"{path}.{i}") for i, v in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        # The time of a step differs from call to call; as a number it would make each call a kind of its own.
        if path == "timestep" and isinstance(value, (int, float)) and not isinstance(value, bool):
            return torch.tensor(value)
        return value
    raise TrajectoryError(f"model: its denoiser is given {path} of type {type(value).__name__}, which is not recorded")


def _compact(calls: list[dict]) -> tuple[dict[str, Tensor], list[dict]]:
    """Every different row once: a batch of guided samples repeats its latents, and all steps share their text.

    Returns: tensors named by leaf: the different rows, stacked; and for each call its template, with the leaf's name
        and the numbers of its rows in the places of tensors. A shared tensor has one number.
    """
    rows: dict[str, dict[bytes, int]] = defaultdict(dict)
    stacks: dict[str, list[Tensor]] = defaultdict(list)

    def keep(leaf: str, tensor: Tensor) -> int:
        known = rows[leaf]
        return known.setdefault(hashlib.blake2b(_bytes(tensor), digest_size=16).digest(), len(known))

    def place(leaf: str, value: Any, batch: int) -> Any:
        if isinstance(value, dict):
            return {k: place(f"{leaf}.{k}", v, batch) for k, v in value.items()}
        if isinstance(value, list):
            return [place(f"{leaf}.{i}", v, batch) for i, v in enumerate(value)]
        if not isinstance(value, Tensor):
            return value
        name = leaf.split(".")[0]
        if value.dim() == 0 or (value.dim() == 1 and len(value) == 1 and name == "timestep"):
            value = value.reshape(1).expand(batch)  # one time for all samples, which may not meet again
        shared = name in SHARED or value.shape[0] != batch
        # Shape and dtype in the name: prompts of other lengths are padded to other lengths.
        shape = value.shape if shared else value.shape[1:]
        key = f"{leaf}|{'x'.join(map(str, shape))}|{str(value.dtype).removeprefix('torch.')}"
        numbers = []
        for row in [value] if shared else value:
            number = keep(key, row)
            if number == len(stacks[key]):
                stacks[key].append(row)
            numbers.append(number)
        return {"tensor": key, "shared": shared, "rows": numbers}

    templates = []
    for call in calls:
        first = next((v for v in call.values() if isinstance(v, Tensor) and v.dim() > 1), None)
        if first is None:
            raise TrajectoryError(f"model: its denoiser is given no tensor of samples among {', '.join(call)}")
        templates.append({name: place(name, value, first.shape[0]) for name, value in call.items()})
    return {key: torch.stack(stack) for key, stack in stacks.items()}, templates


def _write(path: Path, compact: tuple[dict[str, Tensor], list[dict]], seconds: float) -> None:
    from safetensors.torch import save_file

    tensors, templates = compact
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    metadata = {"calls": json.dumps(templates), "format": str(FORMAT_VERSION), "seconds": f"{seconds:.3f}"}
    save_file(tensors, partial, metadata=metadata)
    partial.replace(path)


@dataclass
class Group:
    """Samples that fit into one batch: the same constants, shapes, dtypes and shared tensors."""

    template: dict
    tensors: dict[str, Tensor] = field(default_factory=dict)  # leaf -> (rows, ...)
    shared: dict[str, Tensor] = field(default_factory=dict)
    index: dict[str, Tensor] = field(default_factory=dict)  # leaf -> (samples,)
    count: int = 0


class Recording:
    """Samples of the denoiser's inputs, drawn from recorded trajectories.

    Held in the memory of `device` as a whole, each different row once. `count` is how many there are, `seconds` what
    recording them took, in whichever runs that was.
    """

    def __init__(self, files: Sequence[Path], device: torch.device | str = "cpu"):
        from safetensors import safe_open

        parts: dict[str, dict[str, Any]] = {}
        self.seconds = 0.0
        for path in files:
            try:
                with safe_open(path, "pt") as file:
                    metadata = file.metadata()
                    calls, seconds = json.loads(metadata["calls"]), float(metadata["seconds"])
                    tensors = {key: file.get_tensor(key) for key in file.keys()}
            except Exception as error:  # safetensors raises its own class, which is not public
                raise TrajectoryError(
                    f"cache: {path} cannot be read ({error}); remove it to record it again"
                ) from None
            self.seconds += seconds
            self._sort_in(parts, calls, tensors)
        self.groups = [self._join(part, torch.device(device)) for part in parts.values()]
        self.count = sum(group.count for group in self.groups)

    @staticmethod
    def _sort_in(parts: dict, calls: list[dict], tensors: dict[str, Tensor]) -> None:
        used: set[tuple[str, str]] = set()
        for call in calls:
            rows: dict[str, list[int]] = {}
            shared: dict[str, Tensor] = {}
            template = _strip(call, tensors, rows, shared)
            marks = {leaf: hashlib.blake2b(_bytes(t), digest_size=16).hexdigest() for leaf, t in shared.items()}
            key = json.dumps([template, sorted(marks.items())])
            part = parts.setdefault(
                key, {"template": template, "shared": shared, "rows": defaultdict(list), "stacks": defaultdict(list)}
            )
            for leaf, numbers in rows.items():
                if (key, leaf) not in used:  # the first call of this file in this group brings the file's rows
                    used.add((key, leaf))
                    part["stacks"][leaf].append(tensors[leaf])
                offset = sum(len(stack) for stack in part["stacks"][leaf][:-1])
                part["rows"][leaf] += [offset + number for number in numbers]

    @staticmethod
    def _join(part: dict, device: torch.device) -> Group:
        tensors = {leaf: torch.cat(stacks).to(device) for leaf, stacks in part["stacks"].items()}
        index = {leaf: torch.tensor(rows) for leaf, rows in part["rows"].items()}
        shared = {leaf: tensor.to(device) for leaf, tensor in part["shared"].items()}
        return Group(part["template"], tensors, shared, index, len(next(iter(index.values()))))

    def draw(self, size: int, generator: torch.Generator) -> dict[str, Any]:
        """Keyword arguments for one call of the denoiser on `size` random samples."""
        counts = torch.tensor([float(group.count) for group in self.groups])
        group = self.groups[int(torch.multinomial(counts, 1, generator=generator))]
        chosen = torch.randint(group.count, (size,), generator=generator)

        def fill(node: Any) -> Any:
            if isinstance(node, list):
                return [fill(item) for item in node]
            if not isinstance(node, dict):
                return node
            if "tensor" not in node:
                return {name: fill(value) for name, value in node.items()}
            leaf = node["tensor"]
            if node["shared"]:
                return group.shared[leaf]
            stack = group.tensors[leaf]
            return stack.index_select(0, group.index[leaf][chosen].to(stack.device, non_blocking=True))

        return fill(group.template)


def _strip(node: Any, tensors: dict, rows: dict, shared: dict) -> Any:
    """A call's template without row numbers, which are put aside."""
    if isinstance(node, list):
        return [_strip(item, tensors, rows, shared) for item in node]
    if not isinstance(node, dict):
        return node
    if "tensor" not in node:
        return {name: _strip(value, tensors, rows, shared) for name, value in node.items()}
    leaf = node["tensor"]
    if node["shared"]:
        shared[leaf] = tensors[leaf][node["rows"][0]]
    else:
        rows[leaf] = node["rows"]
    return {"tensor": leaf, "shared": node["shared"]}


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
