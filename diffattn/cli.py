"""The command line: `diffattn demo`, `inspect`, `distill`, `export`, `bench`."""

import enum
import logging
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from diffattn import cli_distill
from diffattn._errors import CANNOT_LOAD, first_line

app = typer.Typer(help="Attention processors for Hugging Face diffusers.", no_args_is_help=True, add_completion=False)


def fail(message: str) -> typer.Exit:
    """One line on stderr, and the exit code of a wrong argument."""
    print(f"diffattn: {message}", file=sys.stderr)
    return typer.Exit(2)


def quiet() -> None:
    """Diffusers and transformers load without bars, one in the other, and without advice on image processors."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def _print_version(asked: bool) -> None:
    if asked:
        import diffattn

        print(f"diffattn {diffattn.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Attention processors for Hugging Face diffusers."""


@app.command()
def demo(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="What to draw. Without any: four emoji.", show_default=False)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of a text-to-picture pipeline. Default: the emoji pipeline."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps.")] = 20,
    guidance: Annotated[
        float | None,
        typer.Option(help="Classifier-free guidance. Default: the pipeline's own; 3 for emoji.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first prompt; the next has the next.")] = 0,
    out: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("demo.png"),
) -> None:
    """Draw with stock attention, patch, draw again with the same seeds, undo; compare the pictures."""
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table

    from diffattn import demo as show

    chosen = prompts or list(show.PROMPTS)
    if not all(prompt.strip() for prompt in chosen):
        raise fail('a prompt is empty; write what to draw, like "a cat with heart eyes"')
    if not out.parent.is_dir():
        raise fail(f"--out: there is no folder {out.parent}")
    if out.is_dir():
        raise fail(f"--out: {out} is a folder, expected a picture's name in it")
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise fail(f"--out: got {out.name}, expected a picture's name that ends in .png, .jpg or .webp")
    source = model or show.emoji_model()
    if source is None:
        raise fail(
            "the emoji pipeline comes with a checkout of the project: `make demo` there, or name another by --model"
        )
    quiet()
    try:
        pipe = show.load_pipeline(source)
    except CANNOT_LOAD as error:
        raise fail(f"--model: {source} is no folder or hub id of a pipeline ({first_line(error)})") from None

    if long := show.too_long(pipe, chosen):
        raise fail(f"the prompt is longer than the {pipe.tokenizer.model_max_length} tokens that fit: {long!r}")
    if guidance is None and model is None:
        guidance = show.EMOJI_GUIDANCE
    options = {"num_inference_steps": steps} | ({} if guidance is None else {"guidance_scale": guidance})

    console = Console()
    device = torch.cuda.get_device_name() if pipe.device.type == "cuda" else "CPU"
    console.print(f"{type(pipe).__name__} from {source} on {device}, {len(chosen)} pictures, {steps} steps")
    columns = [TextColumn("{task.description:>12}"), BarColumn(), TextColumn("{task.completed}/{task.total} steps")]
    with Progress(*columns, TimeElapsedColumn(), console=console) as bar:
        tasks: dict[str, int] = {}

        def progress(title: str, step: int) -> None:
            if title not in tasks:
                tasks[title] = bar.add_task(title, total=steps)
            bar.update(tasks[title], completed=step)

        drawings = show.run(pipe, chosen, progress=progress, seed=seed, **options)

    memory = "peak GPU memory" if pipe.device.type == "cuda" else "peak memory"
    table = Table("attention", "what", "ms / step", memory, "pixel difference")
    for d in drawings:
        table.add_row(
            d.title,
            d.note.replace("\n", ", "),
            "-" if d.ms_per_step is None else f"{d.ms_per_step:.1f}",
            "-" if d.peak_mb is None else f"{d.peak_mb:.0f} MB",
            "-" if d.difference is None else f"{d.difference} of 255",
        )
    console.print(table)
    show.grid(drawings, chosen).save(out)
    console.print(f"Wrote {out}. The pipeline has its stock attention back.")


class Benchmark(str, enum.Enum):
    all = "all"
    kernels = "kernels"
    models = "models"


@app.command()
def bench(
    which: Annotated[Benchmark, typer.Argument(help="Our kernels beside their peers, whole models, or both.")] = (
        Benchmark.all
    ),
    only: Annotated[
        list[str] | None,
        typer.Option(help='Glob over "section/case" of the kernels, or over model names. May be repeated.'),
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Each benchmark starts nothing new after this long.")] = 170,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the results. Default: benchmarks/results/<gpu>.", show_default=False),
    ] = None,
) -> None:
    """Time the kernels and whole models on this machine's GPU, and write the results as JSON."""
    import torch

    folder = Path(__file__).parents[1] / "benchmarks"
    if not (folder / "kernels.py").is_file():
        raise fail("the benchmarks come with a checkout of the project: `pip install -e .` there, then run them again")
    if not torch.cuda.is_available():
        raise fail("the benchmarks need a CUDA device, and torch sees none on this machine")
    if only and which is Benchmark.all:
        raise fail('--only: name a benchmark before it, "kernels" or "models": their cases differ')
    options = ["--seconds", str(seconds), *(f"--only={glob}" for glob in only or ())]
    options += [] if out is None else ["--out", str(out)]
    # A process each: what one leaves in memory or compiled is not in the other's figures.
    for script in ("kernels", "models") if which is Benchmark.all else (which.value,):
        code = subprocess.run([sys.executable, str(folder / f"{script}.py"), *options]).returncode
        if code:
            raise typer.Exit(code)


