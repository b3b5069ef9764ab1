"""Search for the fastest launch configuration of a kernel where `config.autotune` asks for it, and keep it on disk."""

import functools
import json
import os
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from diffattn._config import config


def cache_path() -> Path:
    """Where results are kept: `DIFFATTN_CACHE`, else `diffattn` in the user's cache folder."""
    folder = os.environ.get("DIFFATTN_CACHE")
    if folder:
        return Path(folder) / "autotune.json"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffattn" / "autotune.json"


def size_class(n: int) -> int:
    """Sizes up to the same power of two share a configuration."""
    return 1 << max(0, n - 1).bit_length()


def tuned(
    kernel: str, key: tuple, default: tuple, candidates: Iterable[tuple], run: Callable[[tuple], object]
) -> tuple:
    """The choice whose `run` is fastest on the current GPU; `default` unless `config.autotune` is set.

    A choice that does not compile or needs more than the GPU has is left out. Under stream capture nothing is timed:
    what is not known yet runs with `default`.

    Args:
        kernel: its name.
        key: what the choice depends on besides the GPU; JSON has to hold it.
        default: the choice of the kernel's table, timed like the others.
        candidates: other choices, tuples of integers of the type of `default`.
        run: launches the kernel with a choice.
    """
    if not config.autotune:
        return default
    name = json.dumps([_environment(), kernel, *key])
    known = _known(cache_path())
    if name not in known:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return default
        known[name] = list(_fastest(dict.fromkeys((default, *candidates)), run))
        _keep(cache_path(), name, known[name])
    return getattr(default, "_make", tuple)(known[name])


def _fastest(choices: Iterable[tuple], run: Callable[[tuple], object]) -> tuple:
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources

    times = {}
    for choice in choices:
        try:
            times[choice] = _milliseconds(functools.partial(run, choice))
        except (CompilationError, OutOfResources) as error:
            refused = error
    if not times:
        raise refused
    return min(times, key=times.get)


def _milliseconds(call: Callable[[], object]) -> float:
    """Median of a few runs, after one that compiles."""
    call()
    marks = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        marks.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in marks)


@functools.cache
def _environment() -> str:
    import triton

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "interpreter"
    return f"{gpu}, triton {triton.__version__}"


@functools.cache
def _known(path: Path) -> dict[str, list[int]]:
    try:
        known = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is not what DIFFATTN_AUTOTUNE wrote ({error}): delete it to search anew") from error
    return known


def _keep(path: Path, name: str, choice: list[int]) -> None:
    """Add one result to the file, which another process may have written to in the meantime."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = (json.loads(path.read_text()) if path.is_file() else {}) | {name: choice}
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(known, indent=1) + "\n")
    part.replace(path)
