"""Every variant beside the softmax teacher, with the same captions and seeds: quality, time and memory.

    python examples/emoji/compare.py            # after distill.py; minutes on one H100

Each variant as it is without training, and distilled if model/distilled has it. Trained at 128 pixels, drawn at 128,
256 and 512. Rows are written to compare.json as they come; one of the same weights on the same device is not measured
again, so that a run that was cut off goes on. Then README.md with the rows as a table, a plot of quality against
steps, and a grid for each size.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import statistics
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from data import DATA, HERE
from diffusers import DiffusionPipeline
from measure import STEPS, Task, difference
from PIL import Image
from variants import VARIANTS

import diffattn
from diffattn.demo import Drawing, _peak_memory, grid

MODEL = HERE / "model"
SIZES = {128: 500, 256: 500, 512: 200}  # pixels: captions
SHOWN = 6


class Bench:
    """One pipeline, and the rows that were measured on it."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.folder = args, args.distilled or args.model / "distilled"
        self.path = self.folder / "compare.json"
        self.rows = json.loads(self.path.read_text()) if self.path.exists() else []
        cuda = torch.cuda.is_available()
        self.device = torch.cuda.get_device_name() if cuda else "CPU"
        dtype = torch.bfloat16 if cuda else torch.float32
        self.pipe = DiffusionPipeline.from_pretrained(args.model, dtype=dtype).to("cuda" if cuda else "cpu")
        self.pipe.set_progress_bar_config(disable=True)
        self.common = {"device": self.device, "dtype": str(dtype).removeprefix("torch."), "sampling_steps": args.steps}
        self.common |= {"batch": args.batch, "torch": torch.__version__}

    def cases(self) -> list[tuple[str, bool, str]]:
        """(variant, distilled, what tells its weights from others)."""
        cases = [("softmax", False, "teacher")]
        for name, variant in VARIANTS.items():
            cases.append((name, False, repr(variant.core())))
            weights = self.folder / name / "diffattn.safetensors"
            if weights.exists():
                cases.append((name, True, hashlib.sha256(weights.read_bytes()).hexdigest()[:16]))
        return cases

    @contextlib.contextmanager
    def converted(self, name: str, distilled: bool):
        if name == "softmax":
            yield
            return
        what = {"weights": str(self.folder / name)} if distilled else {"core": VARIANTS[name].core()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="diffattn: ", category=UserWarning)
            with diffattn.patched(self.pipe, **what):
                yield

    def run(self, deadline: float) -> bool:
        """Measure what is not measured yet. Returns: whether nothing is left."""
        for size in self.args.sizes:
            task = Task.load(self.args.captions or SIZES[size], self.args.data)
            wanted = {case[:2]: self.key(task, size, *case) for case in self.cases()}
            missing = {
                case: key for case, key in wanted.items() if not any(key.items() <= r.items() for r in self.rows)
            }
            teacher = None
            for (name, distilled), key in missing.items():
                if time.monotonic() > deadline:
                    return False
                if teacher is None and name != "softmax":
                    teacher = self.draw(task, size)
                self.rows = [r for r in self.rows if any(r[k] != key[k] for k in ("variant", "distilled", "size"))]
                start = time.monotonic()
                with self.converted(name, distilled):
                    pictures = self.draw(task, size)
                    seconds = round(time.monotonic() - start, 1)
                    cost = self.cost(task, size)
                teacher = pictures if name == "softmax" else teacher
                row = key | {"top1": task.top1(pictures), **difference(pictures, teacher), **cost, "seconds": seconds}
                self.rows.append(row)
                self.save_pictures(self.pictures(name, distilled, size), pictures[:SHOWN])
                partial = self.path.with_suffix(".part")
                partial.write_text(json.dumps(self.rows, indent=1) + "\n")
                partial.replace(self.path)
                print(line(row), flush=True)
        return True

    def key(self, task: Task, size: int, name: str, distilled: bool, weights: str) -> dict:
        """What a row was measured on: one with an equal key need not be measured again."""
        case = {"variant": name, "distilled": distilled, "size": size, "captions": len(task.prompts)}
        return case | {"weights": weights, **self.common}

    def pictures(self, name: str, distilled: bool, size: int) -> Path:
        return self.args.pictures / f"{name}{'-distilled' if distilled else ''}-{size}.png"

    def draw(self, task: Task, size: int) -> np.ndarray:
        # Fewer at once where they are large: the VAE decodes all of a batch.
        batch = max(1, self.args.batch * 128 * 128 // size**2)
        return task.draw(self.pipe, size=size, steps=self.args.steps, batch=batch)

    def cost(self, task: Task, size: int) -> dict:
        """Milliseconds a step of eight pictures (16 samples, guided), and peak memory, in a call of their own."""
        cuda, times = self.pipe.device.type == "cuda", []

        def tick(_pipe, _step, _time, tensors):
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter())
            return tensors

        prompts = (task.prompts * 8)[:8]
        options = dict(num_inference_steps=self.args.steps, height=size, width=size, output_type="latent")
        self.pipe(prompts, **options)
        with _peak_memory(cuda) as peak:
            self.pipe(prompts, callback_on_step_end=tick, **options)
            peak_mb = peak()
        gaps = [1000 * (later - earlier) for earlier, later in itertools.pairwise(times)]
        return {"ms_per_step_of_8": statistics.median(gaps) if gaps else None, "peak_mb": peak_mb}

    def save_pictures(self, path: Path, pictures: np.ndarray) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.concatenate(pictures, axis=0)).save(path)

    def draw_grids(self) -> None:
        """One a size, a column for each row of the table. One whose pictures are not all there stays as it is."""
        for size in self.args.sizes:
            task = Task.load(SHOWN, self.args.data)
            drawings = []
            if not all(self.pictures(name, distilled, size).exists() for name, distilled, _ in self.cases()):
                continue
            for name, distilled, _ in self.cases():
                strip = Image.open(self.pictures(name, distilled, size))
                drawing = Drawing(name, "teacher" if name == "softmax" else "distilled" if distilled else "untrained")
                count = strip.height // size
                drawing.images = [strip.crop((0, i * size, size, (i + 1) * size)) for i in range(count)]
                drawings.append(drawing)
            grid(drawings, task.prompts[: len(drawings[0].images)]).save(self.folder / f"grid-{size}.png")


