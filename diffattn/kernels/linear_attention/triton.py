"""Launchers of the Triton kernels."""

import functools
import math
from collections.abc import Callable

import torch

from diffattn._config import config
from diffattn.kernels._autotune import size_class, tuned
from diffattn.kernels._backend import small_shared_memory
from diffattn.kernels._launch import (
    PARTS,
    Launch,
    aligned,
    alignment,
    cdiv,
    on_device,
    padded,
    power_of_2,
    rotary_tables,
)
from diffattn.kernels.linear_attention.launches import (
    CONFIGS,
    FUSED_TOKENS,
    PACKED_WIDTH,
    PIECES_BLOCK,
    STATE_BLOCK,
    choose_launch,
    cut,
    other_launches,
    pieces,
    registers,
)
from diffattn.kernels.linear_attention.triton_dkv import linear_attention_dkv_bwd_kernel
from diffattn.kernels.linear_attention.triton_dq import linear_attention_dq_bwd_kernel
from diffattn.kernels.linear_attention.triton_fwd import (
    linear_attention_fused_fwd_kernel,
    linear_attention_output_fwd_kernel,
)
from diffattn.kernels.linear_attention.triton_pieces import (
    linear_attention_pieces_output_fwd_kernel,
    linear_attention_pieces_state_fwd_kernel,
)
from diffattn.kernels.linear_attention.triton_state import (
    linear_attention_reduce_kernel,
    linear_attention_state_fwd_kernel,
)


