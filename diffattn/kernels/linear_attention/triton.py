"""Launchers of the Triton kernels."""

import torch

from diffattn.kernels._backend import small_shared_memory
from diffattn.kernels._launch import PARTS, Launch, Step, alignment, cdiv, on_device, padded, power_of_2
from diffattn.kernels.linear_attention.launches import (
    CONFIGS,
    FUSED_TOKENS,
    PIECES_BLOCK,
    choose_launch,
    pieces,
    registers,
)
from diffattn.kernels.linear_attention.problem import Problem, problem_of
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


def linear_attention_fwd(q, k, v, cos, sin, feature_map, eps):
    """(o, state): state (B, Hkv, D E + D) is S and then z, for "softmax" the logarithm of z.

    `eps` is added to q . z, whatever the normalizer: for "mean" it is M times the user's.
    """
    return _forward(*problem_of(q, k, v, cos, sin, feature_map, eps), q, k, v, eps)


def _forward(p: Problem, tables, q, k, v, eps):
    o = p.empty(p.B, p.N, p.H, p.E, dtype=q.dtype)
    if p.M == 0 or q.numel() == 0 or o.numel() == 0:
        return o.zero_(), p.empty(p.B, p.Hkv, p.state_size).zero_()
    with on_device(q):
        if p.in_pieces:
            turns = p.turns(q, *tables)
            state = _key_state_in_pieces(p, k, v, turns)
            _write_output_in_pieces(p, q, turns, state, o, eps)
        else:
            state = _key_state(p, k, v, tables)
            _write_output(p, q, tables, state, o, eps)
    return o, state


def linear_attention_inference(q, k, v, cos, sin, feature_map, eps):
    """o alone. Few tokens go through one kernel that keeps the state to itself."""
    p, tables = problem_of(q, k, v, cos, sin, feature_map, eps)
    fused = _fused(p)
    if fused is None:
        return _forward(p, tables, q, k, v, eps)[0]
    o = p.empty(p.B, p.N, p.H, p.E, dtype=q.dtype)
    with on_device(q):
        fused(q, k, v, o, numbers=(eps,))
    return o


def linear_attention_bwd(grad, q, k, v, cos, sin, state, feature_map, eps):
    """(dq, dk, dv) from the gradient of o and the state of the forward."""
    p, tables = problem_of(q, k, v, cos, sin, feature_map, eps)
    dq = p.empty(*q.shape, dtype=q.dtype)
    dk = p.empty(*k.shape, dtype=q.dtype)
    dv = p.empty(*v.shape, dtype=q.dtype)
    if dq.numel() == 0 or dk.numel() == 0 or dv.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    with on_device(q):
        dstate = _write_dq(p, grad, q, tables, state, dq, eps)
        _write_dk_dv(p, k, v, tables, state, dstate, dk, dv)
    return dq, dk, dv


def _reduce(p: Problem, parts: torch.Tensor, softmax: bool = False) -> torch.Tensor:
    """(B, Hkv, n, size) to (B, Hkv, size); softmax: parts as of `linear_attention_state_fwd_kernel`."""
    n, part_size = parts.shape[2:]
    if n == 1 and not softmax:
        return parts.squeeze(2)
    size = p.state_size if softmax else part_size
    step = p.ready.get(("reduce", n, part_size, softmax))
    if step is None:
        block = 256
        step = p.ready["reduce", n, part_size, softmax] = Step(
            linear_attention_reduce_kernel, (p.B * p.Hkv, cdiv(size, block)), (n,),
            dict(D=p.D, E=p.E, SOFTMAX=softmax, SIZE=size, PART_SIZE=part_size, BP=min(16, power_of_2(n)), BX=block),
            num_warps=4,
        )  # fmt: skip
    out = p.empty(p.B, p.Hkv, size)
    step(parts, out)
    return out


def _fused(p: Problem) -> Step | None:
    """The kernel for few tokens, where it serves."""
    if "fused" not in p.ready:
        few = max(p.N, p.M) <= FUSED_TOKENS and p.width <= max(CONFIGS["fused"]) and p.H == p.Hkv
        none = p.softmax or p.constants["ROTARY"] or 0 in (*p.q[0], *p.v[0])
        p.ready["fused"] = _fused_step(p) if few and not none else None
    return p.ready["fused"]


def _fused_step(p: Problem) -> Step:
    launch = choose_launch("fused", p.width, p.dtype)
    constants = dict(
        D=p.D, E=p.E, BD=padded(p.D), BE=padded(p.E), BN=launch.block, MAP=p.constants["MAP"],
        ALIGN=alignment(p.q, p.k, p.v), PARTS=p.parts, STAGES=launch.stages,
    )  # fmt: skip
    integers = (*p.q[1], *p.k[1], *p.v[1], p.N, p.M, p.H)
    options = dict(num_warps=launch.warps, num_stages=launch.stages)
    return Step(linear_attention_fused_fwd_kernel, (p.B * p.H,), integers, constants, **options)


