"""Frame by frame: a model called with a few frames at a time, whose layers remember those before."""

import contextlib
import contextvars
import functools
import threading
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from diffattn.cores import AttentionCore, CausalCore, CausalState
from diffattn.stream_layers import plan_of

# The stream on whose behalf this thread runs a model. Two streams of one model tell themselves apart by it.
_RUNNING: contextvars.ContextVar["Stream | None"] = contextvars.ContextVar("diffattn_stream", default=None)
_LOCK = threading.Lock()
# Attribute of a module whose forward asks for the running stream: how many streams are open over it.
_OPEN = "_diffattn_streams"


@contextlib.contextmanager
def streaming(
    model: nn.Module,
    frames_per_chunk: int | None = 1,
    *,
    window: int | None = None,
    sink: int = 0,
    time_dim: int | None = None,
) -> Iterator["Stream"]:
    """Call a model with a few frames at a time, as if it saw all of them at once and could not look ahead.

        with diffattn.streaming(model) as stream:
            for frame in frames:
                out = stream(frame, ...)

    Layers with a causal core (`CausalLinearAttention`, `RWKV7`, ...) keep its state; softmax self-attention with a
    core of diffattn's keeps the keys and values of the first `sink` and the last `window` frames; SANA-Video's
    temporal convolutions keep a frame and see nothing in place of the next one, and its rotary embedding goes on
    counting. Cross-attention is as ever. Cutting the frames differently changes nothing, all of them at once included.

    Args:
        model: a core, a model made of them, or SANA-Video's or Wan's transformer patched with
            `CausalLinearAttention(block=...)`, whose `block` is the tokens of a frame. It is left as it was when the
            context ends. More than one stream may be open over a model, also in threads.
        frames_per_chunk: frames of a call; None takes any number.
        window, sink: frames that softmax self-attention keeps, the current one counted. Needed if there is any.
        time_dim: the dimension of the model's first argument along which frames follow one another: None is 2 of a
            video (B, C, F, H, W), else 1, tokens (B, N, ...), of which `block` make a frame.
    Raises: TypeError or ValueError for a model that looks ahead (attention or convolutions over time that are not
        causal), with the names of what does.
    """
    stream = Stream(model, frames_per_chunk, window=window, sink=sink, time_dim=time_dim)
    opened = []
    try:
        for module in stream._plan:
            _open(module)
            opened.append(module)
        yield stream
    finally:
        for module in opened:
            _close(module)
        stream._closed = True


def _open(module: nn.Module) -> None:
    with _LOCK:
        users = module.__dict__.get(_OPEN, 0)
        if users == 0:
            if "forward" in module.__dict__:
                raise ValueError(
                    f"model: the forward of a {type(module).__name__} has been replaced (by offloading, for one); "
                    "undo that before streaming"
                )
            module.__dict__["forward"] = functools.partial(_dispatch, module, type(module).forward)
        module.__dict__[_OPEN] = users + 1


def _close(module: nn.Module) -> None:
    with _LOCK:
        module.__dict__[_OPEN] -= 1
        if module.__dict__[_OPEN] == 0:
            del module.__dict__[_OPEN], module.__dict__["forward"]


def _dispatch(module: nn.Module, stock: Any, *args: Any, **kwargs: Any) -> Any:
    stream = _RUNNING.get()
    handler = None if stream is None else stream._plan.get(module)
    if handler is None:
        return stock(module, *args, **kwargs)
    return handler(stream, module, functools.partial(stock, module), *args, **kwargs)


