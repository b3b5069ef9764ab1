"""Frame by frame: a model called with a few frames at a time, whose layers remember those before."""

import contextlib
import contextvars
import functools
import threading
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffattn.cores import (
    AttentionCore,
    CausalCore,
    CausalState,
    GroupedQueryAttention,
    SoftmaxAttention,
    rotate_heads,
)
from diffattn.layers import find_layers
from diffattn.processors import CoreAttnProcessor

# The stream on whose behalf this thread runs a model. Two streams of one model tell themselves apart by it.
_RUNNING: contextvars.ContextVar["Stream | None"] = contextvars.ContextVar("diffattn_stream", default=None)
_LOCK = threading.Lock()
# Models of diffusers whose positions and convolutions stream; of others the frames would all be the first.
MODELS = ("SanaVideoTransformer3DModel", "WanTransformer3DModel")
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
    """

    def __init__(self, model, frames_per_chunk=1, *, window=None, sink=0, time_dim=None):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: got {type(model).__name__}, expected a model; of a pipeline, its transformer")
        if not (frames_per_chunk is None or (isinstance(frames_per_chunk, int) and frames_per_chunk > 0)):
            raise ValueError(f"frames_per_chunk: got {frames_per_chunk!r}, expected a positive integer or None")
        for name, value, least in (("window", window, 1), ("sink", sink, 0)):
            if value is not None and (not isinstance(value, int) or value < least):
                raise ValueError(f"{name}: got {value!r}, expected an integer of at least {least}")
        self.model, self.frames_per_chunk = model, frames_per_chunk
        self.window, self.sink, self.time_dim = window, sink, time_dim
        self._plan, self._names = _plan(model, window)
        blocks = {core.block for core in self._plan if isinstance(core, CausalCore)}
        if len(blocks) > 1:
            raise ValueError(f"model: its cores have {sorted(blocks)} tokens a frame, expected one number")
        self._block = blocks.pop() if blocks else 1
        self._closed = False
        self._memory: dict[nn.Module, Any] = {}
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
        self._begin(args, kwargs, frame_index)
        before = None if keep else self.save()
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
            raise
        finally:
            _RUNNING.reset(token)
        if self.frames == 0:
            missed = [self._names[m] for m, n in counted.items() if self._calls.get(m, 0) == n]
            if missed:
                self.reset()
                raise RuntimeError(f"model: the call did not reach {missed[0]}: a compiled model cannot stream")
        if keep:
            self.frames += self._count
        else:
            self._load(before)
        return out

    def reset(self) -> None:
        """Begin anew, with any batch."""
        self.frames = 0
        self._memory.clear()
        self._calls: dict[nn.Module, int] = {}
        self._signature = None
        self._broken = self._started = False

    def save(self) -> dict[str, Any]:
        """A copy of all that is remembered, for `load`."""
        copies = {self._names[m]: _clone(x) for m, x in self._memory.items()}
        return {"frames": self.frames, "signature": self._signature, "layers": copies}

    def load(self, saved: dict[str, Any]) -> None:
        """Go on from a point that `save` kept, of this stream or another of the same model.

        Raises: ValueError if it is of other layers; nothing has changed then.
        """
        strangers = saved["layers"].keys() - set(self._names.values())
        if strangers:
            raise ValueError(f"saved: of layers that this model has not: {', '.join(sorted(strangers))}")
        by_name = {name: module for module, name in self._names.items()}
        for name, memory in saved["layers"].items():
            module = by_name[name]
            if isinstance(memory, CausalState) != isinstance(module, CausalCore):
                raise ValueError(f"saved: {name} was another kind of layer")
        self._load(saved)

    def _load(self, saved):
        by_name = {name: module for module, name in self._names.items()}
        kept = {by_name[name]: memory for name, memory in saved["layers"].items()}
        for module, memory in kept.items():
            mine = self._memory.get(module)
            if isinstance(memory, CausalState) and mine is not None and _alike(mine, memory):
                mine.copy_(memory)  # in place: whoever holds the state goes on holding it
                kept[module] = mine
            else:
                kept[module] = _clone(memory)
                if isinstance(memory, CausalState):
                    kept[module].layer = module
        self._memory.clear()
        self._memory.update(kept)
        self.frames, self._signature = saved["frames"], saved["signature"]
        self._broken = False

    @property
    def states(self) -> dict[str, CausalState]:
        return {self._names[m]: x for m, x in self._memory.items() if isinstance(x, CausalState)}

    @property
    def dropped(self) -> dict[str, int]:
        return {self._names[m]: x["dropped"] for m, x in self._memory.items() if isinstance(x, dict)}

    def __str__(self) -> str:
        lines = [f"diffattn stream: {self.frames} frames, {len(self._plan)} layers with a memory"]
        for module, memory in self._memory.items():
            if isinstance(memory, CausalState):
                what = f"a state of {sum(x.numel() * 4 for x in memory.tensors())} bytes"
            elif isinstance(memory, dict):
                what = f"keys and values of {len(memory['frames'])} frames, {memory['dropped']} dropped"
            else:
                what = "the frame before"
            lines.append(f"{self._names[module]}: {what}")
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
        self._signature, self._count = (x.shape[0], shape, x.dtype, x.device), count

    # What modules do in a stream

    def _causal(self, core, stock, q, k, v, *, mask=None, scale=None, rotate=None):
        if core.block > 1 and q.shape[1] != self._count * core.block:
            raise ValueError(
                f"{self._names[core]}: got {q.shape[1]} tokens for {self._count} frames, expected {core.block} "
                "a frame: CausalLinearAttention(block=...) is the tokens of a frame"
            )
        state = self._memory.get(core)
        if state is None:
            features = k.shape[3]
            if isinstance(core.feature_map, nn.Module):
                with torch.no_grad():
                    features = core.feature_map(k[:1, :1]).shape[-1]
            state = core.new_state(
                k.shape[0], k.shape[2], features, v.shape[3], rotated=rotate is not None, device=k.device
            )
        out = stock(q, k, v, mask=mask, scale=scale, rotate=rotate, state=state)
        self._remember(core, state)
        return out

    def _windowed(self, core, stock, q, k, v, *, mask=None, scale=None, rotate=None):
        if q.shape[1] != k.shape[1] or q.shape[1] % self._count:
            raise ValueError(
                f"{self._names[core]}: got {q.shape[1]} queries and {k.shape[1]} keys for {self._count} frames, "
                "expected as many of both and the same for each frame"
            )
        if mask is not None:
            raise ValueError(f"mask: {self._names[core]} got {tuple(mask.shape)}, expected None in a stream")
        q, k = rotate_heads(q, k, rotate)
        tokens = q.shape[1] // self._count
        new = range(self.frames, self.frames + self._count)
        past = self._memory.get(core) or {"frames": [], "dropped": 0}
        frames = [*past["frames"], *new]
        if past["frames"]:
            k, v = torch.cat((past["k"], k), 1), torch.cat((past["v"], v), 1)
        seen = [[m <= n and (n - m < self.window or m < self.sink) for m in frames] for n in new]
        mask = None
        if not all(map(all, seen)):
            mask = torch.tensor(seen, device=q.device)
            mask = mask.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)[None, None]
        out = stock(q, k, v, mask=mask, scale=scale)
        kept = [i for i, m in enumerate(frames) if m < self.sink or m > new[-1] + 1 - self.window]
        index = torch.tensor(kept, dtype=torch.long, device=q.device)

        def select(x):
            return x.unflatten(1, (-1, tokens)).index_select(1, index).flatten(1, 2)

        memory = dict(
            frames=[frames[i] for i in kept], k=select(k), v=select(v),
            dropped=past["dropped"] + len(frames) - len(kept),
        )  # fmt: skip
        self._remember(core, memory)
        return out

    def _convolve(self, conv, stock, x):
        """A convolution over t - 1, t, t + 1 of (B, C, F, H W): the frame after is not there, it counts as 0."""
        before = self._memory.get(conv)
        if before is None:
            before = x.new_zeros(*x.shape[:2], 1, x.shape[3])
        out = F.conv2d(torch.cat((before, x), 2), conv.weight[:, :, :2], conv.bias, groups=conv.groups)
        self._remember(conv, before.copy_(x[:, :, -1:].detach()))
        return out

    def _rotate(self, rope, stock, hidden_states):
        """The tables of `WanRotaryPosEmbed`, whose first features turn with time, from this frame on."""
        shifted = {}
        for name in ("freqs_cos", "freqs_sin"):
            table = getattr(rope, name)
            if isinstance(self.frames, Tensor):
                # in a graph the number of frames is an input, and a size no number: turn the whole table
                rows = torch.arange(table.shape[0], device=table.device)
                time, rest = table[(rows + self.frames).clamp_max(len(table) - 1), : rope.t_dim], table
            else:
                rows = max(hidden_states.shape[2:])
                time, rest = _time_table(rope, table, name, self.frames, rows), table[:rows]
                rest = F.pad(rest, (0, 0, 0, rows - rest.shape[0]))
            shifted[name] = torch.cat((time, rest[:, rope.t_dim :]), 1)
        plain = {name: value for name, value in vars(rope).items() if not name.startswith("_") and name != "forward"}
        return type(rope).forward(types.SimpleNamespace(**plain, **shifted), hidden_states)

    def _remember(self, module, memory):
        self._memory[module] = memory
        self._calls[module] = self._calls.get(module, 0) + 1
        self._started = True


def _time_table(rope: nn.Module, table: Tensor, name: str, first: int, rows: int) -> Tensor:
    """Rows `first` on of the features that turn with time. The table ends; time does not."""
    if first + rows <= table.shape[0]:
        return table[first : first + rows, : rope.t_dim]
    frequencies = 10000.0 ** (-torch.arange(0, rope.t_dim, 2, dtype=torch.float64, device=table.device) / rope.t_dim)
    position = torch.arange(first, first + rows, dtype=torch.float64, device=table.device)
    function = torch.cos if name == "freqs_cos" else torch.sin
    known = function(frequencies).repeat_interleave(2).to(table.dtype)
    if table.shape[0] > 1 and not torch.allclose(known, table[1, : rope.t_dim], atol=1e-5):
        raise ValueError(f"stream: {first + rows} frames, and the model's rotary table ends at {table.shape[0]}")
    return function(position[:, None] * frequencies).repeat_interleave(2, 1).to(table.dtype)


def _clone(memory: Any) -> Any:
    if isinstance(memory, dict):
        return {name: x.clone() if isinstance(x, Tensor) else x for name, x in memory.items()}
    return memory.clone()


def _alike(one: CausalState, other: CausalState) -> bool:
    mine, theirs = one.tensors(), other.tensors()
    return [(x.shape, x.device) for x in mine] == [(x.shape, x.device) for x in theirs]


def _plan(model: nn.Module, window: int | None) -> tuple[dict[nn.Module, Any], dict[nn.Module, str]]:
    """What each module does in a stream, and its name."""
    for module in model.modules():
        kind = type(module)
        if kind.__module__.startswith("diffusers.") and hasattr(kind, "load_config") and kind.__name__ not in MODELS:
            raise ValueError(
                f"model: got {kind.__name__}, expected one of {', '.join(MODELS)}: of diffusers' models, it is these "
                "whose positions are known to go on from call to call"
            )
    plan, names, ahead = {}, {}, []
    apart = set()  # cores that attend to something else than the frames

    def add(module, name, handler):
        plan[module], names[module] = handler, name or type(module).__name__

    for layer in find_layers(model):
        processor = layer.attn.processor
        ours = isinstance(processor, CoreAttnProcessor)
        family = type(processor) if ours else layer.family
        itself = not getattr(layer.attn, "is_cross_attention", False) if family is None else family.attends_to_itself(
            layer.path, layer.attn
        )  # fmt: skip
        if itself and not ours:
            ahead.append(f"{layer.name} (stock {type(processor).__name__}: patch it with CausalLinearAttention)")
        if ours:
            cores = [m for m in processor.modules() if isinstance(m, AttentionCore)]
            apart.update(m for m in cores if not itself or m is not processor.core)
    for name, module in model.named_modules():
        if module in apart:
            continue
        kind = type(module).__name__
        if isinstance(module, CausalCore):
            add(module, name, Stream._causal)
        elif isinstance(module, (SoftmaxAttention, GroupedQueryAttention)):
            add(module, name, Stream._windowed)
        elif isinstance(module, AttentionCore):
            ahead.append(f"{name or kind} ({module} sees all tokens)")
        elif isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
            ahead.append(f"{name} (torch's {kind} keeps no memory between calls)")
        elif kind == "GLUMBTempConv":
            add(module.conv_temp, f"{name}.conv_temp", Stream._convolve)
        elif kind == "WanRotaryPosEmbed":
            add(module, name, Stream._rotate)
        elif isinstance(module, (nn.Conv1d, nn.Conv3d)) and module.kernel_size[0] not in (1, module.stride[0]):
            ahead.append(f"{name} (a convolution over time)")
    if ahead:
        raise ValueError("model: it looks ahead, so frames cannot come one by one:\n" + "\n".join(ahead))
    if not any(isinstance(m, AttentionCore) for m in plan):
        raise ValueError(f"model: {type(model).__name__} has no attention that could remember frames")
    softmax = [names[m] for m, handler in plan.items() if handler is Stream._windowed]
    if softmax and window is None:
        raise ValueError(
            f"window: got None, expected the number of frames to keep: {', '.join(softmax[:3])} "
            f"{'have' if len(softmax) > 1 else 'has'} softmax self-attention"
        )
    return plan, names
