"""Seconds to start against milliseconds a step: a patched model in eager mode, compiled by blocks, and as a whole.

    python benchmarks/startup.py                # the emoji pipeline's UNet on a CPU, a few minutes on a free core
    python benchmarks/startup.py --device cuda  # SD 1.5's UNet and Sana 1.6B with random weights, bfloat16, 5 minutes
    python benchmarks/startup.py --device cuda --only "*eager" --limit 100     # some of it, none longer

For each way, in a process of its own with empty caches of compiled code: the seconds of `patch(..., compile=...)` and
the first forward, the median of the forwards after that, and the seconds of the first forward at a second resolution;
in eager mode on a GPU the start of a second process too, whose caches the first has filled (`start_again_s`). A user
who draws more than (difference of starts) / (difference of steps) steps gains by compiling. Writes startup.json to
results/<gpu>, or results/cpu, after every row; a process that --limit ends leaves what it had measured.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
WAYS = ("eager", "regional", "full")
MODELS = {
    "cpu": ("emoji UNet",),
    "cuda": ("SD 1.5 UNet 1024px", "Sana 1.6B 1024px"),
}


def build(name: str):
    """A model and its inputs at two resolutions."""
    import diffusers
    import torch

    def randn(*shape):
        return torch.randn(*shape)

    def unet(latents, text, width):
        return dict(sample=randn(2, 4, latents, latents), timestep=torch.tensor([3.0, 3.0]),
                    encoder_hidden_states=randn(2, text, width), return_dict=False)  # fmt: skip

    if name == "emoji UNet":
        model = diffusers.UNet2DConditionModel.from_pretrained(ROOT / "examples" / "emoji" / "model", subfolder="unet")
        return model, [unet(size, 16, 256) for size in (32, 48)]
    if name == "SD 1.5 UNet 1024px":
        config = dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        return diffusers.UNet2DConditionModel(**config), [unet(size, 77, 768) for size in (128, 96)]
    model = diffusers.SanaTransformer2DModel()
    inputs = [
        dict(hidden_states=randn(2, 32, size, size), encoder_hidden_states=randn(2, 300, 2304),
             timestep=torch.tensor([3.0, 3.0]), return_dict=False)
        for size in (32, 24)
    ]  # fmt: skip
    return model, inputs


def measure(name: str, way: str, device: str, core: str | None) -> Iterator[dict]:
    """In its own process: importing torch and building the model do not count. Yields each figure once it is known."""
    import torch

    import diffattn

    warnings.simplefilter("ignore")
    with torch.device(device):
        model, resolutions = build(name)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = model.to(device, dtype).eval()
    place = [
        {k: t.to(device, dtype if t.is_floating_point() else None) if isinstance(t, torch.Tensor) else t
         for k, t in inputs.items()}
        for inputs in resolutions
    ]  # fmt: skip

    def seconds(call) -> float:
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    with torch.no_grad():
        # Kernels of torch's own start up too, which is no matter of compiling.
        if device == "cuda":
            torch.mm(*(torch.ones(64, 64, device=device, dtype=dtype) for _ in range(2)))
            torch.cuda.synchronize()
        mode = None if way == "eager" else way
        start = seconds(lambda: (diffattn.patch(model, core, compile=mode), model(**place[0])))
        yield {"start_s": round(start, 2)}
        steps, until = [], time.perf_counter() + 5
        seconds(lambda: model(**place[0]))
        while len(steps) < 5 or (time.perf_counter() < until and len(steps) < 100):
            steps.append(seconds(lambda: model(**place[0])))
        yield {"step_ms": round(1e3 * statistics.median(steps), 3), "steps": len(steps)}
        yield {"second_resolution_s": round(seconds(lambda: model(**place[1])), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", action="append", help='glob over "model, way"; may be repeated')
    parser.add_argument("--limit", type=float, help="seconds after which a process is ended, and its row says so")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, way, core = options.one
        for figures in measure(name, way, options.device, None if core == "exact" else core):
            print(json.dumps(figures), flush=True)
        return

    import torch
    from report import environment, gpu_name, results_folder, write_json
    from timing import chosen

    cases = [f"{name}, {way}" for name in MODELS[options.device] for way in WAYS]
    if not any(chosen(case, options.only) for case in cases):
        parser.error(f"--only: {options.only} matches none of {'; '.join(cases)}")

    if options.device == "cuda":
        about, folder = environment(), results_folder(gpu_name())
    else:
        # torch has its own count; the one here is what the process may use.
        about = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 1),
                 "torch": torch.__version__}  # fmt: skip
        folder = Path(__file__).parent / "results" / "cpu"
    rows = []
    for name in MODELS[options.device]:
        core = "exact" if "Sana" in name else "linear"
        for way in (way for way in WAYS if chosen(f"{name}, {way}", options.only)):
            if way == "regional" and "Sana" in name:
                rows.append({"model": name, "way": way, "failed": "diffusers names no repeated blocks of it"})
                continue
            with tempfile.TemporaryDirectory() as cache:
                command = [sys.executable, __file__, "--device", options.device, "--one", name, way, core]
                paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
                environ = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache,
                                        "PYTHONPATH": paths}  # fmt: skip
                row = {"model": name, "core": core, "way": way} | in_a_process(command, environ, options.limit)
                if way == "eager" and options.device == "cuda":
                    # all later starts on a machine: Triton finds its kernels compiled
                    row["start_again_s"] = in_a_process(command, environ, options.limit).get("start_s")
            rows.append(row)
            print(row, flush=True)
            write_json((options.out or folder) / "startup.json", {"environment": about, "rows": rows})


def in_a_process(command: list[str], environ: dict[str, str], limit: float | None) -> dict:
    """All figures that it prints, a JSON object a line, and why it ended before the last."""
    try:
        done = subprocess.run(command, capture_output=True, env=environ, timeout=limit)
        failed = {"failed": done.stderr.decode()[-300:]} if done.returncode else {}
    except subprocess.TimeoutExpired as error:
        done, failed = error, {"failed": f"not done after {limit:g} s"}
    row = {}
    for line in (done.stdout or b"").splitlines():
        if line.startswith(b"{"):
            row |= json.loads(line)
    return row | failed


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
