"""`distill`: from a pipeline and prompts to a folder that `patch(pipe, weights=...)` loads."""

import json
import math
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffattn._errors import CANNOT_LOAD, first_line
from diffattn._versions import in_dtype
from diffattn.cores import AttentionCore
from diffattn.distill import card as cards
from diffattn.distill.loop import Trainer
from diffattn.distill.pair import Pair
from diffattn.distill.report import Previews, Reporter, draw_curve
from diffattn.distill.settings import Settings, check_prompts, claim, describe, write
from diffattn.distill.trainable import check_trainable, make_trainable, merge, settle
from diffattn.distill.trajectories import Recording, Sampling, address, cache_root, fingerprint, record
from diffattn.layers import DENOISERS
from diffattn.patch import PatchHandle, patch
from diffattn.plan import Layers, as_core
from diffattn.weights import save_weights


@dataclass
class Result:
    """What a call of `distill` came to.

    Attributes:
        folder: with the weights, their config, the model card and pictures, once finished; in `run/` the checkpoint.
        finished: False where the minutes ran out; the same call again goes on.
        step: steps done, of both stages.
        losses: the loss of each step.
        pipe: the pipeline, patched with the student.
        handle: of that patch; `handle.undo()` brings the teacher back.
    """

    folder: Path
    finished: bool
    step: int
    losses: list[float]
    pipe: Any
    handle: PatchHandle


def distill(
    model: Any,
    core: AttentionCore | str,
    prompts: Iterable[str],
    out: str | Path,
    *,
    layers: Layers | None = None,
    sampling: dict[str, Any] | None = None,
    accelerator: Any = None,
    progress: bool = True,
    on_preview: Callable[[int, Any, Callable], None] | None = None,
    **settings: Any,
) -> Result:
    """Train converted attention until a pipeline draws with it what it drew before, from prompts alone.

    The teacher is the pipeline as it is. Its denoiser's inputs are recorded while it draws the prompts, by its own
    scheduler and guidance, and kept on disk under an address made of the model's weights, the prompts and the
    sampling. Stage 1 then fits each patched layer to the stock layer on the stock layer's inputs, all layers in one
    pass of the teacher; stage 2 fits the denoiser's prediction and each layer's output in the student's own pass
    (as LinFusion does, Liu et al. 2024, section 3.3). Teacher and student share one model in memory.

    Args:
        model: folder or hub id of a text-to-picture pipeline, or a pipeline, which keeps its dtype, is moved to the
            accelerator's device and left patched with the student.
        core: what to install, as `patch` takes it.
        prompts: texts.
        out: the result's folder. A folder of the same run is gone on with.
        layers: which layers, as `patch` takes it.
        sampling: other fields of `Sampling` than the prompts: trajectories, steps, guidance, height, width, seed,
            batch.
        accelerator: an `accelerate.Accelerator` made elsewhere; else one is made of `mixed_precision` and
            `accumulate`. Under `accelerate launch` each process draws and trains on its share.
        progress: show a bar, or lines where there is no terminal.
        on_preview: called with (steps done, pipeline, teacher) after each preview. The pipeline draws as the student,
            and inside `with teacher():` as the teacher. Its time does not count as training.
        settings: the fields of `Settings`:
            steps: of stage 1 and stage 2.
            batch: samples a step, of each process; accumulate: such batches a step.
            learning_rate, weight_decay: of AdamW, for stage 1 and stage 2.
            feature_weight: of the layers' mean relative error beside the prediction's, in stage 2.
            train: `"core"` (what the core and its processor brought), `"projections"` (also a copy of the layer's
                query, key, value and output projections) or `"lora"` (also low-rank updates of such copies, by peft,
                merged at the end; of `rank`).
            mixed_precision: `"no"`, `"fp16"` or `"bf16"`. gradient_checkpointing: less memory in stage 2, more time.
            seed: of the initial weights and the batches.
            minutes: stop after as long, with a checkpoint; the same call again goes on.
            checkpoint_every, preview_every: steps. preview_prompts: how many of the prompts to draw.
            push_to: a hub repository for the result. cache: where recordings are kept. license: for the card.

    Returns: see `Result`.

    Raises:
        ValueError, FileNotFoundError, TypeError: an argument does not fit; nothing was written but the recording.
        DistillError: a loss or a weight is not finite; the message names the last good checkpoint.
    """
    began = time.monotonic()
    settings = Settings(**settings)
    sampling = Sampling(prompts=check_prompts(prompts), **(sampling or {}))
    core = as_core(core)
    if core is None:
        raise TypeError("core: got None, expected a name or an AttentionCore instance")
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is a file, expected a folder or the name of a new one")
    if settings.push_to is not None:
        cards.check_push(settings.push_to)
    if accelerator is None:
        from accelerate import Accelerator, DistributedDataParallelKwargs

        accelerator = Accelerator(
            mixed_precision=settings.mixed_precision,
            gradient_accumulation_steps=settings.accumulate,
            # A core may leave a part of it out where there are few tokens.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
    pipe, base = _pipeline(model, accelerator.device)
    component, denoiser = _denoiser(pipe)
    teacher = fingerprint(pipe)

    torch.manual_seed(settings.seed)  # a core's weights start the same in every process and every run
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="diffattn: ", category=UserWarning)
        handle = patch(pipe, core, layers=layers)
    try:
        strangers = [name for name in handle.installed if not name.startswith(component + ".")]
        if strangers:
            raise ValueError(f"layers: {strangers[0]} is not part of {component}, the one model that is distilled")
        check_trainable(handle, core, settings)
        if accelerator.is_main_process:
            claim(out, describe(core, layers, teacher, sampling, settings))
        accelerator.wait_for_everyone()
        with Reporter(progress and accelerator.is_main_process) as reporter, _frozen(pipe, handle):
            pair = Pair(denoiser, handle)
            recording = _record(pipe, pair, sampling, settings, teacher, accelerator, reporter)
            make_trainable(handle, settings)
            run = _Run(out, base, core, pipe, handle, pair, sampling, settings, accelerator, reporter, on_preview)
            finished, trainer = run.train(recording, began)
    except BaseException:
        handle.undo()
        raise
    denoiser.eval()
    return Result(out, finished, trainer.step, trainer.losses, pipe, handle)


