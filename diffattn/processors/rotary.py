"""diffusers' tables of rotary position embeddings, each style as one `Rotary`: real, one angle a pair."""

from typing import NamedTuple

import torch
from torch import Tensor

from diffattn.cores import AttentionCore, Rotary


def from_complex(freqs: Tensor | Rotary | None) -> Rotary | None:
    """cos + i sin of shape (N, D/2) or (1 or B, N, D/2), pairs (2i, 2i+1): Lumina, QwenImage, Z-Image, ...

    Exports make their tables of real numbers: a `Rotary` passes, and pairs of cos and sin in a last dimension of 2.
    """
    if freqs is None or isinstance(freqs, Rotary):
        return freqs
    tables = (freqs.real, freqs.imag) if freqs.is_complex() else freqs.unbind(-1)
    # one table for all, if there is but one
    return Rotary(*(table.squeeze(0) if table.dim() == 3 else table for table in tables))


def from_pairs(tables: tuple[Tensor, Tensor] | None) -> Rotary | None:
    """(cos, sin) with each angle twice in a row, pairs (2i, 2i+1): Flux, Wan, HunyuanVideo, ...

    Shapes (N, D), (1 or B, N, D) or (1 or B, N, 1, D).
    """
    if tables is None:
        return None
    cos, sin = (_flat(t) for t in tables)
    return Rotary(cos[..., 0::2], sin[..., 1::2])


def from_halves(tables: tuple[Tensor, Tensor] | None) -> Rotary | None:
    """(cos, sin) with all angles and then all again, pairs (i, i + R/2): Cosmos, AceStep, OmniGen, ...

    Shapes as in `from_pairs`; R may be less than D.
    """
    if tables is None:
        return None
    cos, sin = (_flat(t) for t in tables)
    half = cos.shape[-1] // 2
    return Rotary(cos[..., :half], sin[..., :half], interleaved=False)


def from_angles(angles: Tensor | None) -> Rotary | None:
    """The angles of `from_halves` themselves, (N, R): Stable Audio 3, SAME."""
    return None if angles is None else from_halves((angles.float().cos(), angles.float().sin()))


def from_matrices(matrices: Tensor | None) -> Rotary | None:
    """2x2 rotation matrices, pairs (2i, 2i+1): HiDream (B, N, 1, R/2, 2, 2), PRX (B, 1, N, R/2, 2, 2), Kandinsky
    (N, 1, R/2, 2, 2)."""
    if matrices is None:
        return None
    if matrices.dim() == 5:
        matrices = matrices.unsqueeze(0)
    return Rotary(*(_flat(matrices[..., row, 0]) for row in (0, 1)))


def _flat(table: Tensor) -> Tensor:
    """Drop the dimension of the heads, which is 1 and third or second, and that of a batch of one."""
    if table.dim() == 4:
        table = table.squeeze(2 if table.shape[2] == 1 else 1)
    return table.squeeze(0) if table.dim() == 3 else table


def split(rotary: Rotary | None, lengths: list[int]) -> list[Rotary | None]:
    """The tables of a joined sequence, one for each of its parts."""
    if rotary is None:
        return [None] * len(lengths)
    cos, sin = rotary.cos.split(lengths, dim=-2), rotary.sin.split(lengths, dim=-2)
    return [Rotary(*tables, rotary.interleaved) for tables in zip(cos, sin, strict=True)]


def join(rotaries: list[Rotary | None], lengths: list[int]) -> Rotary | None:
    """One table for a joined sequence; parts without one are not rotated."""
    # Lists, since torch 2.6 does not trace next() with a default.
    present = [r for r in rotaries if r is not None]
    if not present:
        return None
    known = present[0]
    batch = ([r.cos.shape[:1] for r in present if r.cos.dim() == 3] or [()])[0]

    def table(index: int, rest: float) -> Tensor:
        width = known.cos.shape[-1]
        parts = [
            known[index].new_full((*batch, length, width), rest) if r is None else r[index].expand(*batch, length, -1)
            for r, length in zip(rotaries, lengths, strict=True)
        ]
        return torch.cat(parts, dim=-2)

    return Rotary(table(0, 1.0), table(1, 0.0), known.interleaved)


class HeadRotary(NamedTuple):
    """A rotation by other angles in each head: LTX and Mochi. cos, sin: (1 or B, N, H, D/2)."""

    cos: Tensor
    sin: Tensor
    interleaved: bool = True

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate x (B, N, H, D) in float32 (float64 stays); the dtype of x returns."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        cos, sin = self.cos.to(dtype), self.sin.to(dtype)
        a, b = x.to(dtype).unflatten(-1, (-1, 2)).unbind(-1) if self.interleaved else x.to(dtype).chunk(2, dim=-1)
        rotated = (a * cos - b * sin, a * sin + b * cos)
        if self.interleaved:
            return torch.stack(rotated, dim=-1).flatten(-2).to(x.dtype)
        return torch.cat(rotated, dim=-1).to(x.dtype)


def heads_of(tables: tuple[Tensor, Tensor] | None, heads: int) -> HeadRotary | None:
    """(cos, sin) of shape (1 or B, N, H D), each angle twice in a row, as LTX applies them before the heads split."""
    if tables is None:
        return None
    cos, sin = (t.unflatten(-1, (heads, -1)) for t in tables)
    return HeadRotary(cos[..., 0::2], sin[..., 1::2])


def attend_by_head(core: AttentionCore, q: Tensor, k: Tensor, v: Tensor, rotate, **options) -> Tensor:
    """`core(q, k, v, rotate=...)` with a pair of `HeadRotary`, which no core knows: k's is None to take that of q."""
    of_q, of_k = rotate
    if core.rotates_first:
        return core(of_q.rotate(q), (of_k or of_q).rotate(k), v, **options)
    # Fold heads into the batch: then each has a table of its own.
    batch, _, heads, _ = q.shape
    mask = options.pop("mask", None)
    if mask is not None:
        mask = mask.expand(batch, heads, *mask.shape[2:]).flatten(0, 1).unsqueeze(1)
    q, k, v = (t.transpose(1, 2).flatten(0, 1).unsqueeze(2) for t in (q, k, v))
    of_q, of_k = (None if r is None else _fold(r, batch) for r in (of_q, of_k))
    out = core(q, k, v, mask=mask, rotate=(of_q, of_q if of_k is None else of_k), **options)
    return out.squeeze(2).unflatten(0, (batch, heads)).transpose(1, 2)


def _fold(rotary: HeadRotary, batch: int) -> Rotary:
    cos, sin = (t.expand(batch, -1, -1, -1).transpose(1, 2).flatten(0, 1) for t in (rotary.cos, rotary.sin))
    return Rotary(cos, sin, rotary.interleaved)
