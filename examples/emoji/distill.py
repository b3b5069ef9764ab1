"""Teach converted attention to draw the emoji that the pipeline draws with softmax attention.

    python examples/emoji/distill.py linear       # or mqa, sparse, window: minutes on one H100

Needs data/emoji.zip, for its captions and to score the student now and then; no picture of it is trained on. A run
that is cut off, or ended by --minutes, goes on where it stopped when started again. The finished weights, 8 MB at
most, go to model/distilled/<variant>, where `diffattn demo` and compare.py find them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import torch
from data import DATA, HERE, load
from diffusers import DiffusionPipeline
from measure import GUIDANCE, STEPS, Task, difference
from variants import VARIANTS

from diffattn.distill import distill
from diffattn.distill.card import RESULT_FILES, card

MODEL = HERE / "model"
SEED = 1_000_000  # of the trajectories: the score draws from seeds 0 to 499


class Watch:
    """Scores the student at every preview, for a plot of quality against steps."""

    def __init__(self, task: Task, path: Path, sampling_steps: int):
        self.task, self.path, self.sampling_steps, self.taught = task, path, sampling_steps, None

    def __call__(self, step: int, pipe, teacher) -> None:
        start = time.monotonic()
        if self.taught is None:
            with teacher():
                self.taught = self.task.draw(pipe, steps=self.sampling_steps)
        drawn = self.task.draw(pipe, steps=self.sampling_steps)
        row = {"step": step, "captions": len(drawn), "top1": self.task.top1(drawn)}
        row |= {"teacher_top1": self.task.top1(self.taught), **difference(drawn, self.taught)}
        rows = json.loads(self.path.read_text()) if self.path.exists() else []
        self.path.write_text(json.dumps([r for r in rows if r["step"] < step] + [row], indent=1) + "\n")
        print({k: round(v, 4) for k, v in row.items()}, f"{time.monotonic() - start:.0f} s", flush=True)


def export(run: Path, folder: Path) -> None:
    """A run's result and figures, without its checkpoint: weights in float16, paths as seen from the repository."""
    from safetensors.torch import load_file, save_file

    folder.mkdir(parents=True, exist_ok=True)
    for path in (*(run / name for name in RESULT_FILES), run / "run" / "quality.json"):
        if path.suffix == ".safetensors":
            tensors = {name: t.half() for name, t in load_file(path).items()}
            save_file(tensors, folder / path.name, metadata={"format": "pt"})
        elif path.exists():
            shutil.copyfile(path, folder / path.name)
    summary = json.loads((folder / "summary.json").read_text())
    model = summary["base_model"]
    text = card(summary, folder, None, from_repository(folder)).replace(model, from_repository(model))
    (folder / "README.md").write_text(text, encoding="utf-8")
    summary["base_model"] = from_repository(model)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def from_repository(path: str | Path) -> str:
    """A path below the repository's root from there, any other as it is."""
    path, root = Path(path).resolve(), HERE.parent.parent.resolve()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("variants", nargs="+", choices=[*VARIANTS, "all"])
    add("--model", type=Path, default=MODEL)
    add("--data", type=Path, default=DATA)
    add("--runs", type=Path, default=HERE / "runs" / "distill", help="checkpoints, removed by hand")
    add("--cache", type=Path, default=HERE / "runs" / "cache", help="the teacher's trajectories, for all variants")
    add("--out", type=Path, help="where the finished weights go; default: <model>/distilled")
    add("--minutes", type=float, help="end this run early; start again to go on")
    add("--steps", type=int, nargs=2, help="of both stages; default: the variant's")
    add("--learning-rate", type=float, nargs=2, help="of both stages; default: the variant's")
    add("--batch", type=int, default=128)
    add("--trajectories", type=int, help="default: one for each emoji")
    add("--sampling-steps", type=int, default=STEPS)
    add("--captions", type=int, default=200, help="how many to score at a preview; 0 for none")
    add("--previews", type=int, default=10, help="how many in a run")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    start = time.monotonic()
    cuda = torch.cuda.is_available()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = cuda
    emoji, _ = load(args.data)
    task = Task.load(args.captions, args.data) if args.captions else None
    out = args.out or args.model / "distilled"
    for name in VARIANTS if "all" in args.variants else args.variants:
        left = None if args.minutes is None else args.minutes - (time.monotonic() - start) / 60
        if left is not None and left <= 0:
            print(f"{name}: no time left; start again to go on")
            return
        variant, runs = VARIANTS[name], args.runs / name
        steps = tuple(args.steps or variant.steps)
        if (runs / "README.md").exists():
            export(runs, out / name)
            print(f"{name}: finished before; remove {runs} to begin anew")
            continue
        pipe = DiffusionPipeline.from_pretrained(args.model, dtype=torch.float32).to("cuda" if cuda else "cpu")
        pipe.unet.to(memory_format=torch.channels_last)
        result = distill(
            pipe,
            variant.core(),
            [e.captions[0] for e in emoji],
            runs,
            steps=steps,
            batch=args.batch,
            learning_rate=tuple(args.learning_rate or variant.learning_rate),
            sampling=dict(
                trajectories=args.trajectories,
                steps=args.sampling_steps,
                guidance=GUIDANCE,
                seed=SEED,
                batch=args.batch,
            ),
            mixed_precision="bf16" if cuda else "no",
            cache=str(args.cache),
            preview_every=max(1, sum(steps) // args.previews),
            checkpoint_every=max(1, min(200, sum(steps) // args.previews)),
            minutes=left,
            on_preview=Watch(task, runs / "run" / "quality.json", args.sampling_steps) if task else None,
        )
        if result.finished:
            export(runs, out / name)
            print(f"{name}: {out / name}, {sum(f.stat().st_size for f in (out / name).iterdir()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