def _pipeline(model: Any, device: torch.device) -> tuple[Any, str]:
    """The pipeline, silent and on the device, and what to call it."""
    if isinstance(model, (str, Path)):
        from diffusers import DiffusionPipeline

        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        try:
            pipe = DiffusionPipeline.from_pretrained(model, **in_dtype(dtype))
        except CANNOT_LOAD as error:
            raise ValueError(f"model: {model} is no folder or hub id of a pipeline ({first_line(error)})") from None
    else:
        pipe = model
        if not isinstance(getattr(pipe, "components", None), dict) or isinstance(pipe, nn.Module):
            raise TypeError(f"model: got {type(pipe).__name__}, expected a pipeline, or a folder or hub id of one")
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe, str(model if isinstance(model, (str, Path)) else getattr(pipe, "name_or_path", "") or type(pipe))


def _denoiser(pipe: Any) -> tuple[str, nn.Module]:
    for name in DENOISERS:
        if isinstance(pipe.components.get(name), nn.Module):
            return name, pipe.components[name]
    names = ", ".join(DENOISERS)
    raise ValueError(f"model: {type(pipe).__name__} has no denoiser: none of its parts is called {names}")


class _frozen:
    """No weight of the pipeline takes gradients or is in training mode; afterwards each is as it was.

    What a patch installed is left alone.
    """

    def __init__(self, pipe: Any, handle: PatchHandle):
        self.modules = [m for m in pipe.components.values() if isinstance(m, nn.Module)]
        self.own = {id(p) for processor in handle.installed.values() for p in processor.parameters()}

    def __enter__(self) -> None:
        parameters = [p for m in self.modules for p in m.parameters()]
        self.trained = [p for p in parameters if p.requires_grad and id(p) not in self.own]
        self.in_training = [m for module in self.modules for m in module.modules() if m.training]
        for parameter in self.trained:
            parameter.requires_grad_(False)
        for module in self.modules:
            module.eval()

    def __exit__(self, *_: Any) -> None:
        for parameter in self.trained:
            parameter.requires_grad_(True)
        for module in self.in_training:
            module.training = True


def _record(pipe, pair, sampling, settings, teacher, accelerator, reporter) -> Recording:
    folder = Path(settings.cache) if settings.cache else cache_root()
    folder = folder / "trajectories" / address(f"{teacher} {accelerator.mixed_precision}", sampling)
    with pair.teacher(), accelerator.autocast():
        files = record(
            pipe,
            pair.denoiser,
            sampling,
            folder,
            rank=accelerator.process_index,
            ranks=accelerator.num_processes,
            progress=lambda done, total: reporter.update(done) if done else reporter.begin("record", total),
        )
    accelerator.wait_for_everyone()
    recording = Recording(files, accelerator.device)
    reporter.say(f"{recording.count} samples of {sampling.count} trajectories in {folder}")
    return recording