class _Problem:
    """What the kernels of one call share."""

    def __init__(self, q, k, v, cos, sin, feature_map, eps):
        self.B, self.M, self.Hkv, self.E = v.shape
        self.N, self.H, self.D = q.shape[1:]
        self.device, self.dtype = q.device, q.dtype
        BD = padded(self.D)
        self.width = max(BD, padded(self.E))
        state_block = STATE_BLOCK[2 if q.dtype == torch.bfloat16 else 4] // (2 if small_shared_memory(q.device) else 1)
        BE = min(padded(self.E), state_block // BD)
        self.e_blocks = cdiv(self.E, BE)
        self.state_size = self.D * self.E + self.D
        self.softmax = feature_map == "softmax"
        self.parts = PARTS[q.dtype]
        # phi(q) and phi(k), as they are multiplied, have the bits of q and k
        self.raw = feature_map in ("relu", None) and cos is None
        # ROTARY: 0 for none, else the alignment of cos and sin
        self.constants = dict(D=self.D, E=self.E, BD=BD, BE=BE, MAP=feature_map, ROTARY=0)
        self.pack = 1
        # with eps = 0 the 0 / 0 of one head would reach its neighbours
        if self.D == self.E == BD <= PACKED_WIDTH // 2 and self.H == self.Hkv and not self.softmax and cos is None:
            self.pack = math.gcd(PACKED_WIDTH // BD, self.H) if eps > 0 else 1
        self.packed_width = self.width * self.pack
        packed = {"PACK": self.pack} | ({} if self.pack == 1 else {"BD": self.packed_width, "BE": self.packed_width})
        self.rotary = (q, q, 0, 0, 0)
        self.tables = cos, sin
        if cos is not None:
            tables, strides = rotary_tables(cos, sin)
            self.constants["ROTARY"] = aligned(tables[0])
            self.rotary = (*tables, *strides)
        # whether the forward takes the kernels of triton_pieces.py
        self.in_pieces = not self.softmax and (self.width > 64 or cos is not None)
        # its narrowest tile: see `pieces`
        self.least = min(64, self.width)
        # the forward kernels' constants: heads share tiles
        self.packed = self.constants | packed

    @functools.cached_property
    def turns(self):
        """(the rotary tables side by side, the stride of samples), see triton_pieces.py; without tables, something."""
        cos, sin = self.tables
        if cos is None:
            return self.rotary[0], 0
        # written in place: torch.stack, and rounding its result, take longer
        turns = cos.new_empty(*cos.shape, 2, dtype=torch.float16 if self.dtype == torch.bfloat16 else None)
        turns[..., 0], turns[..., 1] = cos, sin
        return turns, turns.stride(0) if cos.ndim == 3 and cos.shape[0] > 1 else 0

    def run(self, kernel: str, function: Callable, tokens: int, heads: int, e_blocks: int = 1, width: int = 0):
        """function(launch, chunk, n_chunks), with the table's launch, or the fastest where a search is asked for."""
        rotary = self.constants["ROTARY"] > 0 and not kernel.startswith("rotary")
        programs = self.B * heads * e_blocks

        def launched(launch):
            return function(launch, *cut(launch, self.device, tokens, programs))

        launch = choose_launch(kernel, width or self.width, self.dtype, rotary, small_shared_memory(self.device))
        if config.autotune:
            problem = (self.D, self.E, self.pack, str(self.constants["MAP"]), rotary, str(self.dtype))
            key = (*problem, size_class(tokens), size_class(programs))
            launch = tuned(f"linear_attention {kernel}", key, launch, other_launches(launch), launched)
        return launched(launch)

    def empty(self, *shape, dtype=torch.float32):
        return torch.empty(shape, device=self.device, dtype=dtype)

    def reduce(self, parts: torch.Tensor, softmax: bool = False) -> torch.Tensor:
        """(B, Hkv, n, size) to (B, Hkv, size); softmax: parts as of `linear_attention_state_fwd_kernel`."""
        n, part_size = parts.shape[2:]
        if n == 1 and not softmax:
            return parts.squeeze(2)
        size = self.state_size if softmax else part_size
        out = self.empty(self.B, self.Hkv, size)
        block = 256
        linear_attention_reduce_kernel[(self.B * self.Hkv, cdiv(size, block))](
            parts, out, n, self.D, self.E, SOFTMAX=softmax, SIZE=size, PART_SIZE=part_size,
            BP=min(16, power_of_2(n)), BX=block, num_warps=4,
        )  # fmt: skip
        return out


def linear_attention_fwd(q, k, v, cos, sin, feature_map, eps):
    """(o, state): state (B, Hkv, D E + D) is S and then z, for "softmax" the logarithm of z.

    `eps` is added to q . z, whatever the normalizer: for "mean" it is M times the user's.
    """
    p = _Problem(q, k, v, cos, sin, feature_map, eps)
    o = p.empty(p.B, p.N, p.H, p.E, dtype=q.dtype)
    if p.M == 0 or q.numel() == 0 or o.numel() == 0:
        return o.zero_(), p.empty(p.B, p.Hkv, p.state_size).zero_()
    with on_device(q):
        state = _key_state(p, k, v)
        _write_output(p, q, state, o, eps)
    return o, state


def linear_attention_inference(q, k, v, cos, sin, feature_map, eps):
    """o alone. Few tokens go through one kernel that keeps the state to itself."""
    layouts = (q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride())
    fused = None if cos is not None else _fused(*layouts, q.dtype, feature_map)
    if fused is None:
        return linear_attention_fwd(q, k, v, cos, sin, feature_map, eps)[0]
    programs, numbers, constants = fused
    o = torch.empty((*layouts[0][:3], layouts[4][3]), dtype=q.dtype, device=q.device)
    with on_device(q):
        linear_attention_fused_fwd_kernel[(programs,)](q, k, v, o, *numbers, eps, **constants)
    return o


@functools.lru_cache(maxsize=4096)
def _fused(q_shape, q_stride, k_shape, k_stride, v_shape, v_stride, dtype, feature_map):
    """(programs, integers, constants) of the kernel for few tokens, or None where it does not serve. Such a call takes
    the GPU microseconds, and finding these would take the CPU as many."""
    B, N, H, D = q_shape
    M, kv_heads, E = v_shape[1:]
    width = max(padded(D), padded(E))
    if 0 in (*q_shape, *v_shape) or H != kv_heads or feature_map == "softmax":
        return None
    if max(N, M) > FUSED_TOKENS or width > max(CONFIGS["fused"]):
        return None
    launch = choose_launch("fused", width, dtype)
    constants = dict(
        D=D, E=E, BD=padded(D), BE=padded(E), BN=launch.block, MAP=feature_map,
        ALIGN=alignment((q_shape, q_stride), (k_shape, k_stride), (v_shape, v_stride)), PARTS=PARTS[dtype],
        STAGES=launch.stages, num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    return B * H, (*q_stride, *k_stride, *v_stride, N, M, H), constants


def linear_attention_bwd(grad, q, k, v, cos, sin, state, feature_map, eps):
    """(dq, dk, dv) from the gradient of o and the state of the forward."""
    p = _Problem(q, k, v, cos, sin, feature_map, eps)
    dq = p.empty(*q.shape, dtype=q.dtype)
    dk = p.empty(*k.shape, dtype=q.dtype)
    dv = p.empty(*v.shape, dtype=q.dtype)
    if dq.numel() == 0 or dk.numel() == 0 or dv.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    with on_device(q):
        dstate = _write_dq(p, grad, q, state, dq, eps)
        _write_dk_dv(p, k, v, state, dstate, dk, dv)
    return dq, dk, dv


def _block_of_values(p: _Problem, features: int) -> int:
    """The widest block of E, a power of two, that makes a state of so many features fit."""
    limit = PIECES_BLOCK[2 if p.dtype == torch.bfloat16 else 4] // (2 if small_shared_memory(p.device) else 1)
    return min(max(padded(p.E), p.least), power_of_2(limit // features + 1) // 2)


def _key_state_in_pieces(p: _Problem, k, v):
    BD, BD2 = pieces(p.D, p.least)
    BE = _block_of_values(p, BD + BD2)
    turns, stride_tb = p.turns

    def launched(launch, chunk, n_chunks):
        parts = p.empty(p.B, p.Hkv, n_chunks, p.state_size)
        linear_attention_pieces_state_fwd_kernel[(p.B * p.Hkv * n_chunks, cdiv(p.E, BE))](
            k, v, turns, parts, *k.stride(), *v.stride(), stride_tb, p.M, p.Hkv, n_chunks, chunk,
            D=p.D, E=p.E, BD=BD, BD2=BD2, BE=BE, BM=launch.block, MAP=p.constants["MAP"],
            ROTARY=p.constants["ROTARY"] > 0, ALIGN=aligned(k, v), PARTS=p.parts, STAGES=launch.stages,
            num_warps=launch.warps, num_stages=launch.stages, maxnreg=registers(launch, p.dtype),
        )  # fmt: skip
        return p.reduce(parts)

    kernel = "rotary_state" if p.constants["ROTARY"] else "pieces_state"
    return p.run(kernel, launched, p.M, p.Hkv, cdiv(p.E, BE), max(BD + BD2, sum(pieces(p.E, p.least))))


def _key_state(p: _Problem, k, v):
    if p.in_pieces:
        return _key_state_in_pieces(p, k, v)
    heads = p.Hkv // p.pack

    def sum_keys(rotated, online, log_sum):
        part_size = p.state_size + (p.D if online else 0)

        def launched(launch, chunk, n_chunks):
            parts = p.empty(p.B, p.Hkv, n_chunks, part_size)
            linear_attention_state_fwd_kernel[(p.B * heads * n_chunks, p.e_blocks)](
                k, v, *p.rotary[:2], log_sum, parts, *k.stride(), *v.stride(), *p.rotary[2:],
                p.M, p.Hkv, n_chunks, chunk, **(p.packed if rotated else {**p.packed, "ROTARY": 0}), BM=launch.block,
                ALIGN=aligned(k, v), PARTS=p.parts, ONLINE=online, PART_SIZE=part_size, STAGES=launch.stages,
                num_warps=launch.warps, num_stages=launch.stages,
            )  # fmt: skip
            return p.reduce(parts, online)

        return p.run("state", launched, p.M, heads, p.e_blocks, p.packed_width)

    if not p.softmax:
        return sum_keys(rotated=True, online=False, log_sum=k)
    state = sum_keys(rotated=False, online=True, log_sum=k)
    if p.constants["ROTARY"]:
        # the rotation mixes features, each divided by a sum of its own: the sums have to be known before
        log_sum = state[..., p.D * p.E :].contiguous()
        state = sum_keys(rotated=True, online=False, log_sum=log_sum)
        state[..., p.D * p.E :] = log_sum
    return state


def output_parts(width: int, dtype: torch.dtype, exact: bool) -> str:
    """How the product of queries and state is split; `exact`: queries have the bits of the data. The registers of a
    wide head have no room for more parts."""
    if width >= 128 and dtype == torch.float16:
        return "tf32x1"
    return "tf32cut" if width >= 128 and dtype == torch.bfloat16 and not exact else PARTS[dtype]


def _write_output_in_pieces(p: _Problem, q, state, o, eps):
    BD, BD2 = pieces(p.D, p.least)
    rotary = p.constants["ROTARY"] > 0
    if rotary and BD >= 128 and BD2 == 0:
        # half of the queries in registers at a time
        BD, BD2 = BD // 2, BD // 2
    BE = _block_of_values(p, BD + BD2)
    turns, stride_tb = p.turns
    parts = "tf32x1" if p.dtype == torch.float16 and p.width >= 128 else p.parts

    def launched(launch, chunk, n_chunks):
        linear_attention_pieces_output_fwd_kernel[(p.B * p.H * n_chunks, cdiv(p.E, BE))](
            q, turns, state, o, *q.stride(), stride_tb, p.N, p.H, n_chunks, chunk, p.H // p.Hkv, eps,
            D=p.D, E=p.E, BD=BD, BD2=BD2, BE=BE, BN=launch.block, MAP=p.constants["MAP"],
            ROTARY=rotary, ALIGN=aligned(q), PARTS=parts, STAGES=launch.stages,
            num_warps=launch.warps, num_stages=launch.stages, maxnreg=registers(launch, p.dtype),
        )  # fmt: skip

    kernel = "rotary_output" if rotary else "pieces_output"
    p.run(kernel, launched, p.N, p.H, cdiv(p.E, BE), max(BD + BD2, BE))


def _write_output(p: _Problem, q, state, o, eps):
    if p.in_pieces:
        return _write_output_in_pieces(p, q, state, o, eps)
    heads = p.H // p.pack
    parts = output_parts(p.width, p.dtype, p.raw)

    def launched(launch, chunk, n_chunks):
        linear_attention_output_fwd_kernel[(p.B * heads * n_chunks, p.e_blocks)](
            q, *p.rotary[:2], state, o, *q.stride(), *p.rotary[2:], p.N, p.H, n_chunks, chunk, p.H // p.Hkv, eps,
            **p.packed, BN=launch.block, ALIGN=aligned(q), PARTS=parts,
            STAGES=launch.stages, num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip

    p.run("output", launched, p.N, heads, p.e_blocks, p.packed_width)


def _write_dq(p: _Problem, grad, q, state, dq, eps):
    """Write dq and return the gradients of S and, but for "softmax", z: (B, Hkv, D E + D) like the state."""
    heads = p.H // p.pack
    # wide heads leave no registers to do two things at once
    sharers = 1 if p.packed_width <= 64 else 1 + p.e_blocks
    part_size = p.D * p.E if p.softmax else p.state_size

    def launched(launch, chunk, n_chunks):
        parts = p.empty(p.B, p.H, n_chunks, part_size)
        linear_attention_dq_bwd_kernel[(p.B * heads * n_chunks * sharers,)](
            grad, q, *p.rotary[:2], state, dq, parts, *grad.stride(), *q.stride(), *p.rotary[2:],
            p.N, p.H, n_chunks, chunk, p.H // p.Hkv, eps, **p.packed, BN=launch.block, ALIGN=aligned(grad, q),
            PARTS=p.parts, SHARERS=sharers, PART_SIZE=part_size, TURNED=q.stride(1) == 1,
            EDGE=p.N % launch.block > 0, **_compiled(launch, p.dtype),
        )  # fmt: skip
        # the parts of the query heads that share a kv head lie side by side
        return p.reduce(parts.view(p.B, p.Hkv, p.H // p.Hkv * n_chunks, part_size))

    # Where E is cut, dq's programs have more to do than dS's: as many of both as if they did not share even out.
    return p.run("queries", launched, p.N, heads, sharers if p.e_blocks == 1 else 1, p.packed_width)


def _write_dk_dv(p: _Problem, k, v, state, dstate, dk, dv):
    heads = p.Hkv // p.pack
    correction = dstate

    def keys_bwd(kernel, do_dk=False, do_dv=False):
        """do_dk, do_dv: write them. With neither, return the correction of the softmax over tokens."""
        correct = not (do_dk or do_dv)
        # float16 parts of wide heads: see `_write_output`
        precision = "tf32x1" if p.dtype == torch.float16 and do_dv and not do_dk else p.parts

        def launched(launch, chunk, n_chunks):
            parts = p.empty(p.B, p.Hkv, n_chunks, p.D if correct else 0)
            linear_attention_dkv_bwd_kernel[(p.B * heads * n_chunks,)](
                k, v, *p.rotary[:2], state, dstate, correction, parts if correct else dk, dv,
                *k.stride(), *v.stride(), *p.rotary[2:], p.M, p.Hkv, n_chunks, chunk, **p.packed, BM=launch.block,
                ALIGN=aligned(k, v), PARTS=precision, DK=do_dk, DV=do_dv, CORRECT=correct,
                TURNED=k.stride(1) == 1, EDGE=p.M % launch.block > 0, **_compiled(launch, p.dtype),
            )  # fmt: skip
            return p.reduce(parts) if correct else None

        return p.run(kernel, launched, p.M, heads, width=p.packed_width)

    if p.softmax and p.constants["ROTARY"]:
        correction = keys_bwd("dk")
    elif p.softmax:
        correction = (state[..., : p.D * p.E] * dstate).unflatten(-1, (p.D, p.E)).sum(-1)
    if _keys_at_once(p):
        keys_bwd("keys", do_dk=True, do_dv=True)
    else:
        keys_bwd("dk", do_dk=True)
        keys_bwd("dv", do_dv=True)


def _keys_at_once(p: _Problem) -> bool:
    """Whether dk and dv come from one kernel: beyond these widths there are no registers for it."""
    return p.packed_width <= (64 if p.constants["ROTARY"] else max(CONFIGS["keys"])) and p.e_blocks == 1


def _compiled(launch: Launch, dtype: torch.dtype) -> dict[str, int | bool | None]:
    """How a backward kernel is compiled."""
    return dict(
        APART=dtype == torch.bfloat16 and launch.block < 16 * launch.warps, STAGES=launch.stages,
        num_warps=launch.warps, num_stages=launch.stages, maxnreg=registers(launch, dtype),
    )  # fmt: skip
