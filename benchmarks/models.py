"""Whole models, stock against patched, on the same inputs in one process, and what no kernel could go beyond.

    python benchmarks/models.py

Random weights, since speed does not depend on them. Each case runs these in turn, after a check that the exact ones
agree with stock: stock; patched; and "no core", where the layers that the patch takes do all they did but attend, so
that its speed-up is the bound of any attention kernel. For each, the time of a forward among several in a row (as a
pipeline's steps come), the time that the GPU is busy in it, the time until the CPU has launched it (a small model in
eager mode is bound by that), peak memory, and the kernels that take most. Writes models.json to results/<gpu>. Cases
that would start after --seconds are left out, and listed; --only takes globs over their names.
"""

import argparse
import gc
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from report import environment, gpu_name, results_folder, write_json
from timing import Deadline, chosen, digits, reason, summary
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import diffattn
from diffattn.cores import AttentionCore
from diffattn.patch import find_layers

VARIANTS = ("stock", "patched", "no_core")


@dataclass(frozen=True)
class Case:
    """A model at a size.

    Attributes:
        core: of the patch; None is the exact one.
        layers: that the patch may take; None is all.
        method: `"forward"`, or `"decode"` for an autoencoder.
        compiled: measured compiled as well.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict]
    core: str | None = None
    layers: str | None = None
    method: str = "forward"
    batch: int = 2
    compiled: bool = False


@torch.library.custom_op("diffattn_benchmarks::no_core", mutates_args=())
def no_core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty((*q.shape[:3], v.shape[3]))


@no_core.register_fake
def _(q, k, v):
    return q.new_empty((*q.shape[:3], v.shape[3]))


class NoCore(AttentionCore):
    """Returns something of the output's shape without any work."""

    def forward(self, q, k, v, *, mask=None, scale=None, rotate=None):
        # An operator in the compiler's eyes: it would drop the projections of tensors that nothing reads.
        if torch.compiler.is_compiling():
            return no_core(q, k, v)
        if q.shape[3] == v.shape[3] and q.is_contiguous():
            return q
        return q.new_empty((*q.shape[:3], v.shape[3]))

    def formula(self, heads, kv_heads):
        return ("no core",)

    def config(self):
        return {}


def build(name: str, **config) -> nn.Module:
    import diffusers

    return getattr(diffusers, name)(**config)


def build_sana() -> nn.Module:
    return build("SanaTransformer2DModel")


def build_sd15() -> nn.Module:
    return build("UNet2DConditionModel", sample_size=64, cross_attention_dim=768, attention_head_dim=8)