def line(row: dict) -> str:
    ms = "-" if row["ms_per_step_of_8"] is None else f"{row['ms_per_step_of_8']:.1f}"
    memory = "-" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
    return (
        f"{row['size']:>4} {row['variant']:<9}{kind(row):<10} top-1 {row['top1']:.1%}  mse {row['mse']:.4f}  "
        f"ssim {row['ssim']:.3f}  {ms} ms a step of 8  {memory} MB  ({row['seconds']} s for {row['captions']})"
    )


TABLE = """# What distilling gives

Attention of the emoji pipeline ([model card](../README.md)) in other forms, each as it is without training, and
distilled by `examples/emoji/distill.py`. Measured by `examples/emoji/compare.py` on one {device}, {dtype},
{steps} steps, torch {torch}. Top-1 is the share of pictures whose nearest emoji is of the family asked for; MSE (of
pixels in 0..1) and SSIM are from the softmax teacher's pictures with the same seeds; time and memory are of a step of
8 guided pictures, not compiled: on a GPU the CPU's launches decide the time of small ones.

{rows}

{bars}

The teacher was trained at 128 pixels. Larger pictures of it show no emoji, so that top-1 means nothing there; MSE and
SSIM say how near a variant stays to what softmax attention draws.

Training: {cost}.

![Quality against steps](quality.png)

![128 pixels](grid-128.png)

![256 pixels](grid-256.png)

![512 pixels](grid-512.png)
"""


