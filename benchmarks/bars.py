"""What the project set out to reach, beside what the result files say.

    python benchmarks/bars.py --results benchmarks/results/<gpu>

Prints a line a bar: its limit, the worst case and its figure. Reads kernels*.json, models.json (eager),
models_compiled*.json (compiled) and linfusion.json, draws on nothing else; a bar whose rows are not there is printed
as not measured.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

SDPA = ("flash", "cuDNN", "efficient", "flash, heads repeated", "cuDNN, heads repeated")


def rows_of(folder: Path, pattern: str) -> list[dict]:
    return [row for path in sorted(folder.glob(pattern)) for row in json.loads(path.read_text())["rows"]]


class Rows:
    """The rows of kernels*.json that ran, by section."""

    def __init__(self, folder: Path):
        self.rows = [row for row in rows_of(folder, "kernels*.json") if "candidates" in row]

    def of(self, section: str) -> Iterator[tuple[str, dict, dict]]:
        """(case, shape, candidates that ran and compute the formula)."""
        for row in self.rows:
            if row["section"] == section:
                ran = {n: e for n, e in row["candidates"].items() if "median" in e and "wrong" not in e}
                yield row["case"], row["shape"], ran


def ratios(rows, section, over, under, condition=lambda shape: True) -> Iterator[tuple[float, str]]:
    """median(over) / median(under); each a name, or several of which the fastest counts."""
    for case, shape, ran in rows.of(section):
        times = [
            min((ran[n]["median"] for n in ([names] if isinstance(names, str) else names) if n in ran), default=None)
            for names in (over, under)
        ]
        if None not in times and condition(shape):
            yield times[0] / times[1], case


def field(rows, section, name, key, condition=lambda shape: True) -> Iterator[tuple[float, str]]:
    return (
        (ran[name][key], case)
        for case, shape, ran in rows.of(section)
        if key in ran.get(name, {}) and condition(shape)
    )


def kernel_bars(rows: Rows) -> Iterator[tuple[str, str, float, list[tuple[float, str]]]]:
    """(what, "most" or "least", limit, what was measured)."""
    wide = {32, 64, 128}
    head_first, channel_first = "ours, (B, H, N, D) memory", "ours, channel-first memory"
    yield (
        "linear forward, D 32, 64, 128, N >= 16K: times the floor",
        *("most", 1.15),
        [*field(rows, "linear", "ours", "of_floor", lambda s: s["D"] in wide and s["N"] >= 16384)],
    )
    yield (
        "linear forward, other head dims, N >= 16K: times the floor",
        *("most", 1.35),
        [*field(rows, "linear", "ours", "of_floor", lambda s: s["D"] not in wide and s["N"] >= 16384)],
    )
    yield (
        "linear forward, DC-AE's channel-first memory, N >= 16K: times the floor",
        *("most", 1.15),
        [*field(rows, "linear", channel_first, "of_floor", lambda s: s["N"] >= 16384)],
    )
    sana = lambda s: (s["N"], s["H"], s["D"]) == (1024, 70, 32)  # noqa: E731
    yield "Sana 1024px from a CUDA graph: ms", "most", 0.020, [*field(rows, "graph", "ours", "median", sana)]
    yield "(B, N, H, D) over (B, H, N, D)", "most", 1.0, [*ratios(rows, "linear", "ours", head_first)]
    yield (
        "linear forward over the best peer",
        *("most", 1.0),
        [*ratios(rows, "linear", "ours", [n for n in peers(rows, "linear")])],
    )
    yield "forward + backward: times the floor", "most", 1.3, [*field(rows, "training", "ours", "of_floor")]
    yield (
        "forward + backward: memory over the least",
        "most",
        1.05,
        [*field(rows, "training", "ours", "of_least_memory")],
    )
    yield (
        "forward + backward over compiled einsum",
        *("most", 1.0),
        [*ratios(rows, "training", "ours", "bf16 einsum, compiled")],
    )
    yield (
        "forward + backward over fla-core",
        *("most", 1.0),
        [*ratios(rows, "fla-training", "ours", "fla-core, last causal state")],
    )
    chunkwise = [f"fla-core, {name}" for name in ("chunk_linear_attn", "chunk_retention", "chunk_simple_gla")]
    yield "causal forward over fla-core", "most", 1.3, [*ratios(rows, "causal", "ours", chunkwise)]
    yield (
        "causal forward, both directions over one",
        *("most", 1.8),
        [*ratios(rows, "causal", "ours, both directions", "ours")],
    )
    yield "causal step: times the floor", "most", 1.5, [*field(rows, "causal-step", "ours", "of_floor")]
    yield "causal step over torch's reading and writing its states", "most", 1.5, [*over_states(rows)]
    yield "gqa_attention over torch's best kernel", "most", 1.03, [*ratios(rows, "softmax", "ours", SDPA)]
    long = lambda s: s["D"] in (64, 128) and s["N"] >= 4096  # noqa: E731
    yield (
        "flex over our Triton kernel, D 64, 128",
        "least",
        1.1,
        [*ratios(rows, "softmax", "flex, compiled", "ours, Triton", long)],
    )
    yield (
        "cuDNN over our Triton kernel, D 64, 128",
        "least",
        0.9,
        [*ratios(rows, "softmax", "cuDNN", "ours, Triton", long)],
    )
    int8 = lambda s: s["D"] == 128 and s["N"] >= 16000  # noqa: E731
    yield "cuDNN over our int8, D 128", "least", 1.3, [*ratios(rows, "softmax", "cuDNN", "ours, int8", int8)]
    yield "qk-norm + RoPE: times the floor", "most", 1.2, [*field(rows, "norm-rope", "ours", "of_floor")]


def over_states(rows: Rows) -> Iterator[tuple[float, str]]:
    for row in rows.rows:
        step, alone = (row["candidates"].get(name, {}).get("median") for name in ("ours", "the states alone"))
        wrong = "wrong" in row["candidates"].get("ours", {})
        if row["section"] == "causal-step" and None not in (step, alone) and not wrong:
            yield step / alone, row["case"]


def peers(rows: Rows, section: str) -> list[str]:
    return list({n: None for _, _, ran in rows.of(section) for n, e in ran.items() if not e["ours"]})


def model_bars(rows: list[dict], compiled: list[dict]) -> Iterator[tuple[str, str, float, list[tuple[float, str]]]]:
    inner = [row["compiled"] | {"case": row["case"]} for row in compiled if "speedup" in row.get("compiled", {})]
    for mode, found, case, limit in (
        ("eager", rows, "Sana 1.6B 1024px", 1.55),
        ("eager", rows, "Sana 1.6B 4096px", 1.25),
        ("compiled", inner, "Sana 1.6B 1024px", 1.11),
        ("compiled", inner, "Sana 1.6B 4096px", 1.13),
        ("eager", rows, "SD 1.5 UNet 2048px, linear (converted)", 2.8),
        ("eager", rows, "SD 1.5 UNet 4096px, linear (converted)", 9),
        ("eager", rows, "Lumina 2 1024px", 1.25),
        ("eager", rows, "DC-AE decode 2048px", 1.08),
    ):
        figures = [
            (row["speedup"], f"bound {row.get('bound', '?')}")
            for row in found
            if row["case"] == case and "failed" not in row
        ]
        yield f"{case}, {mode}: times as fast as stock", "least", limit, figures


def linfusion_bars(rows: list[dict]) -> Iterator[tuple[str, str, float, list[tuple[float, str]]]]:
    figures = [(row["speedup"], row["case"]) for row in rows if "speedup" in row]
    yield "UNets with LinFusion's weights: times as fast as LinFusion's modules", "least", 1.0, figures


def line(what: str, kind: str, limit: float, figures: list[tuple[float, str]]) -> str:
    if not figures:
        return f"  ?   {what}: {kind} {limit:g}, not measured"
    worst, case = max(figures) if kind == "most" else min(figures)
    met = worst <= limit if kind == "most" else worst >= limit
    return f"{'  ok' if met else 'MISS'}  {what}: at {kind} {limit:g}, {worst:.4g} ({case}; {len(figures)} measured)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    results = parser.parse_args().results
    for bar in kernel_bars(Rows(results)):
        print(line(*bar))
    for bar in model_bars(rows_of(results, "models.json"), rows_of(results, "models_compiled*.json")):
        print(line(*bar))
    for bar in linfusion_bars(rows_of(results, "linfusion.json")):
        print(line(*bar))


if __name__ == "__main__":
    main()
