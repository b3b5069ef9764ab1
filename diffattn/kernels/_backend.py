"""Which implementation a call runs: the Triton operator or plain torch."""

import functools
import importlib.util
import os

import torch

from diffattn._config import config

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """True if Triton kernels run in Triton's interpreter, on CPU tensors.

    Triton reads the variable when a kernel is defined, so it has to be set before triton is imported.
    """
    return os.environ.get("TRITON_INTERPRET") == "1"


def _why_not_triton(tensor: torch.Tensor) -> str | None:
    if not _triton_installed():
        return "triton is not installed"
    if tensor.dtype not in TRITON_DTYPES:
        return f"the kernels take float16, bfloat16 and float32, not {tensor.dtype}"
    if interpreting():
        if tensor.dtype == torch.bfloat16:
            return "Triton's interpreter computes wrong products in bfloat16"
        return None
    if tensor.device.type != "cuda":
        return f"the tensors are on {tensor.device} and the kernels need a CUDA device"
    return None


def use_triton(tensor: torch.Tensor) -> bool:
    """Whether an op whose first argument is `tensor` runs its Triton kernel.

    Exporting to ONNX always takes the torch path: a custom operator has no ONNX equivalent.

    Raises: RuntimeError if `config.backend` is `"triton"` and the kernel cannot run.
    """
    if config.backend == "torch" or torch.onnx.is_in_onnx_export():
        return False
    reason = _why_not_triton(tensor)
    if config.backend == "triton":
        if reason is not None:
            raise RuntimeError(f"DIFFATTN_BACKEND=triton was asked for, but {reason}")
        return True
    return reason is None and tensor.device.type == "cuda"
