"""Which implementation a call runs: the Triton operator or plain torch."""

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Iterator

import torch

from diffattn._config import config
from diffattn.kernels._autograd import forward_mode

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Triton 3.2 (torch 2.6) ends the process over linear attention's kernels, 3.3 (torch 2.7) refuses some of them.
OLDEST_TRITON = (3, 4)

# Ampere: Turing has neither bfloat16 nor the shared memory that tiles take.
OLDEST_CAPABILITY = (8, 0)


def _triton_version() -> tuple[int, ...] | None:
    """(3, 6) of 3.6.0, without importing it: None if it is not installed, () if it does not say."""
    if importlib.util.find_spec("triton") is None:
        return None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return tuple(int(part) for part in re.findall(r"\d+", importlib.metadata.version("triton"))[:2])
    return ()


# Looked up here, not in a function: torch.compile traces those and refuses find_spec, behind functools.cache too.
_TRITON = _triton_version()
_HAS_EXPORT_FLAG = hasattr(torch.compiler, "_is_exporting_flag")
_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def interpreting() -> bool:
    """True if Triton kernels run in Triton's interpreter, on CPU tensors.

    Triton reads the variable when a kernel is defined, so it has to be set before triton and diffattn are imported.
    """
    return _INTERPRETING


def exporting_to_onnx() -> bool:
    """True inside both ONNX exporters."""
    return torch.onnx.is_in_onnx_export()


_onnx_attention = False


@contextlib.contextmanager
def onnx_attention(has_operator: bool) -> Iterator[None]:
    """Say whether the ONNX graph that is made meanwhile may hold an Attention operator, which opset 23 has.

    For the whole process, as `torch.onnx` keeps that it is exporting.
    """
    global _onnx_attention
    before, _onnx_attention = _onnx_attention, has_operator
    try:
        yield
    finally:
        _onnx_attention = before


def writes_out_attention() -> bool:
    """True inside an export to ONNX whose graph has to hold attention's products and softmax.

    Plain torch.export keeps torch's own attention, which reads shared heads in place.
    """
    return exporting_to_onnx() and not _onnx_attention


def exporting() -> bool:
    """True inside `torch.export.export` (torch 2.6: with `strict=False`) and both ONNX exporters."""
    # The flag, not is_exporting(): up to torch 2.11 that is true under torch.compile too (pytorch/pytorch#176347), and
    # every compiled model would take the torch path.
    if not _HAS_EXPORT_FLAG:
        return exporting_to_onnx() or (torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling())
    # Both exporters either set the flag or trace; torch.onnx itself takes 10 us to answer, in every call of a kernel.
    return torch.compiler._is_exporting_flag or (torch.jit.is_tracing() and exporting_to_onnx())


def tracing(tensor: torch.Tensor) -> bool:
    """Whether a call makes a graph: what tensors hold cannot be asked, and their sizes may be symbols."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or type(tensor.data) is not torch.Tensor


@functools.cache
def small_shared_memory(device: torch.device) -> bool:
    """Whether a program has about 100 KB of shared memory, as on GeForce, L4, L40 and A10 GPUs, and not the 163 KB and
    more of A100, Hopper and Blackwell data center GPUs, on one of which launch configurations are chosen."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) not in ((8, 0), (9, 0), (10, 0), (10, 3))


_gpus: dict[int, str | None] = {}


def _why_not_gpu(index: int) -> str | None:
    if index not in _gpus:
        capability, name = torch.cuda.get_device_capability(index), torch.cuda.get_device_name(index)
        found, oldest = (".".join(map(str, x)) for x in (capability, OLDEST_CAPABILITY))
        old = f"the kernels need a GPU of compute capability {oldest} or more, and {name} has {found}"
        _gpus[index] = old if capability < OLDEST_CAPABILITY else None
    return _gpus[index]


# To torch.compile the answer is a constant. That is what torch.compiler.assume_constant_result writes, which would
# bring in all of torch._dynamo, over a second, with `import diffattn`.
_why_not_gpu._dynamo_marked_constant = True


def _why_not_triton(tensor: torch.Tensor) -> str | None:
    if forward_mode():
        return "the kernels have no forward-mode derivative (torch.func.jvp)"
    if _TRITON is None:
        return "triton is not installed"
    if tensor.dtype not in TRITON_DTYPES:
        return f"the kernels take float16, bfloat16 and float32, not {tensor.dtype}"
    if interpreting():
        if tensor.dtype == torch.bfloat16:
            return "Triton's interpreter computes wrong products in bfloat16"
        return None
    if _TRITON and _TRITON < OLDEST_TRITON:
        found, oldest = (".".join(map(str, version)) for version in (_TRITON, OLDEST_TRITON))
        return f"triton is {found} and the kernels need {oldest} or newer, which torch 2.8 and later bring along"
    if torch.version.hip is not None:
        # launch options that only NVIDIA's compiler takes, and never run
        return "this torch is for AMD GPUs and the kernels are written for NVIDIA's"
    if tensor.device.type != "cuda":
        return f"the tensors are on {tensor.device} and the kernels need a CUDA device"
    return _why_not_gpu(tensor.device.index or 0)


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether an op whose first argument is `tensor` runs its Triton kernel.

    An export always takes the torch path: ONNX has no equivalent of a custom operator.

    Raises: RuntimeError if `config.backend` is `"triton"` and the kernel cannot run.
    """
    if config.backend == "torch" or exporting():
        return False
    reason = _why_not_triton(tensor)
    if config.backend == "triton":
        if reason is not None:
            raise RuntimeError(f"DIFFATTN_BACKEND=triton was asked for, but {reason}")
        return True
    return reason is None and tensor.device.type == "cuda"