def build_dcae() -> nn.Module:
    """Sana's autoencoder, as huggingface/diffusers scripts/convert_dcae_to_diffusers.py configures it."""
    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    return build(
        "AutoencoderDC",
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def steps(*values: float) -> Tensor:
    return torch.tensor(values, device="cuda")


def text_mask(length: int) -> Tensor:
    return torch.ones(2, length, device="cuda", dtype=torch.long)


def sana_inputs(latent: int) -> dict:
    return {
        "hidden_states": rand(2, 32, latent, latent),
        "encoder_hidden_states": rand(2, 300, 2304),
        "timestep": steps(500, 500),
        "encoder_attention_mask": text_mask(300),
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
        "timestep": steps(0.5, 0.5),
        "encoder_hidden_states": rand(2, 256, 2304),
        "encoder_attention_mask": text_mask(256),
    }


def stable_audio_inputs() -> dict:
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    # 47 s of sound; the global token comes first, and half of each head is rotated
    rotary = get_1d_rotary_pos_embed(32, 1025, use_real=True, repeat_interleave_real=False)
    return {
        "hidden_states": rand(2, 64, 1024),
        "timestep": steps(500, 500),
        "encoder_hidden_states": rand(2, 130, 768),
        "global_hidden_states": rand(2, 1, 1536),
        "rotary_embedding": tuple(table.cuda() for table in rotary),
    }


CASES = [
    Case("Sana 1.6B 1024px", build_sana, lambda: sana_inputs(32), compiled=True),
    Case("Sana 1.6B 4096px", build_sana, lambda: sana_inputs(128), compiled=True),
    Case(
        "Lumina 2 1024px",
        lambda: build("Lumina2Transformer2DModel", cap_feat_dim=2304),
        lambda: lumina2_inputs(128),
    ),
    # The blocks' heads are 64 wide; the configuration class, left alone, takes 64 heads.
    Case(
        "DreamLite 1024px",
        lambda: build("DreamLiteUNetModel", attention_head_dim=(5, 10, 20)),
        lambda: unet_inputs(128, 2048),
    ),
    Case("Stable Audio", lambda: build("StableAudioDiTModel"), stable_audio_inputs),
    Case(
        "DC-AE decode 2048px",
        build_dcae,
        lambda: {"z": rand(1, 32, 64, 64)},
        layers="decoder.*",
        method="decode",
        batch=1,
    ),
    Case("SD 1.5 UNet 2048px, linear (converted)", build_sd15, lambda: unet_inputs(256), core="linear"),
    Case("SD 1.5 UNet 4096px, linear (converted)", build_sd15, lambda: unet_inputs(512), core="linear"),
]


class Turns:
    """A model in several variants that are timed in turn: `switch` before a forward.

    Args:
        names: of the variants; by the first is found how many forwards fit.
    """

    def __init__(self, names: tuple[str, ...], model: nn.Module, inputs: dict, method: str = "forward"):
        self.names, self.model, self.inputs, self.method = names, model, inputs, method

    def switch(self, variant: str) -> None:
        raise NotImplementedError

    def forward(self) -> Tensor:
        # Only the call itself runs what model.compile() compiled.
        call = self.model if self.method == "forward" else getattr(self.model, self.method)
        return call(**self.inputs, return_dict=False)[0]

    def timed(self, forwards: int) -> tuple[float, float]:
        """Milliseconds of one forward among several in a row, where the CPU may run ahead of the GPU, and those until
        the last launch of the first one returned."""
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        before = time.perf_counter()
        self.forward()
        cpu = 1e3 * (time.perf_counter() - before)
        for _ in range(forwards - 1):
            self.forward()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / forwards, cpu

    def gpu_busy(self, most: int = 8) -> dict:
        """Milliseconds of all kernels of a forward, and the names of those that take most."""
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            self.forward()
            torch.cuda.synchronize()
        kernels = [e for e in trace.key_averages() if e.self_device_time_total > 0]
        kernels.sort(key=lambda e: -e.self_device_time_total)
        return {
            "gpu_ms": digits(sum(e.self_device_time_total for e in kernels) / 1e3),
            "launches": sum(e.count for e in kernels),
            "most": [[e.key[:90], e.count, digits(e.self_device_time_total / 1e3)] for e in kernels[:most]],
        }


class Variants(Turns):
    """One model as stock, patched or without its core."""

    def __init__(self, case: Case, model: nn.Module):
        super().__init__(VARIANTS, model, case.inputs(), case.method)
        self.layers = {layer.name: layer for layer in find_layers(model)}
        # The same processors at every switch: a compiler takes others for another model.
        with diffattn.patched(model, case.core, layers=case.layers) as handle:
            self.processors = {"stock": {}, "patched": handle.installed}
        with diffattn.patched(model, NoCore(), layers=list(handle.installed)) as handle:
            self.processors["no_core"] = handle.installed

    def switch(self, variant: str) -> None:
        for layer in self.layers.values():
            if layer.patched:
                layer.restore()
        for name, processor in self.processors[variant].items():
            self.layers[name].install(processor)


def compare(variants: Turns, seconds: float, forwards: int | None = None) -> dict[str, dict]:
    """The variants in turn, for about so many seconds each.

    Args:
        forwards: of a turn; as many as a quarter of a second holds, 4 to 8, if not given. With one alone the GPU waits
            for its first launches, as it does once a picture of many steps.
    """
    walls: dict[str, list[float]] = {variant: [] for variant in variants.names}
    cpus: dict[str, list[float]] = {variant: [] for variant in variants.names}
    rows: dict[str, dict] = {}
    for variant in variants.names:  # warms up, and finds out how long
        variants.switch(variant)
        variants.forward()
        torch.cuda.reset_peak_memory_stats()
        once, _ = variants.timed(1)
        rows[variant] = {"peak_gb": torch.cuda.max_memory_allocated() / 1e9}
        if variant == variants.names[0]:
            forwards = forwards or min(max(int(250 / once), 4), 8)
            rounds = min(max(int(1e3 * seconds / once / forwards), 3), 15)
    for _ in range(rounds):
        for variant in variants.names:
            variants.switch(variant)
            wall, cpu = variants.timed(forwards)
            walls[variant].append(wall)
            cpus[variant].append(cpu)
    for variant in variants.names:  # last, since a profiler may leave something behind
        variants.switch(variant)
        times = summary(walls[variant]) | {"cpu_ms": digits(statistics.median(cpus[variant]))}
        rows[variant] = times | variants.gpu_busy() | rows[variant]
    variants.switch(variants.names[0])
    return rows


def ratios(rows: dict[str, dict]) -> dict[str, float]:
    stock, patched, bare = (rows[variant] for variant in VARIANTS)
    return {
        "speedup": digits(stock["median"] / patched["median"]),
        "bound": digits(stock["median"] / bare["median"]),
        "gpu_speedup": digits(stock["gpu_ms"] / patched["gpu_ms"]),
        "gpu_bound": digits(stock["gpu_ms"] / bare["gpu_ms"]),
    }


@torch.no_grad()
def measure(case: Case, model: nn.Module, seconds: float, mode: str) -> dict:
    """One row. `mode`: "regional" (each transformer block) or "full" compilation, "graphs" (full, replayed from CUDA
    graphs: no launch by the CPU), or "none"."""
    torch.manual_seed(0)
    variants = Variants(case, model)
    stock = variants.forward().float()
    variants.switch("patched")
    difference = ((variants.forward() - stock).norm() / stock.norm()).item()
    row = {
        "case": case.name,
        "kind": "exact" if case.core is None else f"converted, {case.core}",
        "batch": case.batch,
        "layers": len(variants.processors["patched"]),
        "relative_difference": difference,
    }
    del stock
    rows = compare(variants, seconds)
    row |= rows | ratios(rows)
    if case.compiled and mode != "none":
        try:
            row["compiled"] = {"mode": mode} | compiled(variants, seconds, mode)
        except Exception as error:
            row["compiled"] = {"mode": mode, "failed": reason(error)}
    return row


def compiled(variants: Variants, seconds: float, mode: str) -> dict[str, dict]:
    """As `compare`, with the model compiled in place; each variant is a graph of its own."""
    model = variants.model
    torch._dynamo.reset()
    start = time.perf_counter()
    if mode in ("full", "graphs"):
        model.compile(fullgraph=True, mode="reduce-overhead" if mode == "graphs" else None)
    else:
        for block in model.transformer_blocks:
            block.compile(fullgraph=True)
    try:
        rows = compare(variants, seconds)
        return rows | ratios(rows) | {"seconds": round(time.perf_counter() - start, 1)}
    finally:
        variants.switch("stock")
        for module in model.modules():
            module._compiled_call_impl = None
        torch._dynamo.reset()


def line(row: dict, name: str) -> str:
    stock, patched, bare = (row[variant] for variant in VARIANTS)
    return (
        f"{name:<48} stock {stock['median']:8.2f} ms (GPU {stock['gpu_ms']:8.2f}, CPU {stock['cpu_ms']:7.2f})  "
        f"patched {patched['median']:8.2f} ({patched['gpu_ms']:8.2f}, {patched['cpu_ms']:7.2f})  "
        f"no core {bare['median']:8.2f} ({bare['gpu_ms']:8.2f}, {bare['cpu_ms']:7.2f})  "
        f"{row['speedup']:.3f}x of {row['bound']:.3f}x, GPU {row['gpu_speedup']:.3f}x of {row['gpu_bound']:.3f}x"
    )


def report(row: dict) -> None:
    if "failed" in row:
        print(f"{row['case']}: {row['failed']}", flush=True)
        return
    print(f"{line(row, row['case'])}  difference {row['relative_difference']:.1e}", flush=True)
    if "compiled" in row:
        inner = row["compiled"]
        name = f"{row['case']}, compiled ({inner['mode']})"
        print(f"{name}: {inner['failed']}" if "failed" in inner else line(inner, name), flush=True)


def run(out: Path, only: list[str] | None = None, seconds: float = 170, each: float = 2, mode: str = "regional"):
    """Run the cases, writing models.json after every row. Returns its content."""
    deadline = Deadline(seconds)
    warnings.simplefilter("ignore")
    rows: list[dict] = []
    left_out: list[str] = []
    head = {"environment": environment(), "batch": 2, "dtype": "bfloat16", "left_out": left_out, "rows": rows}
    model, built_by = None, None
    for case in CASES:
        if not chosen(case.name, only):
            continue
        if deadline.passed:
            left_out.append(case.name)
            continue
        try:
            if case.build is not built_by:
                model = None
                gc.collect()
                torch.cuda.empty_cache()
                with torch.device("cuda"):
                    model, built_by = case.build().to(torch.bfloat16).eval(), case.build
            row = measure(case, model, each, mode)
        except Exception as error:  # a case that cannot run is a row with its reason
            row = {"case": case.name, "failed": reason(error)}
            built_by = None  # whatever it left in the model
        rows.append(row)
        report(row)
        torch.cuda.empty_cache()
        write_json(out / "models.json", head | {"seconds": round(deadline.elapsed, 1)})
    if left_out:
        print(f"left out after {seconds:.0f} s: {', '.join(left_out)}", flush=True)
    return head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for models.json; results/<gpu> if not given")
    parser.add_argument("--only", action="append", help="glob over the cases' names; may be repeated")
    parser.add_argument("--seconds", type=float, default=170, help="start no case after this long")
    parser.add_argument("--each", type=float, default=2, help="seconds for a variant's timing")
    parser.add_argument("--compile", choices=("regional", "full", "graphs", "none"), default="regional")
    args = parser.parse_args()
    if not any(chosen(case.name, args.only) for case in CASES):
        parser.error(f"--only: {args.only} matches none of {', '.join(case.name for case in CASES)}")
    out = args.out or results_folder(gpu_name())
    run(out, args.only, args.seconds, args.each, args.compile)


if __name__ == "__main__":
    main()
