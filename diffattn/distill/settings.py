"""What a distillation is asked to do, checked before anything heavy, and remembered beside its checkpoint."""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffattn.distill.trajectories import Sampling

TRAIN = ("core", "projections", "lora")
PRECISIONS = ("no", "fp16", "bf16")
#: May differ when a run is gone on with: they change when it stops and what it shows, not what it computes.
FREE = ("minutes", "preview_every", "preview_prompts", "checkpoint_every", "push_to", "cache", "license")


class DistillError(RuntimeError):
    """Training cannot go on; the message says why and which checkpoint is sound."""


@dataclass(frozen=True)
class Settings:
    """How to train. `distill` documents each."""

    steps: tuple[int, int] = (500, 2000)
    batch: int = 8
    accumulate: int = 1
    learning_rate: tuple[float, float] = (1e-3, 5e-4)
    weight_decay: float = 0.0
    feature_weight: float = 1.0
    train: str = "projections"
    rank: int = 16
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    seed: int = 0
    minutes: float | None = None
    checkpoint_every: int = 100
    preview_every: int = 250
    preview_prompts: int = 4
    push_to: str | None = None
    cache: str | None = None
    license: str | None = None

    def __post_init__(self):
        for name in ("batch", "accumulate", "rank", "checkpoint_every", "preview_every"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected a positive integer")
        if not _pair_of(int, self.steps) or min(self.steps) < 0 or sum(self.steps) < 1:
            raise ValueError(f"steps: got {self.steps!r}, expected the steps of stage 1 and 2, at least one in all")
        if not _pair_of((int, float), self.learning_rate) or not all(0 < x < math.inf for x in self.learning_rate):
            raise ValueError(f"learning_rate: got {self.learning_rate!r}, expected two positive numbers")
        if self.train not in TRAIN:
            raise ValueError(f"train: got {self.train!r}, expected one of {', '.join(TRAIN)}")
        if self.mixed_precision not in PRECISIONS:
            raise ValueError(f"mixed_precision: got {self.mixed_precision!r}, expected one of {', '.join(PRECISIONS)}")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"minutes: got {self.minutes!r}, expected a positive number or None")


def _pair_of(kind: Any, value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(x, kind) for x in value)


def read_prompts(path: str | Path) -> tuple[str, ...]:
    """One prompt a line; empty lines do not count.

    Raises: FileNotFoundError, ValueError for a file without a prompt or that is no text.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"prompts: there is no file {path}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"prompts: {path} is no text file in UTF-8") from None
    return check_prompts([line.strip() for line in lines if line.strip()], str(path))


def check_prompts(prompts: Any, where: str = "the list") -> tuple[str, ...]:
    if isinstance(prompts, str):
        raise TypeError(f"prompts: got the text {prompts!r}, expected a list of texts")
    prompts = tuple(prompts)
    if not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise ValueError(f"prompts: {where} has none, or an empty one; expected one text or more, one a line")
    return prompts


def describe(core: Any, layers: Any, model: str, sampling: Sampling, settings: Settings) -> dict[str, Any]:
    """What decides a run's losses, as JSON; two runs with equal descriptions are the same run."""
    chosen = {k: v for k, v in dataclasses.asdict(settings).items() if k not in FREE}
    drawn = {k: v for k, v in vars(sampling).items() if k != "prompts"}
    prompts = hashlib.sha256("\n".join(sampling.prompts).encode()).hexdigest()[:16]
    if callable(layers):
        selected = getattr(layers, "__name__", type(layers).__name__)
    else:
        selected = layers if layers is None or isinstance(layers, str) else list(layers)
    description = {
        "model": model[:16],
        "core": repr(core),
        "layers": selected,
        "prompts": f"{len(sampling.prompts)} with sha256 {prompts}",
        "sampling": drawn,
        "settings": chosen,
    }
    return json.loads(json.dumps(description))


def claim(folder: Path, description: dict[str, Any]) -> None:
    """Make a folder a run's own, or find that it is.

    Raises: ValueError where it holds another run, or files that no run wrote.
    """
    path = folder / "run" / "run.json"
    if not path.exists():
        if folder.exists() and any(folder.iterdir()):
            names = ", ".join(sorted(p.name for p in folder.iterdir())[:3])
            raise ValueError(f"out: {folder} is not empty ({names}, ...) and holds no run to go on with")
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, json.dumps(description, indent=2))
        return
    found = json.loads(path.read_text())
    if found != description:
        here, there = _flat(description), _flat(found)
        names = [name for name in here | there if here.get(name) != there.get(name)]
        changed = [f"{name}: {there.get(name)!r} there, {here.get(name)!r} now" for name in names]
        raise ValueError(f"out: {folder} holds another run ({'; '.join(changed)}); name another folder")


def write(path: Path, text: str) -> None:
    """Write then rename: a reader, or a run killed here, finds the old file or the new one."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(text)
    partial.replace(path)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
