"""Linear attention in tests: inputs, and the oracle, the reference in float64 on the same rounded inputs."""

import pytest
import torch

from diffattn.kernels.linear_attention import linear_attention, linear_attention_reference

MAPS = ("relu", "elu1", "softmax", None)
# relative Frobenius errors; rounding the output alone costs 1.7e-3, 2.1e-4 and 3e-8
BUDGET = {torch.bfloat16: 2.5e-3, torch.float16: 4e-4, torch.float32: 1e-5}
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def make_inputs(device, dtype, *, B=1, N=100, M=None, H=2, Hkv=None, D=32, E=None, feature_map="relu"):
    M, Hkv, E = M or N, Hkv or H, E or D
    q, k, v = (
        torch.randn(shape, device=device, dtype=dtype) for shape in ((B, N, H, D), (B, M, Hkv, D), (B, M, Hkv, E))
    )
    return (q.abs(), k.abs(), v) if feature_map is None else (q, k, v)


def make_rotary(device, N, D, *, B=None, dtype=torch.float32):
    angles = 6.3 * torch.rand((N, D // 2) if B is None else (B, N, D // 2), device=device)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def run(f, q, k, v, grad, **options):
    """[o, dq, dk, dv]"""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    o = f(q, k, v, **options)
    return [o.detach(), *torch.autograd.grad(o, (q, k, v), grad)]


def oracle(q, k, v, grad, *, rotary=None, **options):
    rotary = rotary and tuple(x.double() for x in rotary)
    q, k, v, grad = (x.double() for x in (q, k, v, grad))
    return run(linear_attention_reference, q, k, v, grad, rotary=rotary, **options)


def assert_close(actual, expected, dtype, names=("o", "dq", "dk", "dv")):
    for name, a, e in zip(names, actual, expected, strict=True):
        assert a.shape == e.shape
        assert a.dtype == dtype
        assert a.isfinite().all(), name
        error = (a.double() - e).norm() / e.norm().clamp_min(1e-30)
        assert error <= BUDGET[dtype], f"{name}: relative error {error:.2e}"


def check(q, k, v, **options):
    """Output and gradients of the kernels against the oracle."""
    grad = torch.randn(*q.shape[:3], v.shape[3], device=q.device, dtype=q.dtype)
    actual = run(linear_attention, q, k, v, grad, **options)
    assert_close(actual, oracle(q, k, v, grad, **options), q.dtype)
    return actual