class Stream:
    """What `streaming` hands out: call it like the model. Its memory is its own; other streams have theirs.

    Attributes:
        frames: how many have gone by.
        states: layer name -> `CausalState` of the layers met so far, updated in place.
        dropped: layer name -> frames that softmax self-attention has forgotten.

    `names`, `memory`, `count` (frames of the call) and `remember` are for `stream_layers.py`.
    """

    def __init__(self, model, frames_per_chunk=1, *, window=None, sink=0, time_dim=None):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: got {type(model).__name__}, expected a model; of a pipeline, its transformer")
        if not (frames_per_chunk is None or (isinstance(frames_per_chunk, int) and frames_per_chunk > 0)):
            raise ValueError(f"frames_per_chunk: got {frames_per_chunk!r}, expected a positive integer or None")
        for name, value, least in (("window", window, 1), ("sink", sink, 0)):
            if value is not None and (not isinstance(value, int) or value < least):
                raise ValueError(f"{name}: got {value!r}, expected an integer of at least {least}")
        if not (time_dim is None or isinstance(time_dim, int)):
            raise ValueError(f"time_dim: got {time_dim!r}, expected an integer or None")
        self.model, self.frames_per_chunk = model, frames_per_chunk
        self.window, self.sink, self.time_dim = window, sink, time_dim
        self._plan, self.names = plan_of(model, window)
        blocks = {core.block for core in self._plan if isinstance(core, CausalCore)}
        if len(blocks) > 1:
            raise ValueError(f"model: its cores have {sorted(blocks)} tokens a frame, expected one number")
        self._block = blocks.pop() if blocks else 1
        self._closed = False
        self.memory: dict[nn.Module, Any] = {}
        self.reset()

    def __call__(self, *args: Any, frame_index: int | None = None, keep: bool = True, **kwargs: Any) -> Any:
        """The model's output for the next frames.

        Args:
            args, kwargs: the model's own.
            frame_index: of the first of these frames, to have it checked that none is missing or out of order.
            keep: False computes the same and remembers nothing: for the steps that denoise a frame but the last.
        Raises: ValueError for other frames than the next, or another batch, dtype or device than before; nothing has
            changed then. RuntimeError after a call that failed half-way.
        """
        known, before = self._signature, None if keep else self.save()
        self._begin(args, kwargs, frame_index)
        counted = {module: self._calls.get(module, 0) for module in self._must_run()}
        token = _RUNNING.set(self)
        self._started = False
        try:
            out = self.model(*args, **kwargs)
        except BaseException:
            # what had not begun has changed nothing
            self._broken = self._started
            if before is not None:
                self._load(before)
            if not self._broken:
                self._signature = known
            raise
        finally:
            _RUNNING.reset(token)
        if self.frames == 0:
            missed = [self.names[m] for m, n in counted.items() if self._calls.get(m, 0) == n]
            if missed:
                self.reset()
                raise RuntimeError(f"model: the call did not reach {missed[0]}: a compiled model cannot stream")
        if keep:
            self.frames += self.count
        else:
            self._load(before)
        return out

    def reset(self) -> None:
        """Begin anew, with any batch."""
        self.frames = 0
        self.memory.clear()
        self._calls: dict[nn.Module, int] = {}
        self._signature = None
        self._broken = self._started = False

    def save(self) -> dict[str, Any]:
        """A copy of all that is remembered, for `load`."""
        copies = {self.names[m]: _clone(x) for m, x in self.memory.items()}
        return {"frames": self.frames, "signature": self._signature, "layers": copies}

    def load(self, saved: dict[str, Any]) -> None:
        """Go on from a point that `save` kept, of this stream or another of the same model.

        Raises: ValueError if it is of other layers; nothing has changed then.
        """
        strangers = saved["layers"].keys() - set(self.names.values())
        if strangers:
            raise ValueError(f"saved: of layers that this model has not: {', '.join(sorted(strangers))}")
        by_name = {name: module for module, name in self.names.items()}
        for name, memory in saved["layers"].items():
            module = by_name[name]
            if isinstance(memory, CausalState) != isinstance(module, CausalCore):
                raise ValueError(f"saved: {name} was another kind of layer")
        self._load(saved)

    def _load(self, saved):
        by_name = {name: module for module, name in self.names.items()}
        kept = {by_name[name]: memory for name, memory in saved["layers"].items()}
        for module, memory in kept.items():
            mine = self.memory.get(module)
            if isinstance(memory, CausalState) and mine is not None and _alike(mine, memory):
                mine.copy_(memory)  # in place: whoever holds the state goes on holding it
                kept[module] = mine
            else:
                kept[module] = _clone(memory)
                if isinstance(memory, CausalState):
                    kept[module].layer = module
        self.memory.clear()
        self.memory.update(kept)
        self.frames, self._signature = saved["frames"], saved["signature"]
        self._broken = False

    @property
    def states(self) -> dict[str, CausalState]:
        return {self.names[m]: x for m, x in self.memory.items() if isinstance(x, CausalState)}

    @property
    def dropped(self) -> dict[str, int]:
        return {self.names[m]: x["dropped"] for m, x in self.memory.items() if isinstance(x, dict)}

    def __str__(self) -> str:
        lines = [f"diffattn stream: {self.frames} frames, {len(self._plan)} layers with a memory"]
        for module, memory in self.memory.items():
            if isinstance(memory, CausalState):
                what = f"a state of {sum(x.numel() * 4 for x in memory.tensors())} bytes"
            elif isinstance(memory, dict):
                what = f"keys and values of {len(memory['frames'])} frames, {memory['dropped']} dropped"
            else:
                what = "the frame before"
            lines.append(f"{self.names[module]}: {what}")
        return "\n".join(lines)

    def _must_run(self):
        return [m for m in self._plan if isinstance(m, AttentionCore)]

    def _begin(self, args, kwargs, frame_index):
        if self._closed:
            raise RuntimeError("stream: its context has ended")
        if self._broken:
            raise RuntimeError(
                "stream: the last call failed half-way through the model: reset() or load() a saved state"
            )
        if frame_index is not None and frame_index != self.frames:
            raise ValueError(f"frame_index: got {frame_index}, expected {self.frames}, the frame after those seen")
        x = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
        if not isinstance(x, Tensor):
            raise TypeError(
                f"stream: got {type(x).__name__} for the model's first argument, expected the frames' tensor"
            )
        dim = self.time_dim if self.time_dim is not None else 2 if x.dim() == 5 else 1
        if not -x.dim() <= dim < x.dim():
            raise ValueError(f"time_dim: got {dim}, expected a dimension of the first argument, {tuple(x.shape)}")
        dim %= x.dim()
        patch = getattr(getattr(self.model, "config", None), "patch_size", None)
        unit = self._block if dim == 1 else patch[0] if isinstance(patch, (tuple, list)) else 1
        if x.shape[dim] == 0 or x.shape[dim] % unit:
            raise ValueError(
                f"stream: got {x.shape[dim]} along dimension {dim} of {tuple(x.shape)}, expected a multiple of "
                f"{unit}, one frame"
            )
        count = x.shape[dim] // unit
        if self.frames_per_chunk is not None and count != self.frames_per_chunk:
            raise ValueError(
                f"stream: got {count} frames, expected {self.frames_per_chunk}, as frames_per_chunk says; "
                "None takes any"
            )
        shape = (*x.shape[:dim], *x.shape[dim + 1 :])
        for what, now, then in zip(
            ("batch", "size", "dtype", "device"),
            (x.shape[0], shape, x.dtype, x.device),
            self._signature or (x.shape[0], shape, x.dtype, x.device),
            strict=True,
        ):
            if now != then:
                raise ValueError(
                    f"stream: got frames of {what} {now}, expected {then} as before: reset() begins a new video"
                )
        self._signature, self.count = (x.shape[0], shape, x.dtype, x.device), count
        self._met: set[nn.Module] = set()  # modules with a memory that have run for these frames

    def remember(self, module, memory):
        if module in self._met:
            raise RuntimeError(
                f"model: {self.names[module]} was called twice for the same frames, and it has one memory: a stream "
                "needs a module for each layer"
            )
        self._met.add(module)
        self.memory[module] = memory
        self._calls[module] = self._calls.get(module, 0) + 1
        self._started = True


def _clone(memory: Any) -> Any:
    if isinstance(memory, dict):
        return {name: x.clone() if isinstance(x, Tensor) else x for name, x in memory.items()}
    return memory.clone()


def _alike(one: CausalState, other: CausalState) -> bool:
    mine, theirs = one.tensors(), other.tensors()
    return [(x.shape, x.device) for x in mine] == [(x.shape, x.device) for x in theirs]
