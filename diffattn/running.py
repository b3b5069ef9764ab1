"""Whether another thread runs a model: then its processors must not be swapped."""

import sys
import threading
from collections.abc import Iterable
from types import FrameType

from torch import nn


def refuse_if_running(models: Iterable[nn.Module], call: str) -> None:
    """Raise if another thread is inside a call of one of the models, or of a pipeline that has one.

    It would compute half of its output with the processors of before. The stacks of the other threads are looked at,
    as debuggers do, so models and processors keep no lock and no count that copying or compiling would meet. A thread
    that swaps processors itself, in a callback between two steps say, is not refused: it knows when it does.

    Raises: RuntimeError naming the model, the thread and what to wait for.
    """
    models = list(models)
    parts = {id(module): model for model in models for module in model.modules()}
    frames = sys._current_frames()
    del frames[threading.get_ident()]
    for thread, frame in frames.items():
        model = _runs(frame, models, parts)
        if model is not None:
            name = next((t.name for t in threading.enumerate() if t.ident == thread), str(thread))
            raise RuntimeError(
                f"{call}: thread {name!r} is running {type(model).__name__}, whose output would mix processors of "
                f"before and after. Wait until its call has returned, then {call}"
            )


def _runs(frame: FrameType | None, models: list[nn.Module], parts: dict[int, nn.Module]) -> nn.Module | None:
    while frame is not None:
        if frame.f_code.co_varnames[:1] == ("self",):
            owner = frame.f_locals.get("self")
            if id(owner) in parts:
                return parts[id(owner)]
            # Between two steps of a pipeline no model runs, and the next step would go on with other processors.
            if frame.f_code.co_name == "__call__" and hasattr(type(owner), "components"):
                held = {id(value) for value in vars(owner).values()}
                for model in models:
                    if id(model) in held:
                        return model
        frame = frame.f_back
    return None
