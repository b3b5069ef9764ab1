"""CausalLinearAttention: the core of layers that look back, and the state that a layer keeps."""

import copy

import pytest
import torch
from torch import nn

from diffattn.cores import CausalLinearAttention, LinearAttention, Rotary, apply_rotary


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def qkv(N=24, H=4, Hkv=2, D=8, dtype=torch.float32):
    return (torch.randn(2, N, h, D, dtype=dtype) for h in (H, Hkv, Hkv))


def rotation(N, D, first=0):
    angles = torch.arange(first, first + N)[:, None] * 0.3 ** torch.arange(D // 2)
    return Rotary(angles.cos(), angles.sin())


class Gate(nn.Module):
    """log sigmoid of a projection of k: a decay a step and head."""

    def __init__(self, D, block):
        super().__init__()
        self.linear, self.block = nn.Linear(D, 1), block

    def forward(self, k):
        g = nn.functional.logsigmoid(self.linear(k)).squeeze(-1)
        return g.unflatten(1, (-1, self.block)).mean(2)


CORES = [
    lambda block: CausalLinearAttention("relu", block=block),
    lambda block: CausalLinearAttention("elu1", decay="retention", block=block),
    lambda block: CausalLinearAttention(None, normalize=False, decay=[-0.1, -2.0], block=block),
    lambda block: CausalLinearAttention(nn.Sequential(nn.Linear(8, 6), nn.Softplus()), block=block),
    lambda block: CausalLinearAttention("elu1", decay=Gate(8, block), block=block),
]


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("make", CORES)
def test_frame_by_frame_is_the_whole(make, block, rotated):
    core = make(block).eval()
    features = 6 if isinstance(core.feature_map, nn.Module) else 8
    q, k, v = qkv()
    rotate = (rotation(24, features),) * 2 if rotated else None
    with torch.no_grad():
        whole = core(q, k, v, rotate=rotate)
        for frames in ((1,) * 6, (3, 1, 2), (2, 4)):
            state, outs, first = core.new_state(2, 2, features, 8, rotated=rotated), [], 0
            places = [x.data_ptr() for x in state.tensors()]
            for n in frames:
                part = slice(first, first + 4 * n)
                rotate = (rotation(4 * n, features, first),) * 2 if rotated else None
                outs.append(core(q[:, part], k[:, part], v[:, part], rotate=rotate, state=state))
                first += 4 * n
            assert (torch.cat(outs, 1) - whole).norm() <= 1e-5 * whole.norm()
            assert places == [x.data_ptr() for x in state.tensors()]


@pytest.mark.parametrize("rotated", [False, True])
def test_the_last_token_sees_what_linear_attention_sees(rotated):
    q, k, v = qkv(dtype=torch.float64)
    rotate = (rotation(24, 8),) * 2 if rotated else None
    causal = CausalLinearAttention("relu")(q, k, v, rotate=rotate)
    whole = LinearAttention("relu")(q, k, v, rotate=rotate)
    torch.testing.assert_close(causal[:, -1], whole[:, -1])
    one_frame = CausalLinearAttention("relu", block=24)(q, k, v, rotate=rotate)
    torch.testing.assert_close(one_frame, whole)


def test_half_precision_sums_do_not_overflow():
    """The rotated numerator is no mean yet: 3000 values of 100 are more than float16 holds."""
    q, k, v = (100 * torch.rand(1, 3000, 1, 8) for _ in range(3))
    rotate = (rotation(3000, 8),) * 2
    exact = CausalLinearAttention("relu")(q.half().double(), k.half().double(), v.half().double(), rotate=rotate)
    out = CausalLinearAttention("relu")(q.half(), k.half(), v.half(), rotate=rotate)
    assert out.dtype == torch.float16
    assert (out.double() - exact).norm() <= 1e-3 * exact.norm()


def test_retention_keeps_what_its_paper_says():
    """gamma_h = 1 - 2^(-5 - h), and D^-0.5 for the scale, without a normalizer."""
    q, k, v = qkv(N=5, H=2, dtype=torch.float64)
    out = CausalLinearAttention(None, normalize=False, decay="retention")(q, k, v)
    gamma = 1 - 2.0 ** (-5 - torch.arange(2, dtype=torch.float64))
    n = torch.arange(5)
    weights = (gamma[:, None, None] ** (n[:, None] - n[None, :])).tril()
    expected = torch.einsum("bnhd,bmhd,hnm,bmhe->bnhe", q, k, weights, v) * 8**-0.5
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-7)


