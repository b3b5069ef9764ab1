"""Causal linear attention: its forms, equal to each other and to the equation.

The kernel for few tokens, and states that are updated in place, are in test_causal_recurrent.py."""

import importlib
import math

import pytest
import torch

from diffattn.kernels import causal_linear_attention, linear_attention
from tests.kernels.causal_oracle import (
    DECAYS,
    DTYPES,
    ENOUGH,
    assert_close,
    check,
    kernel,
    make_inputs,
    reference,
    run,
)

on_gpu = torch.cuda.is_available()


# The reference, against code that is not ours and against itself


def written_out(q, k, v, decay, state, feature_map, normalize, block, eps):
    """Pair by pair, in plain loops: the weights of the equation, one at a time."""
    B, N, H, D = q.shape
    kv_heads, E = v.shape[2:]
    if feature_map is not None:
        phi = {"relu": torch.relu, "elu1": lambda x: torch.nn.functional.elu(x) + 1}[feature_map]
        q, k = phi(q), phi(k)
    g = torch.zeros(B, N // block, kv_heads, D, dtype=q.dtype)
    if decay is not None:
        g = g + {1: lambda x: x[None, None, :, None], 3: lambda x: x[..., None], 4: lambda x: x}[decay.dim()](decay)
    o = q.new_zeros(B, N, H, E)
    for b in range(B):
        for h in range(H):
            j = h // (H // kv_heads)
            S, z = state[b, j, : D * E].view(D, E), state[b, j, D * E :]
            for n in range(N):
                t = n // block
                seen = g[b, : t + 1, j].sum(0).exp()
                numerator = (q[b, n, h] * seen) @ S
                denominator = (q[b, n, h] * seen) @ z if normalize else 1.0
                for m in range((t + 1) * block):
                    weight = (q[b, n, h] * k[b, m, j] * g[b, m // block + 1 : t + 1, j].sum(0).exp()).sum()
                    numerator = numerator + weight * v[b, m, j]
                    denominator = denominator + weight if normalize else denominator
                o[b, n, h] = numerator / (denominator + eps) if normalize else numerator
    return o


@pytest.mark.parametrize("form", ["recurrent", "parallel", "chunkwise"])
@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("decay", DECAYS)
def test_reference_is_the_equation(decay, block, form):
    for normalize, feature_map in ((True, "elu1"), (False, None)):
        options = dict(feature_map=feature_map, normalize=normalize, block=block, eps=1e-3)
        inputs = make_inputs(
            "cpu", torch.float64, N=6, H=2, Hkv=1, D=3, E=2, block=block, decay=decay, normalize=normalize
        )
        inputs = [None if x is None else x.double() for x in inputs]
        out, _ = reference(*inputs, form=form, **options)
        torch.testing.assert_close(out, written_out(*inputs, **options))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("block", [1, 5])
@pytest.mark.parametrize("decay", DECAYS)
def test_forms_of_the_reference_are_equal(decay, block, normalize):
    inputs = make_inputs(
        "cpu", torch.float64, B=2, N=150, H=4, Hkv=2, D=5, E=3, block=block, decay=decay, normalize=normalize
    )
    inputs = [None if x is None else x.double() for x in inputs]
    grads = torch.randn(2, 150, 4, 3).double(), torch.randn_like(inputs[4])
    expected = run(reference, inputs, grads, block=block, normalize=normalize)
    for form in ("parallel", "chunkwise"):
        actual = run(reference, inputs, grads, block=block, normalize=normalize, form=form)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


def test_reference_is_retention():
    """RetNet, eq. 5: (Q K^T * D) V with D_nm = gamma^(n - m)."""
    q, k, v = (torch.randn(1, 9, 2, 4, dtype=torch.float64) for _ in range(3))
    gamma = torch.tensor([0.9, 0.5], dtype=torch.float64)
    n = torch.arange(9)
    mask = (gamma[:, None, None] ** (n[:, None] - n[None, :])).tril()
    expected = torch.einsum("bnhd,bmhd,hnm,bmhe->bnhe", q, k, mask, v)
    for form in ("parallel", "chunkwise", "recurrent"):
        actual = causal_linear_attention(q, k, v, normalize=False, decay=gamma.log(), form=form)
        torch.testing.assert_close(actual, expected)


def test_one_frame_of_all_tokens_sees_everything():
    q, k, v = (torch.randn(2, 12, 2, 4, dtype=torch.float64) for _ in range(3))
    expected = linear_attention(q, k, v, feature_map="relu")
    torch.testing.assert_close(causal_linear_attention(q, k, v, feature_map="relu", block=12), expected)


def test_gradients_of_the_reference():
    for decay in ("token", "channel"):
        inputs = make_inputs("cpu", torch.float64, N=4, H=2, Hkv=1, D=2, decay=decay)
        inputs = [x.double().requires_grad_() for x in inputs]
        assert torch.autograd.gradcheck(lambda *x: reference(*x, form="parallel", eps=1e-3), inputs)


# The kernels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [1, 10])
@pytest.mark.parametrize("decay", DECAYS)
def test_decays(decay, block, dtype, device, triton_backend):
    if dtype == torch.float16 and not on_gpu and (block > 1 or decay == "channel") and decay != "token":
        pytest.skip("slow in the interpreter")
    feature_map, normalize = ("elu1", True) if dtype == torch.float32 else (None, False)
    N = 20 if decay == "channel" or block > 1 else 40
    B = ENOUGH if dtype == torch.bfloat16 else 2 if decay == "token" else 1
    inputs = make_inputs(
        device, dtype, B=B, N=N, H=2, Hkv=2 if decay == "token" else 1, D=12, E=20,
        block=block, decay=decay, normalize=normalize, feature_map=feature_map,
    )  # fmt: skip
    check(*inputs, feature_map=feature_map, normalize=normalize, block=block)


@pytest.mark.parametrize(("decay", "block"), [(None, 1), ("token", 1), ("channel", 1), ("token", 7)])
def test_segments(decay, block, device, triton_backend, monkeypatch):
    """Cut among programs, the same; with heads of their own a state need not be passed on by the scan alone."""
    from diffattn.kernels.causal_linear_attention import triton

    monkeypatch.setattr(triton, "_segments", lambda launch, heads, steps, *_: -(-steps // -(-steps // 3)))
    H, Hkv = (2, 1) if decay == "token" else (1, 1)
    N = 28 if block == 7 else 70 if decay != "channel" else 40
    inputs = make_inputs(device, torch.float32, N=N, H=H, Hkv=Hkv, D=8, block=block, decay=decay, feature_map="relu")
    check(*inputs, feature_map="relu", block=block)


@pytest.mark.parametrize(
    ("heads", "tiles", "D", "best"), [(20, 1024, 64, 13), (160, 256, 64, 1), (128, 32, 64, 1), (128, 64, 128, 1)]
)
def test_number_of_segments(heads, tiles, D, best, monkeypatch):
    """What was fastest on an H100, bfloat16."""
    from diffattn.kernels.causal_linear_attention import triton

    monkeypatch.setattr(triton, "multiprocessors", lambda device: 132)
    assert triton._segments.__wrapped__(triton.CONFIGS["walk"][D], heads, tiles, torch.device("cuda")) == best


@pytest.mark.parametrize(("D", "E"), [(4, 4), (5, 40), (72, 20), (128, 130), (256, 16), (16, 256)])
@pytest.mark.parametrize("decay", [None, "token", "channel"])
def test_head_dims(D, E, decay, device, triton_backend):
    if decay == "channel" and not on_gpu and (D, E) not in ((5, 40), (72, 20)):
        pytest.skip("slow in the interpreter")
    inputs = make_inputs(device, torch.float32, N=20, H=1, D=D, E=E, decay=decay)
    check(*inputs)


@pytest.mark.parametrize("N", [1, 2, 15, 64, 65])
def test_lengths(N, device, triton_backend):
    check(*make_inputs(device, torch.float16, N=N, H=1, D=8, decay="token"))


@pytest.mark.parametrize("decay", ["token", "channel"])
@pytest.mark.parametrize("strength", [1e-3, 20.0, 1e4])
def test_weak_and_strong_decay(strength, decay, device, triton_backend):
    """Decays of a hundred orders of magnitude beside weak ones: no overflow, and the weak ones stay exact."""
    N = 20 if decay == "channel" else 40
    inputs = make_inputs(device, torch.float32, N=N, H=1, D=8, decay=decay, strength=strength)
    inputs[3][:, ::3] *= 1e-4
    check(*inputs)


@pytest.mark.parametrize("decay", ["token", "channel"])
def test_everything_forgotten(decay, device, triton_backend):
    """exp(-inf) = 0: what comes before a reset changes nothing after it."""
    q, k, v, g, state = make_inputs(device, torch.float32, N=30, H=1, D=8, decay=decay)
    g[:, 11] = -math.inf
    whole = causal_linear_attention(q, k, v, decay=g, state=state)
    later = causal_linear_attention(q[:, 11:], k[:, 11:], v[:, 11:], decay=g[:, 11:])
    assert whole.isfinite().all()
    torch.testing.assert_close(whole[:, 11:], later, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_takes_plain_torch(device, triton_backend, monkeypatch):
    """Compiled for Hopper, the gradient of a decay of frames needs 272 KiB there beyond 128 float16 features."""
    module = importlib.import_module("diffattn.kernels.causal_linear_attention")

    def same(inputs, block, requires_grad=False):
        if requires_grad:
            inputs[3].requires_grad_()
        o, expected = (f(*inputs, feature_map="relu", block=block)[0] for f in (kernel, plain))
        return torch.equal(o, expected)

    def plain(*inputs, **options):
        return reference(*inputs, form="chunkwise", **options)

    shape = dict(N=40, H=1, D=136, feature_map="relu")
    frames = list(make_inputs(device, torch.float16, block=10, decay="token", **shape))
    channels = list(make_inputs(device, torch.float16, decay="channel", **shape))
    assert not same(frames, 10) and not same(channels, 1)
    with monkeypatch.context() as patch:
        patch.setattr(module, "small_shared_memory", lambda device: True)
        assert same(frames, 10) and same(channels, 1)
    assert same(frames, 10, requires_grad=True)
    with torch.no_grad():
        assert not same(frames, 10)


@pytest.mark.parametrize("decay", ["token", "channel"])
def test_strides(decay, device, triton_backend):
    """Slices, transposes and expanded gradients, as they come from projections."""
    qkv = torch.randn(1, 20, 3, 2, 24, device=device).abs()
    q, k, v = (x[..., 4:20] for x in qkv.unbind(2))
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    g = -torch.rand(1, 2, 20, *([16] if decay == "channel" else []), device=device).transpose(1, 2)
    inputs = [x.detach().requires_grad_() for x in (q, k, v, g)]
    o = causal_linear_attention(*inputs[:3], decay=inputs[3])
    actual = [o, *torch.autograd.grad(o.sum(), inputs)]
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    o, _ = reference(*doubles, None)
    expected = [o, *torch.autograd.grad(o.sum(), doubles)]
    # the gradient of a sum of weighted means, dq and dk are small differences: held to the size of dv
    torch.testing.assert_close(actual, [x.float() for x in expected], rtol=1e-4, atol=1e-4)


def test_one_channel(device, triton_backend):
    """A decay a channel of heads of one feature is one a token."""
    options = dict(feature_map="elu1", normalize=False, block=1)  # with one feature it would cancel
    inputs = make_inputs(device, torch.float32, B=2, N=20, H=2, Hkv=1, D=1, E=8, decay="channel", normalize=False)
    grads = [torch.randn(2, 20, 2, 8, device=device), torch.randn(2, 1, 8, device=device)]
    actual = run(kernel, inputs, grads, **options)
    expected = run(reference, [x.double() for x in inputs], [x.double() for x in grads], **options)
    assert actual[5].shape == (2, 20, 1, 1)
    assert_close(actual, expected, torch.float32)


@pytest.mark.parametrize(("B", "N"), [(2, 0), (0, 3)])
@pytest.mark.parametrize("decay", DECAYS)
def test_no_tokens(decay, B, N, any_backend, device):
    inputs = make_inputs(device, torch.float32, B=B, N=N, Hkv=1, decay=decay)
    inputs = [None if x is None else x.requires_grad_() for x in inputs]
    o, state = kernel(*inputs)
    assert o.shape == (B, N, 2, 16)
    assert torch.equal(state, inputs[4])
    (o.sum() + state.sum()).backward()
    for x in inputs[:4]:
        assert x is None or x.grad is None or (x.grad.shape == x.shape and (x.grad == 0).all())
    assert torch.equal(inputs[4].grad, torch.ones_like(state))


def test_grids_have_one_long_axis(device, triton_backend, monkeypatch):
    """CUDA takes 65535 programs along the other two: samples times heads may be more."""
    module = importlib.import_module("diffattn.kernels.causal_linear_attention.triton")
    grids = []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **constants: None

    for name in vars(module):
        if name.endswith("_kernel"):
            monkeypatch.setattr(module, name, Recorder())
    inputs = make_inputs(device, torch.float32, B=70000, N=1, H=1, D=1, decay="token")
    run(kernel, inputs, [torch.zeros(70000, 1, 1, 1, device=device), torch.zeros(70000, 1, 2, device=device)])
    assert len(grids) >= 6
    for grid in grids:
        assert all(n <= 65535 for n in grid[1:])


def test_same_bits(device, triton_backend):
    inputs = make_inputs(device, torch.float16, N=40, H=2, D=8, decay="token")
    grads = torch.randn(1, 40, 2, 8, device=device).half(), torch.randn(1, 2, 72, device=device)
    first, second = (run(kernel, inputs, grads) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("decay", "normalize"), [(None, False), ("token", True)])
def test_opcheck(decay, normalize, device, triton_backend):
    q, k, v, g, state = make_inputs(device, torch.float16, N=4, H=2, Hkv=1, D=8, decay=decay, normalize=normalize)
    options = (None, normalize, 1e-6, 1)
    inputs = [None if x is None else x.requires_grad_() for x in (q, k, v, g, state)]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    if not normalize:
        checks = checks[:3]
    op = torch.ops.diffattn.causal_linear_attention.default
    torch.library.opcheck(op, (*inputs, *options), test_utils=checks)
    q, k, v, g, state = (None if x is None else x.detach() for x in inputs)
    step = torch.ops.diffattn.causal_linear_attention_step.default
    torch.library.opcheck(step, (q, k, v, g, state, *options, True))
    torch.library.opcheck(torch.ops.diffattn.causal_linear_attention_inference.default, (q, k, v, g, *options, False))
    outputs = torch.ops.diffattn.causal_linear_attention(q, k, v, g, state, *options)
    out, final, residual, inverse = outputs
    torch.library.opcheck(
        torch.ops.diffattn.causal_linear_attention_backward.default,
        (out, final, q, k, v, g, state, final, residual, inverse, out, *options, g is not None),
    )


def test_compiles_to_one_graph(device, triton_backend):
    f = torch.compile(kernel, backend="aot_eager", fullgraph=True, dynamic=True)
    for N in (20, 33):
        inputs = make_inputs(device, torch.float32, N=N, H=1, D=8, decay="token")
        with torch.no_grad():
            assert all(torch.equal(a, b) for a, b in zip(f(*inputs), kernel(*inputs), strict=True))
