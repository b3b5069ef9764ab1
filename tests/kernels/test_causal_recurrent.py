"""Causal linear attention, recurrent: the kernel for few tokens, states that go in and out or are updated in place."""

import pytest
import torch

from diffattn import config
from diffattn.kernels import causal_linear_attention
from diffattn.kernels.causal_linear_attention import LinearState
from tests.kernels.accuracy import at_odd_address
from tests.kernels.causal_oracle import DECAYS, assert_close, kernel, make_inputs, reference

gpu = pytest.mark.gpu


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=gpu)])
def test_recurrent_kernel(dtype, decay, device, triton_backend):
    for normalize, block, Hkv in ((True, 1, 2), (False, 3, 2), (True, 1, 4), (False, 1, 4)):
        inputs = make_inputs(
            device, dtype, B=2, N=6, H=4, Hkv=Hkv, D=20, E=12, block=block, decay=decay, normalize=normalize
        )
        options = dict(normalize=normalize, block=block)
        with torch.no_grad():
            o, state = kernel(*inputs, form="recurrent", **options)
            expected = reference(*(None if x is None else x.double() for x in inputs), **options)
        assert_close((o, state), expected, dtype, ("o", "state"))


@pytest.mark.parametrize("decay", [None, "token"])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_kept_recurrent_launch_serves_only_its_layout(normalize, decay, device, triton_backend):
    def check(q, k, v, g, state):
        with torch.no_grad():
            found = kernel(q, k, v, g, state, form="recurrent", normalize=normalize)
            inputs = (None if x is None else x.double() for x in (q, k, v, g, state))
            assert_close(found, reference(*inputs, normalize=normalize), q.dtype, ("o", "state"))

    def make(dtype):
        return make_inputs(device, dtype, B=2, N=2, H=4, Hkv=2, D=16, E=32, decay=decay, normalize=normalize)

    inputs = make(torch.float32)
    for _ in range(2):
        check(*inputs)
    check(*(None if x is None else at_odd_address(x) for x in inputs))
    check(*make(torch.float16))
    q, k, v, g, state = inputs
    check(q.transpose(1, 2).contiguous().transpose(1, 2), torch.cat((k, k), 3)[..., :16], v, g, state)
    if g is not None:
        check(q, k, v, torch.cat((g, g), 2)[:, :, :2], state)
        check(q, k, v, g[0, 0], state)
    check(q, k, v, g, None)
    check(*inputs)


@pytest.mark.parametrize(("D", "E"), [(16, 128), (32, 48), (64, 40), (128, 20), (256, 33)])
def test_columns_of_a_recurrent_state(D, E, device, triton_backend):
    inputs = make_inputs(device, torch.float32, N=2, H=2, D=D, E=E, decay="token", normalize=False)
    with torch.no_grad():
        found = kernel(*inputs, form="recurrent", normalize=False)
        expected = reference(*(x.double() for x in inputs), normalize=False)
    assert_close(found, expected, torch.float32, ("o", "state"))


@pytest.mark.parametrize("N", [3, 40])
def test_state_is_updated_in_place(N, device, triton_backend):
    """A LinearState and a tensor give the same; the tensor stays as it was."""
    q, k, v, g, given = make_inputs(device, torch.float32, B=2, N=N, H=2, Hkv=1, D=8, decay="token")
    state = LinearState(2, 1, 8, device=device)
    state.tensor.copy_(given)
    before, place = given.clone(), state.tensor.data_ptr()
    o, after = kernel(q, k, v, g, state)
    expected, expected_after = kernel(q, k, v, g, given)
    assert after is state
    assert state.tensor.data_ptr() == place
    assert torch.equal(o, expected)
    assert torch.equal(state.tensor, expected_after)
    assert torch.equal(given, before)
    # with gradients the state takes part as a constant
    state.tensor.copy_(given)
    o = causal_linear_attention(q.requires_grad_(), k, v, decay=g, state=state)
    assert_close((o, state.tensor), (expected.double(), expected_after.double()), torch.float32, ("o", "state"))
    assert not state.tensor.requires_grad
    o.sum().backward()
    assert q.grad.isfinite().all()


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("decay", DECAYS)
def test_piecewise_is_the_whole(decay, backend, device, monkeypatch):
    monkeypatch.setattr(config, "backend", backend)
    q, k, v, g, _ = make_inputs(device, torch.float32, B=2, N=33, H=1, D=8, decay=decay, strength=0.3)
    whole = causal_linear_attention(q, k, v, decay=g)
    for pieces in ([1] * 3 + [30], [3, 7, 1, 22]):
        state, outs, first = LinearState(2, 1, 8, device=device), [], 0
        for n in pieces:
            part = slice(first, first + n)
            piece = g if g is None or g.dim() == 1 else g[:, part]
            outs.append(causal_linear_attention(q[:, part], k[:, part], v[:, part], decay=piece, state=state))
            first += n
        error = (torch.cat(outs, 1) - whole).norm() / whole.norm()
        assert error <= 1e-5
