"""The state of causal linear attention; and what the function says of bad input."""

import math

import pytest
import torch

from diffattn.kernels import causal_linear_attention
from diffattn.kernels.causal_linear_attention import LinearState
from tests.kernels.causal_oracle import make_inputs


def test_state_object(device):
    state = LinearState(2, 3, 4, 5, device=device)
    assert state.tensor.shape == (2, 3, 24)
    assert state.tensor.dtype == torch.float32
    state.S[1, 2, 3, 4] = 7
    state.z[1, 2, 3] = 8
    assert state.tensor[1, 2, 19] == 7
    assert state.tensor[1, 2, 23] == 8
    copy, place = state.clone(), state.tensor.data_ptr()
    state.reset()
    assert not state.tensor.any()
    assert state.tensor.data_ptr() == place
    assert copy.tensor[1, 2, 19] == 7
    assert LinearState(2, 3, 4, normalize=False).z is None


class CountAllocations(torch.utils._python_dispatch.TorchDispatchMode):
    """Elements of the tensors that operators bring into being."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        made = f(*args, **kwargs or {})
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for x in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known:
                self.sizes.append(x.numel())
        return made


def test_a_frame_allocates_its_output_alone(device, triton_backend, monkeypatch):
    from diffattn.kernels.causal_linear_attention import triton

    made = []
    empty = torch.empty
    monkeypatch.setattr(triton.torch, "empty", lambda *a, **k: made.append(a) or empty(*a, **k))
    q, k, v, _, _ = make_inputs(device, torch.float32, B=2, N=1, H=2, D=8)
    decay, state = -torch.rand(2, device=device), LinearState(2, 2, 8, device=device)
    with torch.no_grad():
        causal_linear_attention(q, k, v, decay=decay, state=state)
        made.clear()
        with CountAllocations() as count:
            for _ in range(5):
                torch.ops.diffattn.causal_linear_attention_step(
                    q, k, v, decay, state.tensor, None, True, 1e-6, 1, True
                )
    assert len(made) == 5
    assert [math.prod(shape) for shape, *_ in made] == [q.numel()] * 5
    assert count.sizes == [q.numel()] * 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(feature_map="softmax"), "feature_map: got 'softmax'"),
        (dict(form="wavefront"), "form: got 'wavefront'"),
        (dict(eps=-1.0), "eps: got -1.0"),
        (dict(eps="small"), "eps: got str"),
        (dict(block=0), "block: got 0"),
        (dict(block=3), "expected a divisor of the 8 tokens"),
        (dict(decay=torch.tensor([-1.0, 0.5])), "decay: got 0.5, expected 0 or less"),
        (dict(decay=-torch.ones(3)), r"decay: got shape \(3,\)"),
        (dict(decay=-torch.ones(1, 8, 2), block=2), r"decay: got shape \(1, 8, 2\), expected one of"),
        (dict(decay=-1.0), "decay: got float"),
        (dict(decay=torch.tensor([-1, -1])), "decay: got torch.int64"),
        (dict(k=torch.randn(1, 7, 2, 4), v=torch.randn(1, 7, 2, 4)), "k: got 7 tokens, expected 8"),
        (dict(state=torch.zeros(3, 2, 20)), "state: made for a batch of 3, and q has a batch of 1"),
        (dict(state=torch.zeros(1, 2, 16)), r"state: got shape \(1, 2, 16\), expected \(1, 2, 20\)"),
        (dict(state=torch.zeros(1, 2, 20).half()), "state: got torch.float16"),
        (dict(state=torch.zeros(1, 2, 20, device="meta")), "state: on meta"),
        (dict(state=torch.zeros(1, 20, 2).transpose(1, 2)), "state: got strides"),
        (dict(state=LinearState(2, 2, 4)), "state: made for a batch of 2"),
        (dict(state=LinearState(1, 2, 5)), "state: made for D = 5"),
        (dict(state=LinearState(1, 2, 4, normalize=False)), "state: made with normalize=False"),
        (dict(state=[1]), "state: got list"),
    ],
)
def test_bad_input(change, message):
    q, k, v = (torch.randn(1, 8, 2, 4) for _ in range(3))
    with pytest.raises((TypeError, ValueError), match=message):
        causal_linear_attention(**(dict(q=q, k=k, v=v) | change))


def test_a_refused_call_leaves_the_state():
    q, k, v = (torch.randn(1, 8, 2, 4) for _ in range(3))
    state = LinearState(1, 2, 4)
    causal_linear_attention(q, k, v, state=state)
    before = state.tensor.clone()
    with pytest.raises(ValueError, match="decay"):
        causal_linear_attention(q, k, v, state=state, decay=torch.tensor([0.1, 0.0]))
    assert torch.equal(state.tensor, before)
