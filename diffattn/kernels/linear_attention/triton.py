"""Launchers of the Triton kernels: block sizes, how the tokens are cut among programs, scratch memory."""

import contextlib
import dataclasses
import functools
import math

import torch

from diffattn.kernels.linear_attention.triton_bwd import (
    linear_attention_dkv_bwd_kernel,
    linear_attention_dq_bwd_kernel,
    linear_attention_dstate_bwd_kernel,
)
from diffattn.kernels.linear_attention.triton_fwd import (
    linear_attention_output_fwd_kernel,
    linear_attention_reduce_kernel,
    linear_attention_state_fwd_kernel,
)


@dataclasses.dataclass(frozen=True)
class Launch:
    """How one kernel runs: tokens a step, warps, pipeline stages, programs that fit a multiprocessor."""

    block: int
    warps: int
    stages: int
    resident: int


# By kernel, then by the padded width of a head: the first entry at least as wide is taken.
CONFIGS = {
    "state": {32: Launch(64, 4, 3, 4), 64: Launch(32, 4, 4, 4), 128: Launch(32, 8, 3, 1), 256: Launch(32, 8, 2, 1)},
    "output": {32: Launch(64, 4, 3, 4), 64: Launch(64, 4, 3, 3), 128: Launch(64, 4, 2, 2), 256: Launch(32, 8, 2, 1)},
    "dq": {32: Launch(64, 4, 3, 4), 64: Launch(64, 4, 2, 2), 128: Launch(64, 8, 2, 1), 256: Launch(32, 8, 1, 1)},
    "dstate": {32: Launch(64, 4, 3, 4), 64: Launch(32, 4, 4, 4), 128: Launch(32, 8, 3, 1), 256: Launch(32, 8, 2, 1)},
    "dkv": {32: Launch(64, 4, 2, 4), 64: Launch(64, 4, 2, 2), 128: Launch(32, 4, 2, 2), 256: Launch(16, 8, 1, 1)},
}
# The most elements of one D x BE block of the state: larger heads are cut along E.
STATE_BLOCK = {2: 128 * 128, 4: 64 * 128}
# What a program costs besides its tokens, in steps: loading the state, writing a part.
STEPS_PER_PROGRAM = 2


