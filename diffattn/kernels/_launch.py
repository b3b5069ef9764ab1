"""What launchers of Triton kernels share."""

import contextlib
import functools
import math
from typing import NamedTuple

import torch

# How products split float32 operands, see linear_attention/triton_tiles.py.
PARTS = {torch.bfloat16: "bf16", torch.float16: "tf32", torch.float32: "tf32x3"}


class Launch(NamedTuple):
    """How one kernel runs: tokens a step, warps, pipeline stages, programs that fit a multiprocessor."""

    block: int
    warps: int
    stages: int
    resident: int


def cdiv(a: int, b: int) -> int:
    # triton.cdiv and triton.next_power_of_2 cost microseconds outside a kernel, and there are a dozen a call.
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least that is at least n."""
    return 1 << (n - 1).bit_length()


def padded(n: int) -> int:
    """The power of two that is at least n and at least 16, the least that `tl.dot` takes."""
    return max(16, power_of_2(n))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def alignment(*layouts: tuple[tuple[int, ...], tuple[int, ...]]) -> int:
    """The largest power of two up to 16 that divides every stride but the unit ones, of (shape, stride) pairs."""
    common = 16
    for shape, stride in layouts:
        for n, step in zip(shape, stride, strict=True):
            if n > 1 and step != 1:
                common = math.gcd(common, step)
    return common


def aligned(*tensors: torch.Tensor) -> int:
    return alignment(*((x.shape, x.stride()) for x in tensors))


def on_device(x: torch.Tensor):
    """In which kernels are launched on the GPU of x."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def rotary_tables(cos: torch.Tensor, sin: torch.Tensor):
    """((cos, sin), strides): one set of strides serves both, of samples (0 where they share a table), of tokens and of
    features."""
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    return (cos, sin), (cos.stride(0) if cos.ndim == 3 and cos.shape[0] > 1 else 0, *cos.stride()[-2:])
