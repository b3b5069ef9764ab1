"""Launchers of the Triton kernels: block sizes, how the tokens are cut among programs, scratch memory."""

import functools
import itertools
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
    multiprocessors,
    on_device,
    padded,
    power_of_2,
    rotary_tables,
)
from diffattn.kernels.linear_attention.triton_bwd import (
    linear_attention_dkv_bwd_kernel,
    linear_attention_dq_bwd_kernel,
)
from diffattn.kernels.linear_attention.triton_fwd import (
    linear_attention_fused_fwd_kernel,
    linear_attention_output_fwd_kernel,
)
from diffattn.kernels.linear_attention.triton_state import (
    linear_attention_reduce_kernel,
    linear_attention_state_fwd_kernel,
)

# By kernel, then by the padded width of a tile: the first entry at least as wide is taken. Chosen on one H100 in
# bfloat16 (benchmarks/NOTES.md). "queries" is dq and dS in one kernel, "keys" dk and dv.
CONFIGS = {
    "fused": {32: Launch(128, 4, 3, 4), 64: Launch(64, 4, 3, 4)},
    "state": {64: Launch(64, 4, 3, 2), 128: Launch(64, 4, 3, 2), 256: Launch(32, 8, 2, 1)},
    "output": {64: Launch(64, 4, 4, 2), 128: Launch(64, 4, 2, 2), 256: Launch(64, 8, 2, 1)},
    "queries": {32: Launch(64, 4, 3, 4), 64: Launch(64, 4, 3, 2)},
    "dq": {128: Launch(64, 8, 3, 2), 256: Launch(32, 8, 1, 1)},
    "dstate": {128: Launch(64, 8, 3, 2), 256: Launch(32, 8, 2, 1)},
    "keys": {32: Launch(128, 8, 2, 2), 64: Launch(64, 4, 3, 4)},
    "dk": {128: Launch(64, 8, 2, 2), 256: Launch(16, 8, 1, 1)},
    "dv": {128: Launch(64, 4, 3, 2), 256: Launch(64, 8, 1, 1)},
}
# The most elements of one D x BE block of the state, by the bytes of its parts: larger heads are cut along E. Half of
# it where shared memory is small.
STATE_BLOCK = {2: 128 * 128, 4: 64 * 128}
# What a program costs besides its tokens, in steps: loading the state, writing a part.
STEPS_PER_PROGRAM = 2
# Narrow heads share a tile of up to this many features.
PACKED_WIDTH = 64
# Up to this many tokens one program takes a whole head; beyond, other multiprocessors would wait for it.
FUSED_TOKENS = 2048


