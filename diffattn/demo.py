"""The main job, shown: a pipeline draws with stock attention, is patched, draws again, and is put back."""

import contextlib
import itertools
import statistics
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageChops, ImageDraw, ImageFont

from diffattn._versions import in_dtype
from diffattn.cores import GroupedQueryAttention, LinearAttention, SoftmaxAttention
from diffattn.patch import patch

PROMPTS = ("grinning cat with smiling eyes", "owl", "alarm clock", "red heart")
EMOJI_GUIDANCE = 3.0  # the emoji pipeline's best, see its card
MARGIN, HEADER = 12, 64


@dataclass
class Drawing:
    """One column of the grid: what was installed, the pictures, and what they cost."""

    title: str
    note: str
    images: list[Image.Image] = field(default_factory=list)
    ms_per_step: float | None = None
    peak_mb: float | None = None
    difference: int | None = None  # the largest, in 0..255, from stock's pictures


def emoji_model() -> Path | None:
    """The pipeline that comes with a checkout of the project; None where diffattn was installed without it."""
    folder = Path(__file__).parents[1] / "examples" / "emoji" / "model"
    return folder if (folder / "model_index.json").is_file() else None


def load_pipeline(model: str | Path) -> Any:
    """Load a text-to-picture pipeline onto the GPU if there is one: bfloat16 there, float32 on a CPU.

    Raises: OSError or ValueError, from diffusers, where `model` is no folder or hub id of a pipeline.
    """
    from diffusers import DiffusionPipeline

    cuda = torch.cuda.is_available()
    pipe = DiffusionPipeline.from_pretrained(model, **in_dtype(torch.bfloat16 if cuda else torch.float32))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if cuda else "cpu")


def too_long(pipe: Any, prompts: list[str]) -> str | None:
    """The first prompt that the text encoder would cut off."""
    tokenizer = getattr(pipe, "tokenizer", None)
    for prompt in prompts if tokenizer else ():
        if len(tokenizer(prompt).input_ids) > tokenizer.model_max_length:
            return prompt
    return None


def run(pipe: Any, prompts: list[str], *, progress: Callable[[str, int], None], seed: int, **options) -> list[Drawing]:
    """Draw the prompts with stock attention and with each variant, with the same seeds.

    Args:
        progress: called with the variant's title and the number of steps done in it.
        seed: of the first prompt; the next has the next.
        options: for the pipeline's call, `num_inference_steps` and the like.

    Returns: stock, exact, the conversions that fit the pipeline, and those that were distilled for it.
    """
    stock = Drawing("stock", "diffusers' attention")
    _draw(pipe, prompts, stock, progress, seed, options)
    drawings = [stock]
    for drawing, what in _variants(pipe):
        with warnings.catch_warnings():
            # The grid itself says which pictures are not distilled.
            warnings.filterwarnings("ignore", message="diffattn: ", category=UserWarning)
            try:
                handle = patch(pipe, **what)
            except ValueError:
                if "weights" in what:
                    raise
                continue  # the mechanism fits no layer of this pipeline
        try:
            drawing.note = drawing.note.format(layers=len(handle.installed))
            _draw(pipe, prompts, drawing, progress, seed, options)
        finally:
            handle.undo()
        drawing.difference = max(_largest_difference(a, b) for a, b in zip(drawing.images, stock.images, strict=True))
        drawings.append(drawing)
    return drawings


def _variants(pipe: Any) -> Iterator[tuple[Drawing, dict[str, Any]]]:
    """Columns of the grid, and the arguments of `patch` for each."""
    handle = patch(pipe)
    handle.undo()
    # Where stock is the fast path already, an exact patch installs nothing; the softmax core then shows
    # that pictures come out the same through our processors.
    exact = None if handle.installed else SoftmaxAttention()
    yield Drawing("exact", "same formula, {layers} layers"), {"core": exact}
    yield Drawing("linear", "converted, not distilled\n{layers} layers"), {"core": LinearAttention("elu1")}
    yield Drawing("multi-query", "converted, not distilled\n{layers} layers"), {"core": GroupedQueryAttention(1)}
    for folder in distilled(pipe):
        yield Drawing(f"{folder.name}, distilled", "converted, distilled\n{layers} layers"), {"weights": str(folder)}


def distilled(pipe: Any) -> list[Path]:
    """Folders of weights that lie beside a pipeline's own, in `distilled/`, in alphabetical order."""
    where = Path(str(getattr(pipe, "name_or_path", None) or "")) / "distilled"
    return sorted(path.parent for path in where.glob("*/diffattn.json"))


def _draw(pipe, prompts, drawing: Drawing, progress, seed: int, options: dict) -> None:
    cuda = pipe.device.type == "cuda"
    times = []

    def tick(_pipe, step, _timestep, tensors):
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter())
        progress(drawing.title, step + 1)
        return tensors

    generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(len(prompts))]
    with _peak_memory(cuda) as peak:
        result = pipe(prompts, generator=generators, callback_on_step_end=tick, **options)
    drawing.images = [image.convert("RGB") for image in result.images]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    drawing.ms_per_step = 1000 * statistics.median(gaps) if gaps else None
    drawing.peak_mb = peak()


@contextlib.contextmanager
def _peak_memory(cuda: bool) -> Iterator[Callable[[], float | None]]:
    """Peak memory in MB of what runs inside: allocated on the GPU, or resident of the process (Linux)."""
    status = Path("/proc/self/status")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        # 5 sets the kernel's high-water mark back to what is resident now.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def peak() -> float | None:
        if cuda:
            return torch.cuda.max_memory_allocated() / 1e6
        if not status.exists():
            return None
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6

    yield peak


def _largest_difference(one: Image.Image, other: Image.Image) -> int:
    return max(high for _, high in ImageChops.difference(one, other).getextrema())


def grid(drawings: list[Drawing], prompts: list[str], size: int = 160) -> Image.Image:
    """A labelled picture: a column per variant, a row per prompt."""
    bold, regular = ImageFont.load_default(20), ImageFont.load_default(13)
    label = 170
    width = label + len(drawings) * (size + MARGIN) + MARGIN
    height = HEADER + len(prompts) * (size + MARGIN) + MARGIN
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, drawing in enumerate(drawings):
        x = label + column * (size + MARGIN)
        draw.text((x, 2), drawing.title, fill="black", font=bold)
        draw.multiline_text((x, 26), drawing.note, fill="#555555", font=regular, spacing=1)
        for row, image in enumerate(drawing.images):
            y = HEADER + MARGIN + row * (size + MARGIN)
            sheet.paste(image.resize((size, size), Image.Resampling.LANCZOS), (x, y))
            draw.rectangle((x - 1, y - 1, x + size, y + size), outline="#dddddd")
    for row, prompt in enumerate(prompts):
        y = HEADER + MARGIN + row * (size + MARGIN) + size // 2
        draw.multiline_text((MARGIN, y), "\n".join(textwrap.wrap(prompt, 20)), fill="black", font=regular, anchor="lm")
    return sheet
