"""Bidirectional linear attention with decay: the oracle is the N x N form in float64."""

import pytest
import torch

from diffattn.kernels import bidirectional_linear_attention, linear_attention
from tests.kernels.causal_oracle import BUDGET, DECAYS, ENOUGH, make_inputs

gpu = pytest.mark.gpu

NAMES = ("o", "dq", "dk", "dv", "ddecay")


def dense(q, k, v, decay, feature_map, normalize, block, eps):
    """All pairs at once. Sums of g over steps are differences of prefix sums here, which float64 can afford."""
    if feature_map == "elu1":
        q, k = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
    B, N, H, D = q.shape
    group = H // k.shape[2]
    g = q.new_zeros(B, N // block, k.shape[2], D)
    if decay is not None:
        g = g + {1: lambda x: x[None, None, :, None], 3: lambda x: x[..., None], 4: lambda x: x}[decay.dim()](decay)
    k, v, g = (x.repeat_interleave(group, 2) for x in (k, v, g))
    up_to = g.cumsum(1).repeat_interleave(block, 1)
    before = (g.cumsum(1) - g).repeat_interleave(block, 1)
    step = torch.arange(N, device=q.device) // block
    later = (step[:, None] >= step[None, :])[None, :, :, None, None]
    spans = torch.where(later, up_to[:, :, None] - up_to[:, None], before[:, None] - before[:, :, None])
    weights = torch.einsum("bnhd,bmhd,bnmhd->bnmh", q, k, spans.exp())
    o = torch.einsum("bnmh,bmhe->bnhe", weights, v)
    return o / (weights.sum(2).unsqueeze(-1) + eps) if normalize else o


def run(f, inputs, grad, **options):
    inputs = [None if x is None else x.detach().requires_grad_() for x in inputs]
    o = f(*inputs, **options)
    return [o.detach(), *torch.autograd.grad(o, [x for x in inputs if x is not None], grad)]


def ours(q, k, v, decay, **options):
    return bidirectional_linear_attention(q, k, v, decay=decay, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=gpu)])
@pytest.mark.parametrize(("decay", "block"), [(None, 1), ("head", 1), ("token", 1), ("channel", 1), ("token", 5)])
def test_kernels(decay, block, dtype, device, triton_backend):
    if dtype == torch.float16 and (decay, block) != ("token", 1) and not torch.cuda.is_available():
        pytest.skip("slow in the interpreter")
    normalize = dtype == torch.float32
    options = dict(feature_map="elu1" if normalize else None, normalize=normalize, block=block, eps=1e-6)
    N = 18 if decay == "channel" else 20 if block > 1 else 70
    B = ENOUGH if dtype == torch.bfloat16 else 1
    *inputs, _ = make_inputs(device, dtype, B=B, N=N, H=2, Hkv=1, D=8, block=block, decay=decay, feature_map="elu1")
    grad = torch.randn(B, N, 2, 8, device=device, dtype=dtype)
    actual = run(ours, inputs, grad, **options)
    expected = run(dense, [None if x is None else x.double() for x in inputs], grad.double(), **options)
    for name, a, e in zip(NAMES, actual, expected, strict=False):
        error = (a.double() - e).norm() / e.norm()
        assert error <= BUDGET[dtype], f"{name}: relative error {error:.2e}"
    with torch.no_grad():
        o = ours(*inputs, **options)
    assert (o.double() - expected[0]).norm() / expected[0].norm() <= BUDGET[dtype]


