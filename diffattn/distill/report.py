"""What a person looks at while it trains: progress, pictures of teacher and student, the loss curve."""

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from diffattn.distill.pair import Pair
from diffattn.distill.trajectories import Sampling

TELL_EVERY = 10.0  # seconds between lines where there is no terminal


class Reporter:
    """A bar with loss and ETA in a terminal, a line every ten seconds elsewhere; silent where `show` is False."""

    def __init__(self, show: bool = True):
        self.show = show
        self.console = Console(highlight=False, markup=False)
        self._bar: Progress | None = None
        self._told = 0.0

    def say(self, text: str) -> None:
        if self.show:
            self.console.print(text, soft_wrap=True)

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *_: Any) -> None:
        self._close()

    def begin(self, title: str, total: int) -> None:
        self._close()
        self._title, self._total, self._told = title, total, 0.0
        if self.show and self.console.is_terminal:
            texts = [TextColumn("{task.completed}/{task.total}"), TextColumn("{task.fields[note]}")]
            times = [TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn()]
            self._bar = Progress(
                TextColumn("{task.description:>8}"), BarColumn(), *texts, *times, console=self.console
            )
            self._bar.start()
            self._task = self._bar.add_task(title, total=total, note="")

    def update(self, done: int, note: str = "", seconds_left: float | None = None) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)
        elif self.show and (time.monotonic() - self._told > TELL_EVERY or done == self._total):
            self._told = time.monotonic()
            left = "" if seconds_left is None else f"  {seconds_left:.0f} s to go"
            self.say(f"{self._title}: {done}/{self._total}  {note}{left}")

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class Previews:
    """Pictures of teacher and student from the same seeds, side by side."""

    def __init__(self, pipe: Any, pair: Pair, sampling: Sampling, count: int):
        self.pipe, self.pair, self.sampling = pipe, pair, sampling
        self.prompts = list(dict.fromkeys(sampling.prompts))[:count]
        self._taught: list | None = None

    def _draw(self) -> list:
        import torch

        seeds = [torch.Generator("cpu").manual_seed(10**9 + i) for i in range(len(self.prompts))]
        result = self.pipe(self.prompts, generator=seeds, **self.sampling.options())
        return [image.convert("RGB") for image in result.images]

    def draw(self, path: Path, step: int) -> None:
        from diffattn.demo import Drawing, grid

        if not self.prompts:
            return
        if self._taught is None:
            with self.pair.teacher():
                self._taught = self._draw()
        teacher = Drawing("teacher", "softmax attention", self._taught)
        student = Drawing("student", f"after {step} steps", self._draw())
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".part")
        grid([teacher, student], self.prompts).save(partial, format="PNG")
        partial.replace(path)


def draw_curve(path: Path, losses: list[float], stage_1: int) -> bool:
    """Loss against steps, on a logarithmic scale. Returns: False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    for title, color, first, part in (
        ("stage 1: each layer", "C1", 0, losses[:stage_1]),
        ("stage 2: prediction and features", "C0", stage_1, losses[stage_1:]),
    ):
        if part:
            steps = range(first, first + len(part))
            axes.semilogy(steps, part, linewidth=0.4, alpha=0.4, color=color)
            axes.semilogy(steps, smooth(part), color=color, label=title)
    axes.set_xlabel("steps")
    axes.set_ylabel("relative squared error")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    partial = path.with_name(path.name + ".part")
    figure.savefig(partial, dpi=150, format="png")
    partial.replace(path)
    return True


def smooth(values: list[float], keep: float = 0.95) -> list[float]:
    """Exponential average, corrected for its start at 0."""
    average, weight, out = 0.0, 0.0, []
    for value in values:
        average, weight = keep * average + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(average / weight)
    return out
