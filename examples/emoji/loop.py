"""A training loop that ends on time, can be cut off anywhere, and goes on from its last checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

CHECK_EVERY = 50  # steps between the loop's only waits for the GPU
SAVE_EVERY = 60.0  # seconds
TELL_EVERY = 10.0


class NotFinite(RuntimeError):
    """The loss or a weight is NaN or infinite; the last checkpoint is still sound."""


def write_atomically(path: Path, state: dict) -> None:
    partial = path.with_suffix(".part")
    torch.save(state, partial)
    partial.replace(path)


def fit(
    accelerator: Accelerator,
    models: dict[str, nn.Module],
    loss_of_step: Callable[[], Tensor],
    checkpoint: Path,
    *,
    minutes: float,
    deadline: float = math.inf,
    learning_rate: float = 1e-3,
    warmup_steps: int = 300,
    max_steps: int | None = None,
    label: str = "train",
) -> dict | None:
    """Train `models` for `minutes`, counted over all runs, and leave their averaged weights in them.

    Args:
        loss_of_step: draws its own batch and returns the loss; called under the accelerator's autocast.
        minutes: the learning rate falls to zero along a cosine over this time.
        deadline: a `time.monotonic()` value at which to stop early, with a checkpoint.
    Returns: steps, seconds and the last loss; None if the deadline came first.
    """
    parameters = [p for model in models.values() for p in model.parameters()]
    optimizer = accelerator.prepare_optimizer(
        torch.optim.AdamW(
            parameters,
            lr=learning_rate,
            betas=(0.9, 0.99),
            weight_decay=0.01,
            fused=accelerator.device.type == "cuda",
        )
    )
    average = EMAModel(parameters, decay=0.999, foreach=True)
    step, seconds, loss_value = 0, 0.0, math.nan
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=accelerator.device, weights_only=True)
        for name, model in models.items():
            model.load_state_dict(state["models"][name])
        optimizer.load_state_dict(state["optimizer"])
        average.load_state_dict(state["average"])
        step, seconds, loss_value = state["step"], state["seconds"], state["loss"]
        accelerator.print(f"{label}: goes on from step {step}, {seconds:.0f} s")
        del state
    torch.manual_seed(step)

    def save() -> None:
        norms = torch._foreach_norm([p.detach() for p in parameters])
        if not torch.stack(norms).isfinite().all():
            raise NotFinite(f"{label}: a weight is not finite at step {step}; {checkpoint} holds the last good ones")
        state = {
            "models": {name: model.state_dict() for name, model in models.items()},
            "optimizer": optimizer.state_dict(),
            "average": average.state_dict(),
            "step": step,
            "seconds": seconds,
            "loss": loss_value,
        }
        write_atomically(checkpoint, state)

    for model in models.values():
        model.train()
    budget = 60 * minutes
    start = time.monotonic() - seconds
    last_save, last_told, first_step = time.monotonic(), -math.inf, step
    loss_sum, summed = torch.zeros((), device=accelerator.device), 0
    finished = seconds >= budget or step == max_steps
    while not finished and time.monotonic() < deadline:
        progress = min((time.monotonic() - start) / budget, 1.0)
        warmup = min(1.0, (step + 1) / warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * warmup * (0.5 + 0.5 * math.cos(math.pi * progress))

        with accelerator.autocast():
            loss = loss_of_step()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.step(parameters)
        loss_sum, summed, step = loss_sum + loss.detach(), summed + 1, step + 1

        if step % CHECK_EVERY == 0 or step == max_steps or step == first_step + 1:
            loss_value = loss_sum.item() / summed  # waits for the GPU, so that the clock is honest
            seconds = time.monotonic() - start
            if not math.isfinite(loss_value):
                raise NotFinite(
                    f"{label}: the loss is {loss_value} at step {step}; {checkpoint} holds the last good weights"
                )
            finished = seconds >= budget or step == max_steps
            if finished or time.monotonic() - last_told > TELL_EVERY:
                last_told = time.monotonic()
                left = max(0.0, min(budget - seconds, deadline - time.monotonic()))
                accelerator.print(
                    f"{label}: step {step}  loss {loss_value:.4f}  {seconds:.0f} s  "
                    f"{1000 * seconds / step:.0f} ms a step  {left:.0f} s to go",
                    flush=True,
                )
            loss_sum, summed = torch.zeros_like(loss_sum), 0
            if time.monotonic() - last_save > SAVE_EVERY:
                save()
                last_save = time.monotonic()

    if step > first_step:
        seconds = time.monotonic() - start
        save()
    if not finished:
        return None
    average.copy_to(parameters)
    for model in models.values():
        model.eval()
    return {"steps": step, "seconds": round(seconds), "loss": loss_value}