@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize(
    ("decay", "strength"), [(None, 0), ("token", 0.01), ("token", 1.0), ("token", 300.0), ("head", 0.1)]
)
def test_states_of_tiles(decay, strength, segments, device, triton_backend, monkeypatch):
    """Many tiles, the last one not full, in one piece and in several; query heads share the states of their group."""
    from diffattn.kernels.causal_linear_attention import triton

    monkeypatch.setattr(triton, "_segments", lambda launch, heads, steps, *_: -(-steps // -(-steps // segments)))
    for feature_map, normalize in (("elu1", True), (None, False)):
        *inputs, _ = make_inputs(
            device, torch.float32, B=1, N=150, H=4, Hkv=2, D=12, E=20, decay=decay, strength=strength,
            feature_map=feature_map, normalize=normalize,
        )  # fmt: skip
        if strength > 100:
            # weights of 1 among such of 0
            inputs[3] = torch.where(torch.rand_like(inputs[3]) < 0.5, 0.0, inputs[3])
        options = dict(feature_map=feature_map, normalize=normalize, block=1, eps=1e-6)
        expected = dense(*(None if x is None else x.double() for x in inputs), **options)
        error = (ours(*inputs, **options).double() - expected).norm() / expected.norm()
        assert error <= BUDGET[torch.float32], f"relative error {error:.2e}"


def test_one_channel(device, triton_backend):
    """A decay a channel of heads of one feature is one a token."""
    *inputs, _ = make_inputs(device, torch.float32, N=20, H=2, Hkv=1, D=1, E=8, decay="channel", normalize=False)
    options = dict(feature_map="elu1", normalize=False, block=1, eps=1e-6)  # with one feature it would cancel
    grad = torch.randn(1, 20, 2, 8, device=device)
    actual = run(ours, inputs, grad, **options)
    expected = run(dense, [x.double() for x in inputs], grad.double(), **options)
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert a.shape == e.shape
        assert (a.double() - e).norm() <= BUDGET[torch.float32] * e.norm(), name


@pytest.mark.parametrize("decay", DECAYS)
def test_no_tokens(decay, any_backend, device):
    *inputs, _ = make_inputs(device, torch.float32, N=0, H=2, Hkv=1, D=8, decay=decay)
    inputs = [None if x is None else x.requires_grad_() for x in inputs]
    o = ours(*inputs)
    assert o.shape == (1, 0, 2, 8)
    o.sum().backward()
    assert all(x is None or x.grad is None or (x.grad == 0).all() for x in inputs)


def test_no_number_stays_one(device, triton_backend):
    """As in the equation: what depends on a decay that is no number is none."""
    *inputs, _ = make_inputs(device, torch.float32, N=70, H=1, D=8, decay="token")
    inputs[3][0, 20] = float("nan")
    o = ours(*inputs)
    assert o.isnan().all()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("decay", DECAYS)
def test_reference(decay, block, normalize):
    options = dict(feature_map="elu1", normalize=normalize, block=block, eps=1e-6)
    *inputs, _ = make_inputs(
        "cpu", torch.float64, B=2, N=12, H=2, Hkv=1, D=3, E=4, block=block, decay=decay, feature_map="elu1"
    )
    inputs = [None if x is None else x.double() for x in inputs]
    torch.testing.assert_close(ours(*inputs, **options), dense(*inputs, **options))


def test_without_decay_it_is_linear_attention():
    q, k, v = (torch.randn(2, 30, 2, 4, dtype=torch.float64) for _ in range(3))
    expected = linear_attention(q, k, v, feature_map="elu1")
    torch.testing.assert_close(bidirectional_linear_attention(q, k, v, feature_map="elu1"), expected)


def test_opcheck(device, triton_backend):
    *inputs, _ = make_inputs(device, torch.float16, N=4, H=2, Hkv=1, D=8, decay="token")
    options = (None, True, 1e-6, 1)
    with_grad = [x.requires_grad_() for x in inputs]
    op = torch.ops.diffattn.bidirectional_linear_attention.default
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op, (*with_grad, *options, True), test_utils=checks)


def test_bad_input():
    q = torch.randn(1, 8, 2, 4)
    with pytest.raises(ValueError, match=r"decay: got 1\.0, expected 0 or less"):
        bidirectional_linear_attention(q, q, q, decay=torch.ones(2))
    with pytest.raises(ValueError, match="block: got 3 tokens"):
        bidirectional_linear_attention(q, q, q, block=3)
