"""Parts of diffusers' models that a graph cannot hold, written so that it can: position embeddings."""

import copy
import math
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffattn.kernels import Rotary


def replacements(model: nn.Module, check: Callable[[], None] | None) -> dict[str, Any]:
    """The parts of a model to replace, by attribute.

    Args:
        check: given where every attention layer has diffattn's processor, which takes rotary tables of real numbers;
            raises if one has not any more.
    """
    table = PARTS if check is None else PARTS | {name: partial(f, check=check) for name, f in REAL_TABLES.items()}
    found = {name: part for name, part in vars(model).items() if type(part).__name__ in table}
    found |= {name: part for name, part in model.named_children() if type(part).__name__ in table}
    return {name: table[type(part).__name__](part) for name, part in found.items()}


def _with_forward(forward: Callable) -> Callable[[nn.Module], nn.Module]:
    def replace(part: nn.Module) -> nn.Module:
        part = copy.copy(part)
        part.forward = types.MethodType(forward, part)
        return part

    return replace


def _patch_embed(self: nn.Module, latent: Tensor) -> Tensor:
    """`PatchEmbed.forward`, which asks whether a picture has the size of its table: an answer that a graph keeps."""
    rows, columns = (size // self.patch_size for size in latent.shape[-2:])
    latent = self.proj(latent)
    if self.flatten:
        latent = latent.flatten(2).transpose(1, 2)
    if self.layer_norm:
        latent = self.norm(latent)
    if self.pos_embed is None:
        return latent
    if self.pos_embed_max_size:
        table = _middle(self.pos_embed, self.pos_embed_max_size, rows, columns)
    else:
        at = [_spread(n, self.base_size, latent.device) / self.interpolation_scale for n in (columns, rows)]
        width = self.pos_embed.shape[-1] // 2
        across, down = (_sines(position, width) for position in at)
        table = torch.cat((across.expand(rows, -1, -1), down.unsqueeze(1).expand(-1, columns, -1)), dim=-1)
        table = table.flatten(0, 1).float()
    return (latent + table).to(latent.dtype)


# Compilers take no message that is made of sizes.
BEYOND_THE_TABLE = "hidden_states: more rows or columns of patches than the model's pos_embed_max_size"


def _middle(table: Tensor, size: int, rows: int, columns: int) -> Tensor:
    """The middle rows and columns of a table (1, size * size, C), (1, rows * columns, C)."""
    for n in (rows, columns):
        torch._check(n <= size, lambda: BEYOND_THE_TABLE)
    row = torch.arange(rows, device=table.device) + (size - rows) // 2
    column = torch.arange(columns, device=table.device) + (size - columns) // 2
    return table[:, (row.unsqueeze(1) * size + column).flatten()]


def _spread(n: int, base: float, device: torch.device) -> Tensor:
    """0, base / n, 2 base / n, ... [n]"""
    return torch.arange(n, device=device, dtype=torch.float32) / (torch.scalar_tensor(n, device=device) / base)


def _sines(position: Tensor, width: int) -> Tensor:
    """Sines, then cosines, of positions [n] at width / 2 frequencies from 1 down to 1 / 10000: [n, width], float64
    where the device has that."""
    dtype = torch.float32 if position.device.type == "mps" else torch.float64
    power = torch.arange(width // 2, device=position.device, dtype=dtype) / (width / 2)
    angles = position.to(dtype).unsqueeze(1) * (1 / 10000**power)
    return torch.cat((angles.sin(), angles.cos()), dim=1)


def _mochi_rope(self: nn.Module, frequencies: Tensor, frames: int, height: int, width: int, device=None, dtype=None):
    """`MochiRoPE.forward`, whose torch.linspace wants its number of points from the start."""
    scale = (self.target_area / (torch.scalar_tensor(height, device=device) * width)).sqrt()
    at = [torch.arange(frames, device=device, dtype=dtype)]
    for n in (height, width):
        middle = torch.scalar_tensor(n, device=device) / 2
        at.append((torch.arange(n, device=device, dtype=dtype) + 0.5 - middle) * scale)
    position = torch.stack(torch.meshgrid(*at, indexing="ij"), dim=-1).flatten(0, 2)
    angles = torch.einsum("nd,dhf->nhf", position.float(), frequencies.float())
    return angles.cos(), angles.sin()


def _omnigen_rope(self: nn.Module, hidden_states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """`OmniGenSuScaledRotaryEmbedding.forward`, which asks the positions for the larger of two sets of factors."""
    known, device = self.original_max_position_embeddings, hidden_states.device
    long, short = (torch.tensor(f, dtype=torch.float32, device=device) for f in (self.long_factor, self.short_factor))
    factors = torch.where(position_ids.max() < known, short, long)
    power = torch.arange(0, self.dim, 2, device=device).float() / self.dim
    angles = position_ids[0].float().unsqueeze(1) * (1 / (factors * self.base**power))
    angles = torch.cat((angles, angles), dim=-1)
    scale = self.max_position_embeddings / known
    scale = math.sqrt(1 + math.log(scale) / math.log(known)) if scale > 1 else 1.0
    return angles.cos() * scale, angles.sin() * scale


class RealTables(nn.Module):
    """A part that cuts, lays out and joins tables of cos + i sin, which no ONNX operator takes: those of cos and those
    of sin go the same way, one after the other. Returns a `Rotary` in the place of each complex tensor."""

    def __init__(self, part: nn.Module, check: Callable[[], None]):
        super().__init__()
        self.check = check
        self.cos, self.sin = (_mapped(part, f) for f in (torch.real, torch.imag))

    def forward(self, *args, **kwargs):
        self.check()
        cos, sin = self.cos(*args, **kwargs), self.sin(*args, **kwargs)
        return tuple(map(Rotary, cos, sin)) if isinstance(cos, tuple) else Rotary(cos, sin)


def _mapped(part: nn.Module, function: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of a part with a function of each complex tensor that it holds."""
    part = copy.copy(part)
    for name, value in vars(part).items():
        if isinstance(value, Tensor) and value.is_complex():
            vars(part)[name] = function(value).contiguous()
    return part


class RealPairs:
    """`RopeEmbedder`, called with positions (N, axes), for real numbers: cos and sin of each angle, (N, D/2, 2)."""

    def __init__(self, part: Any, check: Callable[[], None]):
        self.check = check
        tables = part.precompute_freqs_cis(part.axes_dims, part.axes_lens, theta=part.theta)
        self.tables = [torch.view_as_real(table) for table in tables]

    def __call__(self, ids: Tensor) -> Tensor:
        self.check()
        return torch.cat([table.to(ids.device)[ids[:, axis]] for axis, table in enumerate(self.tables)], dim=1)


#: Class of a part -> what takes its place.
PARTS = {
    "PatchEmbed": _with_forward(_patch_embed),
    "MochiRoPE": _with_forward(_mochi_rope),
    "OmniGenSuScaledRotaryEmbedding": _with_forward(_omnigen_rope),
}
#: The same, for parts that make rotary tables.
REAL_TABLES = {
    "QwenEmbedRope": RealTables,
    "QwenEmbedLayer3DRope": RealTables,
    "NucleusMoEEmbedRope": RealTables,
    "RopeEmbedder": RealPairs,
}
