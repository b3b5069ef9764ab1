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


_HERE = contextlib.nullcontext()


def on_device(x: torch.Tensor):
    """In which kernels are launched on the GPU of x."""
    return torch.cuda.device(x.device) if x.is_cuda and x.get_device() != torch.cuda.current_device() else _HERE


class Step:
    """One launch of a kernel on one GPU, all of it but its tensors and the numbers that may change from call to call.

    In each launch Triton finds anew, from all arguments, what it has compiled for such, which takes the CPU as long as
    a small kernel takes the GPU (benchmarks/NOTES.md). So what it found for these integers and constants is kept, and
    launched from then on. That tensors keep their dtypes is for whoever keeps a step to see to; that they start at a
    multiple of 16 bytes, as most do, is looked at here: for others Triton is asked.

    Args:
        kernel: whose arguments are tensors, `integers`, numbers, `constants` by name, in this order.
        options: of the compiler, such as num_warps.
    """

    def __init__(self, kernel, grid: tuple[int, ...], integers: tuple[int, ...], constants: dict, **options):
        self.kernel, self.integers, self.keywords = kernel, integers, constants | options
        self.grid = (*grid, 1, 1)[:3]
        self.constants = tuple(constants[name] for name in kernel.arg_names if name in constants)
        self.compiled = None

    def __call__(self, *tensors: torch.Tensor, numbers: tuple[float, ...] = ()) -> None:
        addresses = 0
        for tensor in tensors:
            addresses |= tensor.data_ptr()
        if addresses % 16:
            self.kernel[self.grid](*tensors, *self.integers, *numbers, **self.keywords)
        else:
            self.launch_aligned(*tensors, numbers=numbers)

    def launch_aligned(self, *tensors, numbers: tuple[float, ...] = ()) -> None:
        """The launch where the caller knows of the addresses; tensors may be descriptors of such."""
        if self.compiled is not None:
            self.compiled(*tensors, *self.integers, *numbers, *self.constants)
            return
        found = self.kernel[self.grid](*tensors, *self.integers, *numbers, **self.keywords)
        # the interpreter finds nothing
        self.compiled = None if found is None else found[self.grid]


def rotary_tables(cos: torch.Tensor, sin: torch.Tensor):
    """((cos, sin), strides): one set of strides serves both, of samples (0 where they share a table), of tokens and of
    features."""
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    return (cos, sin), (cos.stride(0) if cos.ndim == 3 and cos.shape[0] > 1 else 0, *cos.stride()[-2:])
