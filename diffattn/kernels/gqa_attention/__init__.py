"""Grouped-query and multi-query softmax attention, key/value heads never repeated.

What runs where, with `config.backend` at `"auto"`:

- CPU: torch's own attention with shared heads; where torch has no fused kernel (E != D, a mask that needs a
  gradient, forward-mode derivatives) the reference, whose scores take B H N M elements. torch.export: the same.
  Exports to ONNX: the reference, or from opset 23 on, if asked for, ONNX's Attention operator.
- CUDA, half precision, no mask, E = D, D a multiple of 8 up to 256 (128 with gradients): torch's own choice of kernel;
  on Hopper, from 4096 tokens and 64 features on, ours without gradients: 7 to 25% ahead, and 3% behind where few
  heads leave programs idle (benchmarks/results/h100/gqa_hopper_sweep.json).
- CUDA, half precision, a mask that differs from query to query or head to head: cuDNN's kernel through torch where
  torch would take it, without gradients.
- CUDA, all else: the Triton kernels, on Hopper a kernel of its own (hopper.py). torch would repeat the heads there,
  pad them, or keep B H N M scores.
- Gradients under `torch.use_deterministic_algorithms`: the Triton kernels, whose backward has no atomics.

`benchmarks/gqa_dispatch.py` times every candidate beside the one taken here, and the rule follows its results:
benchmarks/results/<gpu>/gqa_dispatch.json.
"""

import torch
import torch.nn.functional as F

from diffattn._config import config
from diffattn.kernels._autograd import forward_mode
from diffattn.kernels._backend import use_triton, writes_out_attention
from diffattn.kernels._checks import check_mask, check_qkv, check_scale
from diffattn.kernels.gqa_attention import ops  # noqa: F401  registers the operators
from diffattn.kernels.gqa_attention.reference import gqa_attention_int8_reference, gqa_attention_reference

__all__ = ["gqa_attention"]

MAX_HEAD_DIM = 256
PRECISIONS = (None, "int8")


def gqa_attention(q, k, v, *, mask=None, scale=None, precision=None):
    """Exact softmax attention whose query heads share key/value heads.

    o_n = sum_m softmax_m(scale q_n . k_m + mask_nm) v_m,  query head h reads key/value head h // (H / Hkv)

    Args:
        q: (B, N, H, D), D of 1 to 256, any strides.
        k: (B, M, Hkv, D), dtype of q; H is a multiple of Hkv. Never repeated in memory.
        v: (B, M, Hkv, E), dtype of q, E of 1 to 256.
        mask: broadcastable to (B, H, N, M), read in place; boolean (True = attend) or additive, in the dtype of
            q or float32.
        scale: float; D ** -0.5 if None.
        precision: None, or "int8" for inference in float16 or bfloat16: scores of queries and keys rounded to int8,
            an int8 for each feature and a scale for each row, after keys lost their mean and both were rotated. The
            relative error of the output is about 1e-2 where the inputs are Gaussian, four times that of bfloat16.
            Probabilities and values stay at 16 bits: rounded to 8 they alone would double it. So at most a quarter
            of the time of the products can go, and on an H100 none does: 6.7 ms with quantising where bfloat16 takes
            6.0 (32 heads, 16,384 tokens, D 128).
    Returns: (B, N, H, E) in the dtype of q; scores, softmax and sums are float32 (float64 for float64).
        A query with every key masked, by False or by -inf, gives zeros and has zero gradients, as in torch's
        own attention on a CPU.
    Raises: TypeError or ValueError, naming the argument, what came and what would fit. RuntimeError if
        `config.backend` is `"triton"` and the kernel cannot run or cannot give the gradient asked for, or if one is
        asked for with a precision.
    """
    _check(q, k, v, mask, scale)
    _check_precision(precision, q)
    scale = int(q.shape[-1]) ** -0.5 if scale is None else float(scale)
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    mask_grad = torch.is_grad_enabled() and mask is not None and mask.requires_grad

    if precision == "int8":
        if training or mask_grad:
            raise RuntimeError("gqa_attention: precision='int8' has no gradient; use it under torch.no_grad()")
        if use_triton(q):
            return torch.ops.diffattn.gqa_attention_int8(q, k, v, mask, scale)
        return gqa_attention_int8_reference(q, k, v, mask, scale)
    if use_triton(q):
        if mask_grad and config.backend == "triton":
            raise RuntimeError(
                "gqa_attention: the Triton kernel has no gradient for mask; detach it, or set "
                "DIFFATTN_BACKEND to auto or torch"
            )
        if config.backend == "triton" or not (mask_grad or _sdpa_is_faster(q, k, v, mask, scale, training)):
            if training:
                return torch.ops.diffattn.gqa_attention(q, k, v, mask, scale, True)[0]
            return torch.ops.diffattn.gqa_attention_inference(q, k, v, mask, scale)
        if not mask_grad:
            return _sdpa(q, k, v, mask, scale)
    if writes_out_attention() or mask_grad or forward_mode() or not _sdpa_shares_heads(q, k, v, mask):
        return gqa_attention_reference(q, k, v, mask, scale)
    return _sdpa(q, k, v, mask, scale)