class _Run:
    """The parts of a run that meet in its folder."""

    def __init__(self, out, base, core, pipe, handle, pair, sampling, settings, accelerator, reporter, on_preview):
        self.out, self.base, self.core, self.pipe, self.handle, self.pair = out, base, core, pipe, handle, pair
        self.sampling, self.settings, self.accelerator = sampling, settings, accelerator
        self.reporter, self.on_preview, self.shown = reporter, on_preview, None
        self.previews = Previews(pipe, pair, sampling, settings.preview_prompts)

    def train(self, recording: Recording, began: float) -> tuple[bool, Trainer]:
        settings, denoiser = self.settings, self.pair.denoiser
        if settings.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        minutes = math.inf if settings.minutes is None else settings.minutes
        self.trainer = trainer = Trainer(
            self.accelerator,
            self.pair,
            recording,
            settings,
            self.out / "run" / "checkpoint.pt",
            deadline=began + 60 * minutes,
            on_step=self._tell,
            on_preview=self._preview,
        )
        try:
            if trainer.resume():
                self.reporter.say(f"goes on from step {trainer.step} of {trainer.total}, {trainer.seconds:.0f} s in")
            self.reporter.begin("distill", trainer.total)
            finished = trainer.run()
        finally:
            if settings.gradient_checkpointing:
                denoiser.disable_gradient_checkpointing()
        if not finished:
            self.reporter.say(f"The time is over after step {trainer.step}; the same command goes on from there.")
        merge(self.handle)
        if finished and self.accelerator.is_main_process:
            self._write_result()
        settle(self.handle)
        self.accelerator.wait_for_everyone()
        return finished, trainer

    def _tell(self, step: int, loss: float, seconds: float) -> None:
        stage = self.trainer.stage(step - 1)
        left = (self.trainer.total - step) * seconds
        self.reporter.update(step, f"stage {stage}  loss {loss:.4f}  {1000 * seconds:.0f} ms a step", left)

    def _preview(self, step: int) -> None:
        if self.accelerator.is_main_process:
            self._show(step)
        self.accelerator.wait_for_everyone()

    def _show(self, step: int) -> None:
        run, trainer = self.out / "run", self.trainer
        state = {"losses": trainer.losses, "layers": self.pair.names, "by_layer": trainer.layer_losses}
        write(run / "losses.json", json.dumps(state))
        with self.accelerator.autocast(), torch.no_grad():
            self.previews.draw(run / f"grid-{step:06d}.png", step)
        if not draw_curve(run / "curve.png", trainer.losses, self.settings.steps[0]):
            self.reporter.say("no loss curve: matplotlib is not installed (pip install 'diffattn[distill]')")
        if self.on_preview is not None:
            with self.accelerator.autocast(), torch.no_grad():
                self.on_preview(step, self.pipe, self.pair.teacher)
        self.shown = step

    def _write_result(self) -> None:
        out, trainer = self.out, self.trainer
        if self.shown != trainer.total and not (out / "run" / f"grid-{trainer.total:06d}.png").exists():
            self._show(trainer.total)  # killed after the last checkpoint
        for source, name in ((f"grid-{trainer.total:06d}.png", "grid.png"), ("curve.png", "curve.png")):
            if (out / "run" / source).exists():
                partial = out / (name + ".part")
                partial.write_bytes((out / "run" / source).read_bytes())
                partial.replace(out / name)
        save_weights(self.pipe, out)
        summary = self._summary()
        write(out / "summary.json", json.dumps(summary, indent=2) + "\n")
        here = self.settings.push_to or str(out)
        write(out / "README.md", cards.card(summary, out, self.settings.license, here))
        self.reporter.say(f"Wrote {out}: diffattn.patch(pipe, weights={here!r})")
        if self.settings.push_to is not None:
            self.reporter.say(f"Pushed to {cards.push(out, self.settings.push_to)}")

    def _summary(self) -> dict[str, Any]:
        description = describe(self.core, None, "", self.sampling, self.settings)
        device = self.accelerator.device
        return {
            "base_model": self.base,
            "core": repr(self.core),
            "layers": len(self.pair.names),
            "trained_parameters": sum(p.numel() for p in self.trainer.parameters.values()),
            "prompts": len(self.sampling.prompts),
            "trajectories": self.sampling.count,
            "sampling": description["sampling"],
            "settings": description["settings"],
            "processes": self.accelerator.num_processes,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
            "torch": torch.__version__,
            "seconds": round(self.trainer.seconds, 1),
            "recording_seconds": round(self.trainer.recording.seconds, 1),
            "peak_bytes": self.trainer.peak_bytes,
            "loss": sum(self.trainer.losses[-50:]) / len(self.trainer.losses[-50:]),
            "layer_losses": dict(zip(self.pair.names, self.trainer.layer_losses[self.trainer.step], strict=True)),
        }
