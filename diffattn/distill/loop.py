"""The training loop: two stages, checkpoints that any kill leaves whole, a stop in time."""

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffattn.distill.pair import Pair
from diffattn.distill.settings import DistillError, Settings
from diffattn.distill.trajectories import Recording

LOOK_EVERY = 10  # steps between waits for the GPU: losses are read, the clock is looked at


class Student(nn.Module):
    """What is trained, and the loss as its forward: the unit that accelerate spreads over several GPUs.

    The rest of the model is no part of it, so that nothing but the student's gradients travels.
    """

    def __init__(self, pair: Pair, feature_weight: float):
        super().__init__()
        self.processors = nn.ModuleList(pair.students.values())
        self.__dict__["pair"] = pair
        self.feature_weight = feature_weight

    def forward(self, stage: int, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The loss to train on, (), and each layer's, (layers,)."""
        if stage == 1:
            layers = self.pair.layer_losses(inputs)
            return layers.mean(), layers
        model, layers = self.pair.model_losses(inputs)
        return model + self.feature_weight * layers.mean(), layers


class Trainer:
    """One run: what it has done, and how it goes on.

    Args:
        checkpoint: the file that is written every `settings.checkpoint_every` steps and at the end.
        deadline: a `time.monotonic()` value at which to stop, with a checkpoint.
        on_step: called after each look with (steps done, last loss, seconds a step).
        on_preview: called every `settings.preview_every` steps and at the end with the steps done.
    """

    def __init__(
        self,
        accelerator: Any,
        pair: Pair,
        recording: Recording,
        settings: Settings,
        checkpoint: Path,
        *,
        deadline: float = math.inf,
        on_step: Callable[[int, float, float], None] = lambda step, loss, seconds: None,
        on_preview: Callable[[int], None] = lambda step: None,
    ):
        self.accelerator, self.pair, self.recording, self.settings = accelerator, pair, recording, settings
        self.checkpoint, self.deadline = checkpoint, deadline
        self.on_step, self.on_preview = on_step, on_preview
        self.student = Student(pair, settings.feature_weight)
        self.parameters = {n: p for n, p in self.student.named_parameters() if p.requires_grad}
        self.wrapped = accelerator.prepare_model(self.student)
        self.total = sum(settings.steps)
        self.step, self.seconds, self.losses, self.peak_bytes = 0, 0.0, [], 0
        self.layer_losses: dict[int, list[float]] = {}
        self.optimizer = self._new_optimizer()
        self._pending: list[tuple[Tensor, Tensor]] = []

    def stage(self, step: int) -> int:
        return 1 if step < self.settings.steps[0] else 2

    @property
    def finished(self) -> bool:
        return self.step >= self.total

    def resume(self) -> bool:
        """Take up the checkpoint, if there is one."""
        if not self.checkpoint.exists():
            return False
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:  # zip, pickle and torch each have their own
            raise DistillError(f"out: {self.checkpoint} cannot be read ({error}); remove it to begin anew") from None
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["parameters"][name])
        self.step, self.seconds, self.peak_bytes = state["step"], state["seconds"], state["peak_bytes"]
        self.losses, self.layer_losses = state["losses"], state["layer_losses"]
        if state["optimizer"] is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        return True

    def run(self) -> bool:
        """Train until all steps are done or the deadline comes. Returns: whether all are done."""
        self._clock = time.monotonic() - self.seconds
        first = looked = self.step
        while not self.finished:
            if self.step == self.settings.steps[0] and self.step > 0:
                self.optimizer = self._new_optimizer()  # moments of another loss
            self._train_step()
            self.step += 1
            preview = self.step % self.settings.preview_every == 0 or self.finished
            save = self.step % self.settings.checkpoint_every == 0 or self.finished or preview
            # The first steps too: what is wrong from the beginning shows there.
            if not (save or self.step - looked >= LOOK_EVERY or self.step - first <= 2):
                continue
            looked = self.step
            self._look()
            self.on_step(self.step, self.losses[-1], self.seconds / self.step)
            out_of_time = self._any(time.monotonic() > self.deadline)
            if save or out_of_time:
                self._save()
            if out_of_time and not self.finished:
                return False
            if preview:
                paused = time.monotonic()
                self.on_preview(self.step)
                self._clock += time.monotonic() - paused  # drawing is no training
        return True

    def _train_step(self) -> None:
        settings, accelerator = self.settings, self.accelerator
        stage = self.stage(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(settings, self.step)
        total, by_layer = 0.0, 0.0
        for part in range(settings.accumulate):
            inputs = self.recording.draw(settings.batch, self._generator(part))
            inputs = _to(inputs, accelerator.device)
            with accelerator.accumulate(self.wrapped):
                loss, layers = self.wrapped(stage, inputs)  # under autocast: accelerate sees to it
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(list(self.parameters.values()), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
            total, by_layer = total + loss.detach(), by_layer + layers.detach()
        self._pending.append((total / settings.accumulate, by_layer / settings.accumulate))

    def _generator(self, part: int) -> torch.Generator:
        """A batch depends on its place alone, so that a run that goes on draws what it would have drawn."""
        processes = self.accelerator.num_processes
        place = (self.step * self.settings.accumulate + part) * processes + self.accelerator.process_index
        return torch.Generator().manual_seed((self.settings.seed << 40) + place)

    def _look(self) -> None:
        """Read the losses since the last look.

        Raises: DistillError where one is not finite.
        """
        first = self.step - len(self._pending)
        totals = torch.stack([total for total, _ in self._pending])
        layers = torch.stack([layer for _, layer in self._pending])
        totals, layers = self.accelerator.reduce((totals, layers), "mean")
        totals, layers = totals.tolist(), layers.tolist()
        self._pending.clear()
        for number, (total, by_layer) in enumerate(zip(totals, layers, strict=True), first):
            if not math.isfinite(total):
                bad = [n for n, x in zip(self.pair.names, by_layer, strict=True) if not math.isfinite(x)]
                self._stop(f"the loss is {total} at step {number}" + (f", first in layer {bad[0]}" if bad else ""))
            self.losses.append(total)
        self.layer_losses[self.step] = layers[-1]
        self.seconds = time.monotonic() - self._clock

    def _stop(self, what: str) -> None:
        kept = "there was no checkpoint yet"
        if self.checkpoint.exists():
            kept = f"{self.checkpoint} holds step {self._saved_step()}, which is sound"
        raise DistillError(f"{what}; {kept}. Begin a run with a lower learning rate, or bf16 in place of fp16")

    def _saved_step(self) -> int:
        return torch.load(self.checkpoint, map_location="cpu", weights_only=True)["step"]

    def _save(self) -> None:
        """Write then rename, weights that are finite alone: a kill at any moment leaves the last good checkpoint."""
        accelerator = self.accelerator
        for name, parameter in self.parameters.items():
            if not torch.isfinite(parameter).all():
                self._stop(f"{name} is not finite after step {self.step}")
        if accelerator.device.type == "cuda":
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated())
        if not accelerator.is_main_process:
            return
        # After the last step of stage 1 its moments are of no use.
        of_next_stage = self.step == self.settings.steps[0] or self.finished
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
            "losses": self.losses,
            "layer_losses": self.layer_losses,
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "optimizer": None if of_next_stage else self.optimizer.state_dict(),
            "scaler": None if accelerator.scaler is None else accelerator.scaler.state_dict(),
        }
        write_checkpoint(self.checkpoint, state)

    def _any(self, here: bool) -> bool:
        """Whether it holds in any process: all have to stop at the same step."""
        flag = torch.tensor(float(here), device=self.accelerator.device)
        return self.accelerator.reduce(flag, "sum").item() > 0

    def _new_optimizer(self) -> Any:
        optimizer = torch.optim.AdamW(
            self.parameters.values(),
            betas=(0.9, 0.99),
            weight_decay=self.settings.weight_decay,
            fused=self.accelerator.device.type == "cuda",
        )
        return self.accelerator.prepare_optimizer(optimizer)


def learning_rate(settings: Settings, step: int) -> float:
    """Up along a line over a twentieth of the stage, 100 steps at most, then down to 0 along a cosine."""
    first = step < settings.steps[0]
    done, steps = (step, settings.steps[0]) if first else (step - settings.steps[0], settings.steps[1])
    warmup = max(1, min(100, steps // 20))
    rate = settings.learning_rate[0 if first else 1]
    return rate * min(1.0, (done + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * done / steps))


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".part")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _to(tree: Any, device: torch.device) -> Any:
    if isinstance(tree, Tensor):
        return tree.to(device)
    if isinstance(tree, dict):
        return {name: _to(value, device) for name, value in tree.items()}
    return [_to(value, device) for value in tree] if isinstance(tree, list) else tree