def _sdpa(q, k, v, mask, scale):
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale, enable_gqa=True
    ).transpose(1, 2)
    return out if out.dtype == q.dtype else out.to(q.dtype)  # autocast gives another


def _sdpa_shares_heads(q, k, v, mask) -> bool:
    """Whether torch has a kernel for this call that reads shared heads in place, not its unfused path.

    The unfused path repeats the heads and keeps the scores; so does the reference, but for the heads.
    """
    if v.shape[-1] != q.shape[-1]:
        return False
    if q.device.type != "cuda":
        return q.device.type == "cpu"
    return q.dtype.itemsize == 2 and (mask is None or _cudnn_takes(q, k, v, mask))


def _cudnn_takes(q, k, v, mask) -> bool:
    """Whether torch would run cuDNN's kernel: the only one of its own that takes a mask and shared heads."""
    # A float32 mask with 16-bit queries comes out as NaN (torch 2.11). Compilers do not trace the question.
    if mask.dtype not in (torch.bool, q.dtype) or torch.compiler.is_compiling():
        return False
    # Elsewhere torch prefers its unfused path.
    if torch.cuda.get_device_capability(q.device)[0] not in (9, 10):
        return False
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.backends.cuda.can_use_cudnn_attention(torch.backends.cuda.SDPAParams(q, k, v, mask, 0.0, False, True))


def _sdpa_is_faster(q, k, v, mask, scale, training) -> bool:
    """The rule for CUDA tensors, all of it: change it here, after benchmarks/gqa_dispatch.py."""
    D = q.shape[-1]
    if training and torch.are_deterministic_algorithms_enabled():
        return False
    if q.dtype.itemsize != 2 or v.shape[-1] != D or D % 8 != 0:
        return False
    if mask is None:
        large = not training and D >= 64 and min(q.shape[1], k.shape[1]) >= 4096
        return D <= (128 if training else 256) and not (large and _hopper_takes(q, k, v, scale))
    over_keys = mask.shape[1] == mask.shape[2] == 1
    return not (training or over_keys) and _cudnn_takes(q, k, v, mask)


def _hopper_takes(q, k, v, scale) -> bool:
    from diffattn.kernels.gqa_attention import hopper

    # Compilers do not trace the question; there torch's kernel is as good as ours.
    return not torch.compiler.is_compiling() and hopper.takes(q, k, v, None, scale)


def _check_precision(precision, q):
    if precision not in PRECISIONS:
        raise ValueError(f"precision: got {precision!r}, expected None or 'int8'")
    if precision is not None and q.dtype.itemsize != 2:
        raise TypeError(
            f"precision: got {precision!r} with {q.dtype}, expected it with torch.float16 or torch.bfloat16"
        )


def _check(q, k, v, mask, scale):
    check_qkv(q, k, v)
    for name, x in (("q", q), ("v", v)):
        if not 1 <= x.shape[3] <= MAX_HEAD_DIM:
            raise ValueError(f"{name}: got {x.shape[3]} features a head, expected 1 to {MAX_HEAD_DIM}")
    check_scale(scale)
    check_mask(mask, q, k)