def _block_of_values(p: Problem, features: int) -> int:
    """The widest block of E, a power of two, that makes a state of so many features fit."""
    limit = PIECES_BLOCK[2 if p.dtype == torch.bfloat16 else 4] // (2 if small_shared_memory(p.device) else 1)
    return min(max(padded(p.E), p.least), power_of_2(limit // features + 1) // 2)


def _key_state_in_pieces(p: Problem, k, v, turns):
    BD, BD2 = pieces(p.D, p.least)
    BE = _block_of_values(p, BD + BD2)

    def prepare(launch, chunk, n_chunks):
        step = Step(
            linear_attention_pieces_state_fwd_kernel, (p.B * p.Hkv * n_chunks, cdiv(p.E, BE)),
            (*p.k[1], *p.v[1], p.turns_stride, p.M, p.Hkv, n_chunks, chunk),
            dict(D=p.D, E=p.E, BD=BD, BD2=BD2, BE=BE, BM=launch.block, MAP=p.constants["MAP"],
                 ROTARY=p.constants["ROTARY"] > 0, ALIGN=alignment(p.k, p.v), PARTS=p.parts, STAGES=launch.stages),
            **_compiled(launch, p.dtype),
        )  # fmt: skip
        return step, n_chunks

    def go(step, n_chunks):
        parts = p.empty(p.B, p.Hkv, n_chunks, p.state_size)
        step(k, v, turns, parts)
        return _reduce(p, parts)

    kernel = "rotary_state" if p.constants["ROTARY"] else "pieces_state"
    width = max(BD + BD2, sum(pieces(p.E, p.least)))
    return p.run(kernel, prepare, go, p.M, p.Hkv, cdiv(p.E, BE), width)


def _key_state(p: Problem, k, v, tables):
    heads = p.Hkv // p.pack

    def sum_keys(rotated, online, log_sum):
        part_size = p.state_size + (p.D if online else 0)

        def prepare(launch, chunk, n_chunks):
            constants = p.packed | dict(
                BM=launch.block, ALIGN=alignment(p.k, p.v), PARTS=p.parts, ONLINE=online, PART_SIZE=part_size,
                STAGES=launch.stages, ROTARY=p.constants["ROTARY"] if rotated else 0,
            )  # fmt: skip
            step = Step(
                linear_attention_state_fwd_kernel, (p.B * heads * n_chunks, p.e_blocks),
                (*p.k[1], *p.v[1], *p.table_strides, p.M, p.Hkv, n_chunks, chunk), constants,
                num_warps=launch.warps, num_stages=launch.stages,
            )  # fmt: skip
            return step, n_chunks

        def go(step, n_chunks):
            parts = p.empty(p.B, p.Hkv, n_chunks, part_size)
            step(k, v, *tables, log_sum, parts)
            return _reduce(p, parts, online)

        return p.run("state", prepare, go, p.M, heads, p.e_blocks, p.packed_width, (rotated, online))

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


def _write_output_in_pieces(p: Problem, q, turns, state, o, eps):
    BD, BD2 = pieces(p.D, p.least)
    rotary = p.constants["ROTARY"] > 0
    if rotary and BD >= 128 and BD2 == 0:
        # half of the queries in registers at a time
        BD, BD2 = BD // 2, BD // 2
    BE = _block_of_values(p, BD + BD2)
    parts = "tf32x1" if p.dtype == torch.float16 and p.width >= 128 else p.parts

    def prepare(launch, chunk, n_chunks):
        step = Step(
            linear_attention_pieces_output_fwd_kernel, (p.B * p.H * n_chunks, cdiv(p.E, BE)),
            (*p.q[1], p.turns_stride, p.N, p.H, n_chunks, chunk, p.H // p.Hkv),
            dict(D=p.D, E=p.E, BD=BD, BD2=BD2, BE=BE, BN=launch.block, MAP=p.constants["MAP"], ROTARY=rotary,
                 ALIGN=alignment(p.q), PARTS=parts, STAGES=launch.stages),
            **_compiled(launch, p.dtype),
        )  # fmt: skip
        return (step,)

    def go(step):
        step(q, turns, state, o, numbers=(eps,))

    kernel = "rotary_output" if rotary else "pieces_output"
    p.run(kernel, prepare, go, p.N, p.H, cdiv(p.E, BE), max(BD + BD2, BE))


def _write_output(p: Problem, q, tables, state, o, eps):
    heads = p.H // p.pack

    def prepare(launch, chunk, n_chunks):
        constants = p.packed | dict(
            BN=launch.block, ALIGN=alignment(p.q), PARTS=output_parts(p.width, p.dtype, p.raw), STAGES=launch.stages
        )
        step = Step(
            linear_attention_output_fwd_kernel, (p.B * heads * n_chunks, p.e_blocks),
            (*p.q[1], *p.table_strides, p.N, p.H, n_chunks, chunk, p.H // p.Hkv), constants,
            num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
        return (step,)

    def go(step):
        step(q, *tables, state, o, numbers=(eps,))

    p.run("output", prepare, go, p.N, heads, p.e_blocks, p.packed_width)


def _write_dq(p: Problem, grad, q, tables, state, dq, eps):
    """Write dq and return the gradients of S and, but for "softmax", z: (B, Hkv, D E + D) like the state."""
    heads = p.H // p.pack
    # wide heads leave no registers to do two things at once
    sharers = 1 if p.packed_width <= 64 else 1 + p.e_blocks
    part_size = p.D * p.E if p.softmax else p.state_size
    strides = grad.stride()

    def prepare(launch, chunk, n_chunks):
        constants = p.packed | dict(
            BN=launch.block, ALIGN=alignment((grad.shape, strides), p.q), PARTS=p.parts, SHARERS=sharers,
            PART_SIZE=part_size, TURNED=p.q[1][1] == 1, EDGE=p.N % launch.block > 0, **_bwd_constants(launch, p.dtype),
        )  # fmt: skip
        step = Step(
            linear_attention_dq_bwd_kernel, (p.B * heads * n_chunks * sharers,),
            (*strides, *p.q[1], *p.table_strides, p.N, p.H, n_chunks, chunk, p.H // p.Hkv), constants,
            **_compiled(launch, p.dtype),
        )  # fmt: skip
        return step, n_chunks

    def go(step, n_chunks):
        parts = p.empty(p.B, p.H, n_chunks, part_size)
        step(grad, q, *tables, state, dq, parts, numbers=(eps,))
        # the parts of the query heads that share a kv head lie side by side
        return _reduce(p, parts.view(p.B, p.Hkv, p.H // p.Hkv * n_chunks, part_size))

    # Where E is cut, dq's programs have more to do than dS's: as many of both as if they did not share even out.
    e_blocks = sharers if p.e_blocks == 1 else 1
    return p.run("queries", prepare, go, p.N, heads, e_blocks, p.packed_width, strides)


def _write_dk_dv(p: Problem, k, v, tables, state, dstate, dk, dv):
    heads = p.Hkv // p.pack
    correction = dstate

    def keys_bwd(kernel, do_dk=False, do_dv=False):
        """do_dk, do_dv: write them. With neither, return the correction of the softmax over tokens."""
        correct = not (do_dk or do_dv)
        # float16 parts of wide heads: see `_write_output`
        precision = "tf32x1" if p.dtype == torch.float16 and do_dv and not do_dk else p.parts

        def prepare(launch, chunk, n_chunks):
            constants = p.packed | dict(
                BM=launch.block, ALIGN=alignment(p.k, p.v), PARTS=precision, DK=do_dk, DV=do_dv, CORRECT=correct,
                TURNED=p.k[1][1] == 1, EDGE=p.M % launch.block > 0, **_bwd_constants(launch, p.dtype),
            )  # fmt: skip
            step = Step(
                linear_attention_dkv_bwd_kernel, (p.B * heads * n_chunks,),
                (*p.k[1], *p.v[1], *p.table_strides, p.M, p.Hkv, n_chunks, chunk), constants,
                **_compiled(launch, p.dtype),
            )  # fmt: skip
            return step, n_chunks

        def go(step, n_chunks):
            parts = p.empty(p.B, p.Hkv, n_chunks, p.D) if correct else dk
            step(k, v, *tables, state, dstate, correction, parts, dv)
            return _reduce(p, parts) if correct else None

        return p.run(kernel, prepare, go, p.M, heads, width=p.packed_width, variant=(do_dk, do_dv))

    if p.softmax and p.constants["ROTARY"]:
        correction = keys_bwd("dk")
    elif p.softmax:
        correction = (state[..., : p.D * p.E] * dstate).unflatten(-1, (p.D, p.E)).sum(-1)
    if _keys_at_once(p):
        keys_bwd("keys", do_dk=True, do_dv=True)
    else:
        keys_bwd("dk", do_dk=True)
        keys_bwd("dv", do_dv=True)


def _keys_at_once(p: Problem) -> bool:
    """Whether dk and dv come from one kernel: beyond these widths there are no registers for it."""
    return p.packed_width <= (64 if p.constants["ROTARY"] else max(CONFIGS["keys"])) and p.e_blocks == 1


def _bwd_constants(launch: Launch, dtype: torch.dtype) -> dict[str, int | bool]:
    return dict(APART=dtype == torch.bfloat16 and launch.block < 16 * launch.warps, STAGES=launch.stages)


def _compiled(launch: Launch, dtype: torch.dtype) -> dict[str, int | None]:
    """How a kernel whose registers are limited is compiled."""
    return dict(num_warps=launch.warps, num_stages=launch.stages, maxnreg=registers(launch, dtype))
