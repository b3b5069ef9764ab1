"""Causal linear attention in tests: inputs, and the oracle, the recurrence in float64 on the same rounded inputs."""

import pytest
import torch

from diffattn.kernels import causal_linear_attention
from diffattn.kernels.causal_linear_attention import causal_linear_attention_reference

# relative Frobenius errors; rounding the output alone costs 1.7e-3, 2.1e-4 and 3e-8
BUDGET = {torch.bfloat16: 2.5e-3, torch.float16: 4e-4, torch.float32: 1e-5}
# Samples. In bfloat16 what two roundings leave is 2.35e-3 on the average over many tokens, and scatters over few.
ENOUGH = 32
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
DECAYS = (None, "head", "token", "channel")
NAMES = ("o", "state", "dq", "dk", "dv", "ddecay", "dstate")


def make_inputs(
    device, dtype, *, B=1, N=40, H=2, Hkv=None, D=16, E=None, block=1, decay=None, strength=2.0, state=True,
    normalize=True, feature_map=None,
):  # fmt: skip
    """(q, k, v, decay, state)"""
    Hkv, E = Hkv or H, E or D
    q, k, v = (torch.randn(s, device=device, dtype=dtype) for s in ((B, N, H, D), (B, N, Hkv, D), (B, N, Hkv, E)))
    if normalize and feature_map is None:
        q, k = q.abs(), k.abs()
    shape = {None: None, "head": (Hkv,), "token": (B, N // block, Hkv), "channel": (B, N // block, Hkv, D)}[decay]
    g = None if shape is None else -strength * torch.rand(shape, device=device)
    size = D * E + (D if normalize else 0)
    return q, k, v, g, torch.rand(B, Hkv, size, device=device) if state else None


def run(f, inputs, grads, **options):
    """[o, state, dq, dk, dv, ddecay, dstate], without those of inputs that are None."""
    inputs = [None if x is None else x.detach().requires_grad_() for x in inputs]
    outputs = f(*inputs, **options)
    given = [x for x in inputs if x is not None]
    return [x.detach() for x in outputs] + list(torch.autograd.grad(outputs, given, grads))


def kernel(q, k, v, decay, state, **options):
    return causal_linear_attention(q, k, v, decay=decay, state=state, return_state=True, **options)


def reference(q, k, v, decay, state, form="recurrent", **options):
    return causal_linear_attention_reference(q, k, v, decay=decay, state=state, form=form, **options)


def assert_close(actual, expected, dtype, names=NAMES):
    for name, a, e in zip(names, actual, expected, strict=True):
        assert a.shape == e.shape, name
        assert a.isfinite().all(), name
        error = (a.double() - e).norm() / e.norm().clamp_min(1e-30)
        assert error <= BUDGET[dtype], f"{name}: relative error {error:.2e}"


def check(*inputs, feature_map=None, normalize=True, **options):
    """Outputs and all gradients of the kernels against the recurrence in float64."""
    q, _, v, decay, state = inputs
    options = dict(block=1) | options | dict(feature_map=feature_map, normalize=normalize, eps=1e-6)
    size = q.shape[3] * v.shape[3] + (q.shape[3] if normalize else 0)
    grads = (
        torch.randn(*q.shape[:3], v.shape[3], device=q.device, dtype=q.dtype),
        torch.randn(q.shape[0], v.shape[2], size, device=q.device),
    )
    actual = run(kernel, inputs, grads, **options)
    doubles = [None if x is None else x.double() for x in inputs]
    expected = run(reference, doubles, [x.double() for x in grads], **options)
    if decay is not None and decay.dim() == 1:
        actual[5], expected[5] = with_size_of_terms(actual[5], expected[5], doubles, grads, options)
    if decay is not None and decay.dim() == 4 and feature_map is None:
        # The gradient of a channel's decay is a sum over later steps of q dq - k dk, which nearly cancels.
        size = sum((x * dx).norm() for x, dx in zip(doubles[:2], expected[2:4], strict=True))
        error = (actual[5].double() - expected[5]).norm() / size
        assert error <= BUDGET[q.dtype], f"ddecay: {error:.2e} of its terms"
        actual[5] = expected[5]
    names = [n for n in NAMES if (n != "ddecay" or decay is not None) and (n != "dstate" or state is not None)]
    assert_close(actual, expected, q.dtype, names)
    assert actual[0].dtype == actual[2].dtype == q.dtype
    assert actual[1].dtype == torch.float32
    return actual


def with_size_of_terms(actual, expected, doubles, grads, options):
    """The gradient of a head's decay is a sum over all steps, which nearly cancels: errors count beside its terms."""
    q, k, v, decay, state = doubles
    each_step = decay.expand(q.shape[0], q.shape[1] // options["block"], -1)
    terms = run(reference, (q, k, v, each_step, state), [x.double() for x in grads], **options)[5]
    size = terms.abs().sum((0, 1))
    return (actual - expected + size), size
