"""`diffattn distill`."""

import enum
from pathlib import Path
from typing import Annotated

import typer

from diffattn._errors import first_line


class Train(str, enum.Enum):
    core = "core"
    projections = "projections"
    lora = "lora"


class Precision(str, enum.Enum):
    no = "no"
    fp16 = "fp16"
    bf16 = "bf16"


def distill(
    model: Annotated[str, typer.Option(help="Folder or hub id of a text-to-picture pipeline: the teacher.")],
    core: Annotated[
        str, typer.Option(help='What replaces its self-attention: "linear", "mqa" or another that patch takes.')
    ],
    prompts: Annotated[Path, typer.Option(help="A text file with a prompt on each line.")],
    out: Annotated[Path, typer.Option(help="The result's folder. One that holds this very run is gone on with.")],
    layers: Annotated[
        list[str] | None,
        typer.Option(help="Glob over layer names, as patch takes it. May be repeated.", show_default=False),
    ] = None,
    steps: Annotated[tuple[int, int], typer.Option(help="Of stage 1 and stage 2.")] = (500, 2000),
    batch: Annotated[int, typer.Option(help="Samples a step, on each GPU.")] = 8,
    accumulate: Annotated[int, typer.Option(help="Batches a step.")] = 1,
    learning_rate: Annotated[tuple[float, float], typer.Option(help="Of stage 1 and stage 2.")] = (1e-3, 5e-4),
    train: Annotated[
        Train, typer.Option(help="The core alone, copies of q, k, v and out as well, or low-rank updates of them.")
    ] = Train.projections,
    rank: Annotated[int, typer.Option(help="Of the low-rank updates.")] = 16,
    trajectories: Annotated[
        int | None, typer.Option(help="Pictures that the teacher draws. Default: one a prompt.", show_default=False)
    ] = None,
    sampling_steps: Annotated[int, typer.Option(min=1, max=1000, help="Of each picture.")] = 20,
    guidance: Annotated[
        float | None, typer.Option(help="Of each picture. Default: the pipeline's own.", show_default=False)
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(min=1, help="Of each picture, pixels. Default: the pipeline's.", show_default=False),
    ] = None,
    sampling_batch: Annotated[int, typer.Option(min=1, help="Pictures drawn at once.")] = 16,
    mixed_precision: Annotated[
        Precision | None,
        typer.Option(help="Default: bf16 on a GPU that has it, else no.", show_default=False),
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory in stage 2, more time.")
    ] = False,
    minutes: Annotated[
        float | None,
        typer.Option(help="Stop after as long; the same command goes on later.", show_default=False),
    ] = None,
    preview_every: Annotated[int, typer.Option(help="Steps between grids of pictures and loss curves.")] = 250,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise, the weights and the batches.")] = 0,
    cache: Annotated[
        Path | None, typer.Option(help="Where the teacher's trajectories are kept.", show_default=False)
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="For the model card. Default: the base model's.", show_default=False)
    ] = None,
    push_to: Annotated[
        str | None, typer.Option(help="Hub repository that the result goes to, user/name.", show_default=False)
    ] = None,
) -> None:
    """Teach converted attention to draw what the model drew before. For several GPUs: accelerate launch."""
    from diffattn.cli import fail, quiet

    try:
        from diffattn.distill import DistillError, TrajectoryError, read_prompts
        from diffattn.distill import distill as train_student
        from diffattn.plan import as_core

        texts = read_prompts(prompts)  # before torch looks for GPUs and diffusers is imported
        as_core(core)
        quiet()
        sampling = dict(
            trajectories=trajectories,
            steps=sampling_steps,
            guidance=guidance,
            height=size,
            width=size,
            seed=seed,
            batch=sampling_batch,
        )
        train_student(
            model,
            core,
            texts,
            out,
            layers=layers or None,
            sampling=sampling,
            steps=steps,
            batch=batch,
            accumulate=accumulate,
            learning_rate=learning_rate,
            train=train.value,
            rank=rank,
            mixed_precision=_precision() if mixed_precision is None else mixed_precision.value,
            gradient_checkpointing=gradient_checkpointing,
            minutes=minutes,
            preview_every=preview_every,
            checkpoint_every=checkpoint_every,
            seed=seed,
            cache=None if cache is None else str(cache),
            license=license,
            push_to=push_to,
        )
    except (TrajectoryError, ValueError, OSError, ImportError) as error:
        raise fail(first_line(error)) from None
    except DistillError as error:
        import sys

        print(f"diffattn: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


def _precision() -> str:
    import torch

    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
