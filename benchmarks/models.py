"""Whole denoisers, stock against patched, on the same inputs in one process.

    python benchmarks/models.py --out benchmarks/results/<gpu>

Random weights, since speed does not depend on them. Each case runs stock and patched in turn; the exact
ones are first compared with stock. Writes models.json.
"""

import argparse
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from report import environment, write_json
from torch import nn

import diffattn


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict]
    core: str | None = None  # None: the exact patch


def build(name: str, **config) -> nn.Module:
    import diffusers

    return getattr(diffusers, name)(**config)


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def sana_inputs(latent: int) -> dict:
    return {
        "hidden_states": rand(2, 32, latent, latent),
        "encoder_hidden_states": rand(2, 300, 2304),
        "timestep": torch.tensor([500, 500], device="cuda"),
        "encoder_attention_mask": torch.ones(2, 300, device="cuda", dtype=torch.long),
    }


def unet_inputs(latent: int, text: int = 768) -> dict:
    return {
        "sample": rand(2, 4, latent, latent),
        "timestep": torch.tensor(500, device="cuda"),
        "encoder_hidden_states": rand(2, 77, text),
    }


def lumina2_inputs(latent: int) -> dict:
    return {
        "hidden_states": rand(2, 16, latent, latent),
        "timestep": torch.tensor([0.5, 0.5], device="cuda"),
        "encoder_hidden_states": rand(2, 256, 2304),
        "encoder_attention_mask": torch.ones(2, 256, device="cuda", dtype=torch.long),
    }


def build_sd15() -> nn.Module:
    return build("UNet2DConditionModel", sample_size=64, cross_attention_dim=768, attention_head_dim=8)


CASES = [
    Case("Sana 1.6B 1024px", lambda: build("SanaTransformer2DModel"), lambda: sana_inputs(32)),
    Case("Sana 1.6B 4096px", lambda: build("SanaTransformer2DModel"), lambda: sana_inputs(128)),
    Case(
        "Lumina 2 1024px",
        lambda: build("Lumina2Transformer2DModel", cap_feat_dim=2304),
        lambda: lumina2_inputs(128),
    ),
    Case("DreamLite 1024px", lambda: build("DreamLiteUNetModel"), lambda: unet_inputs(128, 2048)),
    Case("SD 1.5 UNet 2048px, linear (converted)", build_sd15, lambda: unet_inputs(256), core="linear"),
]


def forward(model: nn.Module, inputs: dict) -> torch.Tensor:
    return model(**inputs, return_dict=False)[0]


def milliseconds(model: nn.Module, inputs: dict, steps: int = 4) -> float:
    """Of one forward among several in a row, as a pipeline's steps come: the CPU may run ahead of the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(steps):
        forward(model, inputs)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / steps


@torch.no_grad()
def measure(case: Case, repeats: int) -> dict:
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = case.build().to(torch.bfloat16).eval()
    inputs = case.inputs()
    stock = forward(model, inputs)
    times: dict[str, list[float]] = {"stock": [], "patched": []}
    peaks: dict[str, float] = {}
    error, installed = None, {}
    for repeat in range(repeats + 1):
        for variant, milli in times.items():
            if variant == "patched":
                handle = diffattn.patch(model, case.core)
                installed = handle.installed
                if repeat == 0:
                    out = forward(model, inputs)
                    error = ((out - stock).float().norm() / stock.float().norm()).item()
            torch.cuda.reset_peak_memory_stats()
            duration = milliseconds(model, inputs)
            if repeat > 0:  # the first round warms up
                milli.append(duration)
                peaks[variant] = torch.cuda.max_memory_allocated() / 1e9
            diffattn.unpatch(model)

    def summary(milli: list[float]) -> dict:
        p20, median, p80 = (statistics.quantiles(milli, n=10)[i] for i in (1, 4, 7))
        return {"p20": p20, "median": median, "p80": p80}

    rows = {variant: summary(milli) | {"peak_gb": peaks[variant]} for variant, milli in times.items()}
    return {
        "case": case.name,
        "kind": "exact" if case.core is None else f"converted, {case.core}",
        "layers": len(installed),
        "relative_difference": error,
        "speedup": rows["stock"]["median"] / rows["patched"]["median"],
        **rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for models.json")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="diffattn: ")
    head = {"environment": environment(), "batch": 2, "dtype": "bfloat16"}
    rows = []
    for case in CASES:
        try:
            row = measure(case, args.repeats)
            stock, patched = row["stock"]["median"], row["patched"]["median"]
            print(
                f"{case.name:<42} stock {stock:8.1f} ms  patched {patched:8.1f} ms  {row['speedup']:.2f}x  "
                f"difference {row['relative_difference']:.1e}",
                flush=True,
            )
        except Exception as error:  # a case that cannot run is a row with its reason
            row = {"case": case.name, "failed": f"{type(error).__name__}: {error}"}
            print(row, flush=True)
        rows.append(row)
        torch.cuda.empty_cache()
        write_json(args.out / "models.json", head | {"rows": rows})


if __name__ == "__main__":
    main()