def test_masked_keys_are_absent():
    q, k, v = qkv(N=6, dtype=torch.float64)
    mask = torch.tensor([True, True, False, True, True, True])[None, None, None].expand(2, 1, 1, 6)
    kept = [0, 1, 3, 4, 5]
    core = CausalLinearAttention("elu1")
    expected = core(q[:, kept], k[:, kept], v[:, kept])
    torch.testing.assert_close(core(q, k, v, mask=mask)[:, kept], expected)
    with pytest.raises(ValueError, match="mask: got shape"):
        core(q, k, v, mask=torch.ones(2, 1, 6, 6, dtype=torch.bool))


def test_scale_and_rotation_of_padding_are_honoured():
    q, k, v = qkv(N=6, dtype=torch.float64)
    core = CausalLinearAttention("elu1")
    torch.testing.assert_close(core(q, k, v, scale=0.5), core(q * 0.5 * 8**0.5, k, v))
    rotate = (rotation(6, 4), rotation(6, 4))
    with pytest.raises(ValueError, match="one rotation for q and k"):
        core(q, k, v, rotate=rotate)
    core = CausalLinearAttention(None, normalize=False)
    expected = core(apply_rotary(q, rotate[0]), apply_rotary(k, rotate[0]), v)
    torch.testing.assert_close(core(q, k, v, rotate=(rotate[0], rotate[0])), expected)


def test_copies_have_their_own_state_and_tables():
    core = CausalLinearAttention(decay="retention")
    q, k, v = qkv(N=2)
    core(q, k, v)
    other = copy.deepcopy(core)
    assert repr(other) == repr(core)
    assert other._head_decays is not core._head_decays
    state = core.new_state(2, 2, 8)
    with pytest.raises(ValueError, match="belongs to another layer"):
        other(q, k, v, state=state)


@pytest.mark.usefixtures("triton_backend")
def test_decays_made_under_inference_mode_serve_training(device):
    core = CausalLinearAttention(decay="retention")
    q, k, v = (x.to(device).requires_grad_() for x in qkv())
    with torch.inference_mode():
        core(q, k, v)
    core(q, k, v).sum().backward()
    assert q.grad.isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda core, q, k, v, s: core(q, k[:, :3], v[:, :3]), "k: got 3 tokens for 4 of q"),
        (lambda core, q, k, v, s: core(q[:1], k[:1], v[:1], state=s), "state: made for a batch of 2"),
        (lambda core, q, k, v, s: core(q, k, v, state=s, rotate=(rotation(4, 8),) * 2), "made for calls without"),
        (lambda core, q, k, v, s: core(q.double(), k.double(), v.double(), state=s), "q is float64"),
        (lambda core, q, k, v, s: core(*(x.to("meta") for x in (q, k, v)), state=s), "expected meta as q"),
        (lambda core, q, k, v, s: core(q, k, v, state=s.numerator), "state: got LinearState"),
        (lambda core, q, k, v, s: core(q[:, :3], k[:, :3], v[:, :3], state=s), "block: got 2 tokens a frame"),
    ],
)
def test_bad_calls_leave_the_state(call, message):
    core = CausalLinearAttention("relu", block=2)
    q, k, v = qkv(N=4)
    state = core.new_state(2, 2, 8)
    core(q, k, v, state=state)
    before = [x.clone() for x in state.tensors()]
    with pytest.raises((TypeError, ValueError), match=message):
        call(core, q, k, v, state)
    assert all(torch.equal(a, b) for a, b in zip(before, state.tensors(), strict=True))


def test_a_growing_gate_is_refused():
    class Growing(nn.Module):
        def forward(self, k):
            return k.new_full(k.shape[:3], 0.1)

    core = CausalLinearAttention(decay=Growing())
    q, k, v = qkv(N=4)
    state = core.new_state(2, 2, 8)
    with pytest.raises(ValueError, match="decay: got"):
        core(q, k, v, state=state)
    assert not any(x.any() for x in state.tensors())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(feature_map="softmax"), "feature_map: got 'softmax'"),
        (dict(decay="fast"), "decay: got 'fast'"),
        (dict(decay=-0.1), "decay: got -0.1, expected 'retention', a number a head"),
        (dict(eps=float("nan")), "eps: got nan, expected 0 or more"),
        (dict(eps=-1.0), "eps: got -1.0, expected 0 or more"),
        (dict(decay=[0.5, -1]), r"decay: got \[0.5, -1.0\]"),
        (dict(block=0), "block: got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        CausalLinearAttention(**options)


def test_a_number_for_each_head():
    with pytest.raises(ValueError, match="decay: got 3 numbers, expected 2"):
        CausalLinearAttention(decay=[-1, -1, -1])(*qkv(N=4))