@functools.lru_cache(maxsize=1024)
def choose_launch(kernel: str, width: int, dtype: torch.dtype, rotary: bool = False, small: bool = False) -> Launch:
    table = CONFIGS[kernel]
    launch = table[min(w for w in table if w >= width)]
    if dtype != torch.bfloat16:
        # parts of 4 bytes
        launch = launch._replace(stages=min(2, launch.stages))
        if width > 64:
            launch = launch._replace(warps=8, resident=1)
    if dtype == torch.float32:
        launch = launch._replace(block=max(16, launch.block // 2), stages=1)
    if rotary and width > 64:
        # tables of cos and sin to hold as well
        launch = launch._replace(stages=min(launch.stages, 2 if width <= 128 else 1))
        if kernel == "state":
            launch = launch._replace(block=32, warps=8)
    if small and (width > 64 or rotary):
        # Compiled for such GPUs, measured on none.
        launch = launch._replace(stages=min(2, launch.stages), block=min(32, launch.block))
    return launch


def _other_launches(launch: Launch) -> list[Launch]:
    """What a search tries beside the table's choice."""
    blocks = (max(16, launch.block // 2), launch.block, 2 * launch.block)
    choices = itertools.product(blocks, (4, 8), (2, 3, 4), (1, 2, 4))
    return [Launch(*choice) for choice in choices]


@functools.lru_cache(maxsize=4096)
def _cut(launch: Launch, device: torch.device, tokens: int, heads: int) -> tuple[int, int]:
    """(chunk, n_chunks) of a kernel that walks over the tokens of `heads` heads: n_chunks programs a head, of `chunk`
    blocks each, so that all finish soonest if as many run at a time as fit the device."""
    slots = multiprocessors(device) * launch.resident
    steps = cdiv(tokens, launch.block)

    def finish(chunks):
        return cdiv(heads * chunks, slots) * (cdiv(steps, chunks) + STEPS_PER_PROGRAM)

    chunk = cdiv(steps, min(range(1, min(steps, cdiv(8 * slots, heads)) + 1), key=finish))
    return chunk, cdiv(steps, chunk)


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
        if cos is not None:
            tables, strides = rotary_tables(cos, sin)
            self.constants["ROTARY"] = aligned(tables[0])
            self.rotary = (*tables, *strides)
        # the forward kernels' constants: heads share tiles
        self.packed = self.constants | packed

    def run(self, kernel: str, function: Callable, tokens: int, heads: int, e_blocks: int = 1, width: int = 0):
        """function(launch, chunk, n_chunks), with the table's launch, or the fastest where a search is asked for."""
        rotary = self.constants["ROTARY"] > 0
        programs = self.B * heads * e_blocks

        def launched(launch):
            return function(launch, *_cut(launch, self.device, tokens, programs))

        launch = choose_launch(kernel, width or self.width, self.dtype, rotary, small_shared_memory(self.device))
        if config.autotune:
            problem = (self.D, self.E, self.pack, str(self.constants["MAP"]), rotary, str(self.dtype))
            key = (*problem, size_class(tokens), size_class(programs))
            launch = tuned(f"linear_attention {kernel}", key, launch, _other_launches(launch), launched)
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
        dnormalizer, dstate = _write_dq(p, grad, q, state, dq, eps)
        _write_dk_dv(p, k, v, state, dstate, dnormalizer, dk, dv)
    return dq, dk, dv


def _key_state(p: _Problem, k, v):
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


def _write_output(p: _Problem, q, state, o, eps):
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
    """Write dq and return the gradients of the normalizer (for "softmax", nothing of use) and of S, (B, Hkv, D E)."""

    def queries_bwd(kernel, dq, do_dq, do_dstate):
        e_blocks = 1 if do_dq else p.e_blocks

        def launched(launch, chunk, n_chunks):
            dnormalizer = p.empty(p.B, p.H, n_chunks, p.D if do_dq and not p.softmax else 0)
            dstate = p.empty(p.B, p.H, n_chunks, p.D * p.E if do_dstate else 0)
            linear_attention_dq_bwd_kernel[(p.B * p.H * n_chunks, e_blocks)](
                grad, q, *p.rotary[:2], state, dq, dnormalizer, dstate, *grad.stride(), *q.stride(), *p.rotary[2:],
                p.N, p.H, n_chunks, chunk, p.H // p.Hkv, eps, **p.constants, BN=launch.block, ALIGN=aligned(grad, q),
                PARTS=p.parts, DQ=do_dq, DSTATE=do_dstate, STAGES=launch.stages,
                num_warps=launch.warps, num_stages=launch.stages,
            )  # fmt: skip
            # the parts of the query heads that share a kv head lie side by side
            return (x.view(p.B, p.Hkv, p.H // p.Hkv * n_chunks, x.shape[-1]) for x in (dnormalizer, dstate))

        return p.run(kernel, launched, p.N, p.H, e_blocks)

    if p.width <= max(CONFIGS["queries"]):
        dnormalizer, dstate = queries_bwd("queries", dq, True, True)
    else:
        dnormalizer, _ = queries_bwd("dq", dq, True, False)
        _, dstate = queries_bwd("dstate", dq, False, True)
    return None if p.softmax else p.reduce(dnormalizer), p.reduce(dstate)


def _write_dk_dv(p: _Problem, k, v, state, dstate, dnormalizer, dk, dv):
    def keys_bwd(kernel, dnormalizer, do_dk=False, do_dv=False):
        """do_dk, do_dv: write them. With neither, return the correction of the softmax over tokens."""
        correct = not (do_dk or do_dv)
        # float16 parts of wide heads: see `_write_output`
        precision = "tf32x1" if p.dtype == torch.float16 and do_dv and not do_dk else p.parts

        def launched(launch, chunk, n_chunks):
            parts = p.empty(p.B, p.Hkv, n_chunks, p.D if correct else 0)
            linear_attention_dkv_bwd_kernel[(p.B * p.Hkv * n_chunks,)](
                k, v, *p.rotary[:2], state, dstate, dnormalizer, parts if correct else dk, dv,
                *k.stride(), *v.stride(), *p.rotary[2:], p.M, p.Hkv, n_chunks, chunk, **p.constants, BM=launch.block,
                ALIGN=aligned(k, v), PARTS=precision, DK=do_dk, DV=do_dv, CORRECT=correct, STAGES=launch.stages,
                num_warps=launch.warps, num_stages=launch.stages,
            )  # fmt: skip
            return p.reduce(parts) if correct else None

        return p.run(kernel, launched, p.M, p.Hkv)

    if p.softmax and p.constants["ROTARY"]:
        dnormalizer = keys_bwd("dk", state)
    elif p.softmax:
        dnormalizer = (state[..., : p.D * p.E] * dstate).unflatten(-1, (p.D, p.E)).sum(-1)
    if p.width <= max(CONFIGS["keys"]):
        keys_bwd("keys", dnormalizer, do_dk=True, do_dv=True)
    else:
        keys_bwd("dk", dnormalizer, do_dk=True)
        keys_bwd("dv", dnormalizer, do_dv=True)