@app.command()
def inspect(
    model: Annotated[
        str, typer.Argument(help="A class name of diffusers, or a folder or hub id of a model or pipeline.")
    ],
    core: Annotated[
        str | None,
        typer.Option(
            help='What to patch with: "linear", "mqa" or another that patch takes. Default: the exact patch.'
        ),
    ] = None,
    layers: Annotated[
        list[str] | None, typer.Option(help="Glob over layer names, as patch takes it. May be repeated.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="Pixels along both edges. Default: the config's, else 1024.")
    ] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels.", show_default=False)] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels.", show_default=False)] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Of a video. Default: 81.", show_default=False)] = None,
    every: Annotated[bool, typer.Option("--every", help="A row for each layer, also where many are alike.")] = False,
    fidelity: Annotated[
        bool,
        typer.Option("--fidelity", help="Load the weights and measure how far --core is from each layer it replaces."),
    ] = False,
    weights: Annotated[
        str | None, typer.Option(help="Folder or hub id of weights of the cores, for --fidelity.", show_default=False)
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="What a pipeline draws for --fidelity.", show_default=False)
    ] = None,
) -> None:
    """List a model's attention layers and what patch would do, from its config alone but for --fidelity."""
    from diffattn.cli_inspect import show
    from diffattn.inspect import inspect_model

    if size and (height or width):
        raise fail("--size: name it, or --height and --width")
    if fidelity and not core and not weights:
        raise fail("--fidelity: name what replaces softmax attention with --core or --weights")
    if (weights or prompt) and not fidelity:
        raise fail("--weights and --prompt are for --fidelity")
    try:
        found = inspect_model(
            model,
            core,
            layers=layers or None,
            height=height or size,
            width=width or size,
            frames=frames,
            weights=weights,
        )
        if fidelity:
            from diffattn.fidelity import PROMPT, add_fidelity

            quiet()
            options = dict(layers=layers or None, weights=weights, height=height or size, width=width or size)
            found = add_fidelity(found, model, core, prompt=prompt or PROMPT, **options)
    except (OSError, ValueError) as error:
        raise fail(first_line(error)) from None
    show(found, model, every=every)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a pipeline, or of a model.")],
    out: Annotated[Path, typer.Option(help="Where the file goes.")] = Path("model.onnx"),
    core: Annotated[
        str | None,
        typer.Option(
            help='Patch the model with this before: "linear", "mqa" or another that patch takes. '
            "Default: what --weights are for, else exact attention.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of distilled weights, which say what to patch with.", show_default=False),
    ] = None,
    static: Annotated[
        bool,
        typer.Option(
            "--static", help="Fix all sizes, at small ones; `to_onnx(sample_inputs=...)` fixes them at yours."
        ),
    ] = False,
    opset: Annotated[
        int | None,
        typer.Option(help="Of ONNX; from 23 on, attention is one operator. Default: torch's.", show_default=False),
    ] = None,
    check: Annotated[bool, typer.Option(help="Compare the file with the model in ONNX Runtime.")] = True,
) -> None:
    """Write a pipeline's denoiser, or a model, as an ONNX file of standard operators, and check it."""
    from diffattn.export import ExportError, load, to_onnx
    from diffattn.patch import patch
    from diffattn.plan import as_core

    if not Path(model).is_dir() and model.count("/") != 1:
        raise fail(f"{model}: no folder here and no hub id (user/name) of a pipeline or a model, with its weights")
    if not out.parent.is_dir():
        raise fail(f"--out: there is no folder {out.parent}")
    # torch's exporter tells of operators of torchvision, which no model here has, and of its own deprecations.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    quiet()
    try:
        as_core(core)  # before a model is loaded
        target = load(model)
        if core is not None or weights is not None:
            patch(target, core, weights=weights)
        to_onnx(target, out, dynamic=not static, opset=opset, check=check)
    except (OSError, ValueError, ImportError) as error:
        raise fail(first_line(error)) from None
    except ExportError as error:
        print(f"diffattn: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


app.command()(cli_distill.distill)


def main() -> None:
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], standalone_mode=False))
    except Exception as error:
        # typer's own report of a wrong option is a box of seven lines; its exceptions carry the sentence.
        if not hasattr(error, "format_message"):
            raise
        print(f"diffattn: {error.format_message()} (diffattn --help tells more)", file=sys.stderr)
        sys.exit(2)