def report(folder: Path, rows: list[dict]) -> str:
    """The text of README.md: a table of the rows, a size after the other."""
    lines = ["| pixels | attention | | captions | top-1 | MSE | SSIM | ms a step | MB |", "|" + "---|" * 9]
    for r in sorted(rows, key=lambda r: r["size"]):
        ms, mb = ("-" if r[name] is None else f"{r[name]:.0f}" for name in ("ms_per_step_of_8", "peak_mb"))
        figures = f"{r['top1']:.1%} | {r['mse']:.4f} | {r['ssim']:.3f} | {ms} | {mb}"
        lines.append(f"| {r['size']} | {r['variant']} | {kind(r)} | {r['captions']} | {figures} |")
    costs = []
    for name in VARIANTS:
        path = folder / name / "summary.json"
        if path.exists():
            s = json.loads(path.read_text())
            memory = f" and {s['peak_bytes'] / 1e9:.1f} GB" if s["peak_bytes"] else ""
            costs.append(f"{name} {sum(s['settings']['steps']):,} steps in {s['seconds'] / 60:.1f} minutes{memory}")
    first = {"device": rows[0]["device"], "dtype": rows[0]["dtype"], "torch": rows[0]["torch"]}
    text = "; ".join(bars(rows))
    return TABLE.format(
        **first,
        steps=rows[0]["sampling_steps"],
        rows="\n".join(lines),
        bars=f"Held to at 128 pixels: {text}." if text else "",
        cost="; ".join(costs) or "none yet",
    )


def kind(row: dict) -> str:
    return "teacher" if row["variant"] == "softmax" else "distilled" if row["distilled"] else "untrained"


def plot(folder: Path, path: Path) -> None:
    """Top-1 and MSE against steps, from each variant's quality.json; untrained rows of compare.json at step 0."""
    from matplotlib.figure import Figure

    rows = json.loads((folder / "compare.json").read_text())
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for number, name in enumerate(VARIANTS):
        quality = folder / name / "quality.json"
        if not quality.exists():
            continue
        points = json.loads(quality.read_text())
        start = [r for r in rows if r["variant"] == name and not r["distilled"] and r["size"] == 128]
        for axes, figure_of in zip(panels, ("top1", "mse"), strict=True):
            steps = [0] * len(start) + [p["step"] for p in points]
            values = [r[figure_of] for r in start] + [p[figure_of] for p in points]
            axes.plot(steps, values, marker="o", markersize=3, color=f"C{number}", label=name)
    teacher = [r["top1"] for r in rows if r["variant"] == "softmax" and r["size"] == 128]
    if teacher:
        panels[0].axhline(teacher[0], color="black", linewidth=0.8, label="softmax teacher")
    # The teacher and step 0 are of compare.json's captions, the previews while it learnt of fewer.
    titles = (
        "top-1; 200 captions, at step 0 and of the teacher 500",
        "mean squared error from the teacher's pictures",
    )
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("steps of both stages")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(0.5, 1)
    panels[1].set_yscale("log")
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def bars(rows: list[dict]) -> list[str]:
    """What the distilled variants are held to, at 128 pixels."""
    at_128 = [r for r in rows if r["size"] == 128]
    teacher = next((r["top1"] for r in at_128 if r["variant"] == "softmax"), None)
    lines = []
    for row in at_128 if teacher is not None else ():
        if row["distilled"]:
            needed = {"mqa": teacher - 0.01, "linear": 0.95 * teacher}.get(row["variant"], 0.98 * teacher)
            verdict = "holds" if row["top1"] >= needed else "does not hold"
            lines.append(f"{row['variant']}: top-1 {row['top1']:.1%}, bar {needed:.1%}: {verdict}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, default=MODEL)
    add("--data", type=Path, default=DATA)
    add("--distilled", type=Path, help="the variants' weights, and where the results go; default: <model>/distilled")
    add("--pictures", type=Path, default=HERE / "runs" / "pictures", help="the first of each row, for the grids")
    add("--sizes", type=int, nargs="+", default=list(SIZES))
    add("--captions", type=int, help="at every size; default: 500 at 128 and 256, 200 at 512")
    add("--steps", type=int, default=STEPS)
    add("--batch", type=int, default=100, help="pictures at once at 128 pixels")
    add("--minutes", type=float, default=1e9, help="begin nothing new after as long; start again to go on")
    args = parser.parse_args()
    torch.backends.cudnn.benchmark = torch.cuda.is_available()
    bench = Bench(args)
    bench.folder.mkdir(parents=True, exist_ok=True)
    finished = bench.run(time.monotonic() + 60 * args.minutes)
    bench.draw_grids()
    if bench.path.exists():
        plot(bench.folder, bench.folder / "quality.png")
        (bench.folder / "README.md").write_text(report(bench.folder, bench.rows), encoding="utf-8")
    print("\n".join(bars(bench.rows)))
    if not finished:
        print("The time for this run is over; start it again to go on.")


if __name__ == "__main__":
    main()