def _cdiv(a: int, b: int) -> int:
    # triton.cdiv and triton.next_power_of_2 cost microseconds outside a kernel, and there are a dozen a call.
    return -(-a // b)


def _padded(n: int) -> int:
    """The power of two that is at least n and at least 16, the least that `tl.dot` takes."""
    return max(16, 1 << (n - 1).bit_length())


def _launch(kernel: str, width: int, dtype: torch.dtype) -> Launch:
    table = CONFIGS[kernel]
    launch = table[min(w for w in table if w >= width)]
    if dtype != torch.bfloat16 and width > 64:
        # more parts of the state to hold
        launch = dataclasses.replace(launch, warps=8, resident=1)
    if dtype == torch.float32:
        launch = dataclasses.replace(launch, block=max(16, launch.block // 2), stages=1)
    return launch


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache(maxsize=4096)
def _cut(kernel: str, width: int, dtype: torch.dtype, device: torch.device, tokens: int, heads: int):
    """(launch, chunk, n_chunks) of a kernel that walks over the tokens of `heads` heads: n_chunks programs a head, of
    `chunk` blocks each, so that all finish soonest if as many run at a time as fit the device."""
    launch = _launch(kernel, width, dtype)
    slots = _multiprocessors(device) * launch.resident
    steps = _cdiv(tokens, launch.block)

    def finish(chunks):
        return _cdiv(heads * chunks, slots) * (_cdiv(steps, chunks) + STEPS_PER_PROGRAM)

    chunk = _cdiv(steps, min(range(1, min(steps, _cdiv(8 * slots, heads)) + 1), key=finish))
    return launch, chunk, _cdiv(steps, chunk)


def _alignment(*tensors: torch.Tensor) -> int:
    """The largest power of two up to 16 that divides every stride but the unit ones."""
    common = 16
    for x in tensors:
        for size, stride in zip(x.shape, x.stride(), strict=True):
            if size > 1 and stride != 1:
                common = math.gcd(common, stride)
    return common


class _Problem:
    """What the kernels of one call share."""

    def __init__(self, q, k, v, cos, sin, feature_map):
        self.B, self.M, self.Hkv, self.E = v.shape
        self.N, self.H, self.D = q.shape[1:]
        self.device, self.dtype = q.device, q.dtype
        BD = _padded(self.D)
        self.width = max(BD, _padded(self.E))
        BE = min(_padded(self.E), STATE_BLOCK[q.element_size()] // BD)
        self.e_blocks = _cdiv(self.E, BE)
        self.state_size = self.D * self.E + self.D
        self.softmax = feature_map == "softmax"
        # phi(q) and phi(k) have the bits of q and k: products with them need no second part
        self.exact = feature_map in ("relu", None) and cos is None
        self.sum = {torch.bfloat16: "split", torch.float16: "tf32x2", torch.float32: "tf32x3"}[q.dtype]
        self.parts = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 0}[q.dtype]
        # ROTARY: 0 for none, else the alignment of cos and sin
        self.constants = dict(D=self.D, E=self.E, BD=BD, BE=BE, MAP=feature_map, ROTARY=0)
        self.rotary = (q, q, 0, 0, 0)
        if cos is not None:
            # one set of strides serves both
            if cos.stride() != sin.stride():
                cos, sin = cos.contiguous(), sin.contiguous()
            self.constants["ROTARY"] = _alignment(cos)
            self.rotary = (cos, sin, cos.stride(0) if cos.ndim == 3 else 0, *cos.stride()[-2:])

    def cut(self, kernel: str, tokens: int, heads: int, e_blocks: int = 1):
        return _cut(kernel, self.width, self.dtype, self.device, tokens, self.B * heads * e_blocks)

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
        linear_attention_reduce_kernel[(self.B * self.Hkv, _cdiv(size, block))](
            parts, out, n, self.D, self.E, SOFTMAX=softmax, SIZE=size, PART_SIZE=part_size,
            BP=min(16, 1 << (n - 1).bit_length()), BX=block, num_warps=4,
        )  # fmt: skip
        return out


def _on_device(x: torch.Tensor):
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def linear_attention_fwd(q, k, v, cos, sin, feature_map, eps):
    """(o, state): state (B, Hkv, D E + D) is S and then z, for "softmax" the logarithm of z.

    `eps` is added to q . z, whatever the normalizer: for "mean" it is M times the user's.
    """
    p = _Problem(q, k, v, cos, sin, feature_map)
    o = p.empty(p.B, p.N, p.H, p.E, dtype=q.dtype)
    if p.M == 0 or q.numel() == 0 or o.numel() == 0:
        return o.zero_(), p.empty(p.B, p.Hkv, p.state_size).zero_()
    with _on_device(q):
        state = _key_state(p, k, v)
        _write_output(p, q, state, o, eps)
    return o, state


def linear_attention_bwd(grad, q, k, v, cos, sin, state, feature_map, eps):
    """(dq, dk, dv) from the gradient of o and the state of the forward."""
    p = _Problem(q, k, v, cos, sin, feature_map)
    dq = p.empty(*q.shape, dtype=q.dtype)
    dk = p.empty(*k.shape, dtype=q.dtype)
    dv = p.empty(*v.shape, dtype=q.dtype)
    if dq.numel() == 0 or dk.numel() == 0 or dv.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    with _on_device(q):
        dnormalizer = _write_dq(p, grad, q, state, dq, eps)
        dstate = _state_gradient(p, grad, q, state, eps)
        _write_dk_dv(p, k, v, state, dstate, dnormalizer, dk, dv)
    return dq, dk, dv


def _key_state(p: _Problem, k, v):
    launch, chunk, n_chunks = p.cut("state", p.M, p.Hkv, p.e_blocks)

    def sum_keys(rotated, online, log_sum):
        part_size = p.state_size + (p.D if online else 0)
        parts = p.empty(p.B, p.Hkv, n_chunks, part_size)
        constants = p.constants if rotated else {**p.constants, "ROTARY": 0}
        linear_attention_state_fwd_kernel[(p.B * p.Hkv * n_chunks, p.e_blocks)](
            k, v, *p.rotary[:2], log_sum, parts, *k.stride(), *v.stride(), *p.rotary[2:],
            p.M, p.Hkv, n_chunks, chunk, **constants, BM=launch.block,
            ALIGN=_alignment(k, v), EXACT=p.exact, SUM=p.sum, ONLINE=online, PART_SIZE=part_size,
            num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
        return p.reduce(parts, online)

    if not p.softmax:
        return sum_keys(rotated=True, online=False, log_sum=k)
    state = sum_keys(rotated=False, online=True, log_sum=k)
    if p.constants["ROTARY"]:
        # the rotation mixes features, each divided by a sum of its own: the sums have to be known before
        log_sum = state[..., p.D * p.E :].contiguous()
        state = sum_keys(rotated=True, online=False, log_sum=log_sum)
        state[..., p.D * p.E :] = log_sum
    return state


def _write_output(p: _Problem, q, state, o, eps):
    launch, chunk, n_chunks = p.cut("output", p.N, p.H, p.e_blocks)
    linear_attention_output_fwd_kernel[(p.B * p.H * n_chunks, p.e_blocks)](
        q, *p.rotary[:2], state, o, *q.stride(), *p.rotary[2:], p.N, p.H, n_chunks, chunk, p.H // p.Hkv, eps,
        **p.constants, BN=launch.block, ALIGN=_alignment(q), EXACT=p.exact, PARTS=p.parts,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip


def _write_dq(p: _Problem, grad, q, state, dq, eps):
    """Write dq and return the gradient of the normalizer (for "softmax", nothing of use)."""
    launch, chunk, n_chunks = p.cut("dq", p.N, p.H)
    parts = p.empty(p.B, p.H, n_chunks, 0 if p.softmax else p.D)
    linear_attention_dq_bwd_kernel[(p.B * p.H * n_chunks,)](
        grad, q, *p.rotary[:2], state, dq, parts, *grad.stride(), *q.stride(), *p.rotary[2:],
        p.N, p.H, n_chunks, chunk, p.H // p.Hkv, eps, **p.constants, BN=launch.block,
        ALIGN=_alignment(grad, q), PARTS=p.parts, STAGES=launch.stages,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    return None if p.softmax else p.reduce(parts.view(p.B, p.Hkv, -1, p.D))


def _state_gradient(p: _Problem, grad, q, state, eps):
    """The gradient of S, (B, Hkv, D E)."""
    launch, chunk, n_chunks = p.cut("dstate", p.N, p.H, p.e_blocks)
    parts = p.empty(p.B, p.H, n_chunks, p.D * p.E)
    linear_attention_dstate_bwd_kernel[(p.B * p.H * n_chunks, p.e_blocks)](
        grad, q, *p.rotary[:2], state, parts, *grad.stride(), *q.stride(), *p.rotary[2:],
        p.N, p.H, n_chunks, chunk, p.H // p.Hkv, eps, **p.constants, BN=launch.block,
        ALIGN=_alignment(grad, q), SUM=p.sum, num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    # the parts of the query heads that share a kv head lie side by side
    return p.reduce(parts.view(p.B, p.Hkv, -1, p.D * p.E))


def _write_dk_dv(p: _Problem, k, v, state, dstate, dnormalizer, dk, dv):
    launch, chunk, n_chunks = p.cut("dkv", p.M, p.Hkv)

    def dkv_bwd(dnormalizer, p_dk, correct):
        linear_attention_dkv_bwd_kernel[(p.B * p.Hkv * n_chunks,)](
            k, v, *p.rotary[:2], state, dstate, dnormalizer, p_dk, dv, *k.stride(), *v.stride(), *p.rotary[2:],
            p.M, p.Hkv, n_chunks, chunk, **p.constants, BM=launch.block, ALIGN=_alignment(k, v), EXACT=p.exact,
            PARTS=p.parts, CORRECT=correct, num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip

    if p.softmax and p.constants["ROTARY"]:
        parts = p.empty(p.B, p.Hkv, n_chunks, p.D)
        dkv_bwd(state, parts, correct=True)
        dnormalizer = p.reduce(parts)
    elif p.softmax:
        dnormalizer = (state[..., : p.D * p.E] * dstate).unflatten(-1, (p.D, p.E)).sum(-1)
    dkv_bwd(dnormalizer, dk, correct=False)
