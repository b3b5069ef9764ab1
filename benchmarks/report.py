"""What every result file says of the machine it came from."""

import importlib.metadata
import json
import os
import re
import subprocess
from pathlib import Path

import torch


def gpu_name() -> str:
    """The GPU that a script measures; without one its last word."""
    if not torch.cuda.is_available():
        raise SystemExit("This measures an NVIDIA GPU, and torch sees none here.")
    return torch.cuda.get_device_name()


def environment() -> dict:
    """GPU, driver, library versions and the commit, for the head of a result file."""
    import diffusers
    import triton

    return {
        "gpu": gpu_name(),
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "diffusers": diffusers.__version__,
        "fla-core": _version("fla-core"),
        # A copy without its .git, as a build machine may have, names the commit in the variable.
        "commit": os.environ.get("GIT_COMMIT") or _first_line("git", "rev-parse", "--short", "HEAD"),
    }


def results_folder(gpu: str) -> Path:
    """Where results of a GPU of this name belong: results/h100 for "NVIDIA H100 80GB HBM3"."""
    words = re.sub(r"NVIDIA|AMD|GeForce|Tesla|Instinct", "", gpu).replace("-", " ").lower().split()
    last = next((i for i, word in enumerate(words) if re.search(r"\d", word)), len(words) - 1)
    return Path(__file__).parent / "results" / "".join(words[: last + 1])


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_line(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None
