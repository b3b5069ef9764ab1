"""What the layers of a model do in a stream, and which of its layers: see `diffattn.streaming`."""

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffattn.cores import AttentionCore, CausalCore, GroupedQueryAttention, SoftmaxAttention, rotate_heads
from diffattn.layers import find_layers
from diffattn.processors import CoreAttnProcessor

# Models of diffusers whose positions and convolutions stream; of others the frames would all be the first.
MODELS = ("SanaVideoTransformer3DModel", "WanTransformer3DModel")


def causal(stream, core, stock, q, k, v, *, mask=None, scale=None, rotate=None):
    if core.block > 1 and q.shape[1] != stream.count * core.block:
        raise ValueError(
            f"{stream.names[core]}: got {q.shape[1]} tokens for {stream.count} frames, expected {core.block} "
            "a frame: CausalLinearAttention(block=...) is the tokens of a frame"
        )
    state = stream.memory.get(core)
    if state is None:
        features = k.shape[3]
        if isinstance(core.feature_map, nn.Module):
            with torch.no_grad():
                features = core.feature_map(k[:1, :1]).shape[-1]
        state = core.new_state(
            k.shape[0], k.shape[2], features, v.shape[3], rotated=rotate is not None, device=k.device
        )
    out = stock(q, k, v, mask=mask, scale=scale, rotate=rotate, state=state)
    stream.remember(core, state)
    return out


def windowed(stream, core, stock, q, k, v, *, mask=None, scale=None, rotate=None):
    if q.shape[1] != k.shape[1] or q.shape[1] % stream.count:
        raise ValueError(
            f"{stream.names[core]}: got {q.shape[1]} queries and {k.shape[1]} keys for {stream.count} frames, "
            "expected as many of both and the same for each frame"
        )
    if mask is not None:
        raise ValueError(f"mask: {stream.names[core]} got {tuple(mask.shape)}, expected None in a stream")
    q, k = rotate_heads(q, k, rotate)
    tokens = q.shape[1] // stream.count
    new = range(stream.frames, stream.frames + stream.count)
    past = stream.memory.get(core) or {"frames": [], "dropped": 0}
    frames = [*past["frames"], *new]
    if past["frames"]:
        k, v = torch.cat((past["k"], k), 1), torch.cat((past["v"], v), 1)
    seen = [[m <= n and (n - m < stream.window or m < stream.sink) for m in frames] for n in new]
    mask = None
    if not all(map(all, seen)):
        mask = torch.tensor(seen, device=q.device)
        mask = mask.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)[None, None]
    out = stock(q, k, v, mask=mask, scale=scale)
    kept = [i for i, m in enumerate(frames) if m < stream.sink or m > new[-1] + 1 - stream.window]
    index = torch.tensor(kept, dtype=torch.long, device=q.device)

    def select(x):
        return x.detach().unflatten(1, (-1, tokens)).index_select(1, index).flatten(1, 2)

    memory = dict(
        frames=[frames[i] for i in kept], k=select(k), v=select(v),
        dropped=past["dropped"] + len(frames) - len(kept),
    )  # fmt: skip
    stream.remember(core, memory)
    return out


def convolve(stream, conv, stock, x):
    """A convolution over t - 1, t, t + 1 of (B, C, F, H W): the frame after is not there, it counts as 0."""
    before = stream.memory.get(conv)
    if before is None:
        before = x.new_zeros(*x.shape[:2], 1, x.shape[3])
    out = F.conv2d(torch.cat((before, x), 2), conv.weight[:, :, :2], conv.bias, groups=conv.groups)
    stream.remember(conv, before.copy_(x[:, :, -1:].detach()))
    return out


def rotate(stream, rope, stock, hidden_states):
    """The tables of `WanRotaryPosEmbed`, whose first features turn with time, from this frame on."""
    shifted, features = {}, _time_features(rope)
    for name in ("freqs_cos", "freqs_sin"):
        table = getattr(rope, name)
        if isinstance(stream.frames, Tensor):
            # in a graph the number of frames is an input, and a size no number: turn the whole table
            rows = torch.arange(table.shape[0], device=table.device)
            time, rest = table[(rows + stream.frames).clamp_max(len(table) - 1), :features], table
        else:
            rows = max(hidden_states.shape[2:])
            time, rest = _time_table(rope, table, name, stream.frames, rows), table[:rows]
            rest = F.pad(rest, (0, 0, 0, rows - rest.shape[0]))
        shifted[name] = torch.cat((time, rest[:, features:]), 1)
    plain = {name: value for name, value in vars(rope).items() if not name.startswith("_") and name != "forward"}
    return type(rope).forward(types.SimpleNamespace(**plain, **shifted), hidden_states)


def _time_features(rope: nn.Module) -> int:
    """How many features turn with time; diffusers 0.35 works it out in `WanRotaryPosEmbed.forward`."""
    return rope.t_dim if hasattr(rope, "t_dim") else rope.attention_head_dim - 2 * (rope.attention_head_dim // 3)


def _time_table(rope: nn.Module, table: Tensor, name: str, first: int, rows: int) -> Tensor:
    """Rows `first` on of the features that turn with time. The table ends; time does not."""
    features = _time_features(rope)
    if first + rows <= table.shape[0]:
        return table[first : first + rows, :features]
    frequencies = 10000.0 ** (-torch.arange(0, features, 2, dtype=torch.float64, device=table.device) / features)
    position = torch.arange(first, first + rows, dtype=torch.float64, device=table.device)
    function = torch.cos if name == "freqs_cos" else torch.sin
    known = function(frequencies).repeat_interleave(2).to(table.dtype)
    if table.shape[0] > 1 and not torch.allclose(known, table[1, :features], atol=1e-5):
        raise ValueError(f"stream: {first + rows} frames, and the model's rotary table ends at {table.shape[0]}")
    return function(position[:, None] * frequencies).repeat_interleave(2, 1).to(table.dtype)


def plan_of(model: nn.Module, window: int | None) -> tuple[dict[nn.Module, Any], dict[nn.Module, str]]:
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
        processor = layer.processor
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
            add(module, name, causal)
        elif isinstance(module, (SoftmaxAttention, GroupedQueryAttention)):
            add(module, name, windowed)
        elif isinstance(module, AttentionCore):
            ahead.append(f"{name or kind} ({module} sees all tokens)")
        elif isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
            ahead.append(f"{name} (torch's {kind} keeps no memory between calls)")
        elif kind == "GLUMBTempConv":
            add(module.conv_temp, f"{name}.conv_temp", convolve)
        elif kind == "WanRotaryPosEmbed":
            add(module, name, rotate)
        elif isinstance(module, (nn.Conv1d, nn.Conv3d)) and module.kernel_size[0] not in (1, module.stride[0]):
            ahead.append(f"{name} (a convolution over time)")
    if ahead:
        raise ValueError("model: it looks ahead, so frames cannot come one by one:\n" + "\n".join(ahead))
    if not any(isinstance(m, AttentionCore) for m in plan):
        raise ValueError(f"model: {type(model).__name__} has no attention that could remember frames")
    softmax = [names[m] for m, handler in plan.items() if handler is windowed]
    if softmax and window is None:
        raise ValueError(
            f"window: got None, expected the number of frames to keep: {', '.join(softmax[:3])} "
            f"{'have' if len(softmax) > 1 else 'has'} softmax self-attention"
        )
    return plan, names
