"""RMS norm and rotary position embedding of queries and keys, in one pass over both.

What runs where:

- CUDA in eager mode, no gradient wanted: the Triton kernel, one launch for q and k.
- A gradient wanted: plain torch, which is differentiable. So with `config.backend` at `"triton"`, too: the kernel
  has no backward.
- torch.compile and exports: plain torch, which inductor fuses and for which ONNX has operators. So with `"triton"`.
- CPU: plain torch; with `"triton"`, the interpreter or an error.
"""

import math
import numbers

import torch
from torch import Tensor

from diffattn.kernels._backend import use_triton
from diffattn.kernels._checks import DTYPES, shape_of
from diffattn.kernels.qk_norm_rope import ops as ops  # registers the operator
from diffattn.kernels.qk_norm_rope.reference import Rotary, apply_rotary, norm_rope_reference

__all__ = ["DTYPES", "Rotary", "apply_rotary", "qk_norm_rope", "runs_fused"]

# Larger heads, and with a norm across heads larger tokens, take plain torch: one program reads all of one.
MAX_HEAD_DIM = 1024
MAX_FEATURES = 16384


def runs_fused(q: Tensor, *others: Tensor | None) -> bool:
    """Whether `qk_norm_rope` runs its kernel on q and these others: k and the weights.

    For callers with a plain path of their own; the function itself takes every call.

    Raises: RuntimeError if `config.backend` is `"triton"` and the kernel cannot run.
    """
    if torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, *others)):
        return False
    return use_triton(q)


def qk_norm_rope(q, k=None, *, norms=None, rotate=None, across_heads=False):
    """RMS norm (Zhang and Sennrich 2019, eq. 4) of queries and keys, then rotary embedding (Su et al. 2021, eq. 34).

    y_n = rot_n(x_n / sqrt(mean(x_n^2) + eps) * weight),  the mean over the D features of a head or all H D of a token

    Args:
        q: (B, N, H, D), float16, bfloat16, float32 or float64, any strides; fastest if features are adjacent.
        k: (B, M, Hkv, D), dtype of q; None for one tensor alone.
        norms: a pair for (q, k), each None or (weight, eps): weight (D,), or (H D,) with `across_heads`, of any
            dtype above, or None for 1.
        rotate: a pair for (q, k), each None or (cos, sin, interleaved) as in `Rotary`: tables (N, R/2) or
            (1 or B, N, R/2), R at most D; features from R on pass through. No gradient reaches the tables.
        across_heads: the norms run over all heads of a token at once.
    Returns: (q, k) in the shapes and the dtype that they came in, or q alone if k is None; contiguous where Triton
        runs. The arithmetic is float32 (float64 for float64) and rounds once, at the end: nothing is rounded
        between norm and rotation, where a model that runs the two as modules does. A tensor with neither comes
        back as it is.
    Raises: TypeError or ValueError, naming the argument, what came and what would fit. RuntimeError if
        `config.backend` is `"triton"` and the kernel cannot run where by the list above it would.
    """
    q_norm, k_norm = _pair("norms", norms)
    q_rotary, k_rotary = _pair("rotate", rotate)
    q_rotary = _check("q", q, q, q_norm, q_rotary, across_heads)
    if k is not None:
        k_rotary = _check("k", k, q, k_norm, k_rotary, across_heads)
    elif k_norm is not None or k_rotary is not None:
        raise ValueError("k: got None, expected a tensor: norms or rotate has an entry for it")
    first, second = (q, q_norm, q_rotary), (k, k_norm, k_rotary)
    if k_norm is None and k_rotary is None:
        return _apply(across_heads, *first)[0] if k is None else (_apply(across_heads, *first)[0], k)
    if q_norm is None and q_rotary is None:
        return q, _apply(across_heads, *second)[0]
    return tuple(_apply(across_heads, *first, *second))


def _apply(across_heads, x, x_norm, x_rotary, y=None, y_norm=None, y_rotary=None):
    """[result] of x or [result, result] of x and y."""
    if x_norm is None and x_rotary is None:
        return [x]
    x_weight, x_eps = x_norm or (None, None)
    y_weight, y_eps = y_norm or (None, None)
    if not (_fits(x, across_heads) and _fits(y, across_heads) and runs_fused(x, y, x_weight, y_weight)):
        entries = (x, x_norm, x_rotary), (y, y_norm, y_rotary)
        return [norm_rope_reference(*entry, across_heads) for entry in entries if entry[0] is not None]
    x_cos, x_sin, x_interleaved = x_rotary or (None, None, True)
    y_cos, y_sin, y_interleaved = y_rotary or (None, None, True)
    return torch.ops.diffattn.qk_norm_rope(
        x, y, x_weight, y_weight, x_eps, y_eps, x_cos, x_sin, y_cos, y_sin, not x_interleaved, not y_interleaved,
        across_heads,
    )  # fmt: skip


def _fits(x, across_heads):
    if x is None:
        return True
    H, D = x.shape[2:]
    return D <= MAX_HEAD_DIM and not (across_heads and H * D > MAX_FEATURES)


def _pair(name, pair):
    if pair is None:
        return None, None
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"{name}: got {type(pair).__name__}, expected a pair: an entry or None for each of q and k")
    return pair


def _check(name, x, q, norm, rotary, across_heads):
    """Refuse what does not fit x, named `name`; returns the rotary as it enters the arithmetic."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, expected a tensor (B, N, H, D)")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: got {x.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    if x.ndim != 4:
        raise ValueError(f"{name}: got shape {shape_of(x)}, expected (B, N, H, D)")
    H, D = x.shape[2:]
    if H == 0 or D == 0:
        raise ValueError(f"{name}: got shape {shape_of(x)}, expected (B, N, H, D) with at least one head and feature")
    if x is not q:
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: got {x.dtype}, expected {q.dtype} as q")
        if x.device != q.device:
            raise ValueError(f"{name}: on {x.device}, expected {q.device} as q")
        if x.shape[0] != q.shape[0] or D != q.shape[3]:
            raise ValueError(
                f"{name}: got shape {shape_of(x)}, expected ({q.shape[0]}, M, Hkv, {q.shape[3]}) for q of shape "
                f"{shape_of(q)}"
            )
    if norm is not None:
        _check_norm(name, x, norm, H * D if across_heads else D)
    return None if rotary is None else _check_rotary(name, x, rotary)


def _check_norm(name, x, norm, features):
    if not isinstance(norm, (tuple, list)) or len(norm) != 2:
        raise TypeError(f"norms: {name} has {type(norm).__name__}, expected a pair (weight, eps) or None")
    weight, eps = norm
    if not isinstance(eps, numbers.Real):
        raise TypeError(f"norms: eps of {name} is {type(eps).__name__}, expected a number")
    if not 0 <= eps < math.inf:
        raise ValueError(f"norms: eps of {name} is {eps}, expected a finite number, 0 or more")
    if weight is None:
        return
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"norms: weight of {name} is {type(weight).__name__}, expected a tensor or None")
    if weight.dtype not in DTYPES:
        raise TypeError(f"norms: weight of {name} is {weight.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    if weight.device != x.device:
        raise ValueError(f"norms: weight of {name} is on {weight.device}, expected {x.device} as {name}")
    if weight.shape != (features,):
        raise ValueError(f"norms: weight of {name} has shape {shape_of(weight)}, expected ({features},)")


def _check_rotary(name, x, rotary):
    if not isinstance(rotary, (tuple, list)) or len(rotary) != 3:
        raise TypeError(f"rotate: {name} has {type(rotary).__name__}, expected (cos, sin, interleaved) or None")
    cos, sin, interleaved = rotary
    B, N, _, D = x.shape
    for table, t in (("cos", cos), ("sin", sin)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"rotate: {table} of {name} is {type(t).__name__}, expected a tensor (N, R/2)")
        if t.dtype not in DTYPES:
            raise TypeError(f"rotate: {table} of {name} is {t.dtype}, expected one of {', '.join(map(str, DTYPES))}")
        if t.device != x.device:
            raise ValueError(f"rotate: {table} of {name} is on {t.device}, expected {x.device} as {name}")
        shape = t.shape
        if len(shape) not in (2, 3) or shape[:-1] not in ((N,), (1, N), (B, N)) or not 0 < 2 * shape[-1] <= D:
            raise ValueError(
                f"rotate: {table} of {name} has shape {shape_of(t)}, expected ({N}, R/2) or ({B}, {N}, R/2) with R of "
                f"2 to {D}"
            )
    if cos.shape != sin.shape or cos.dtype != sin.dtype:
        raise ValueError(
            f"rotate: cos of {name} is {cos.dtype} {shape_of(cos)} and sin {sin.dtype} {shape_of(sin)}, expected "
            "them alike"
        )
    if cos.requires_grad or sin.requires_grad:
        cos, sin = cos.detach(), sin.detach()
    return Rotary(cos, sin, interleaved)
