"""GLA, RWKV-6, RWKV-7 and the gated delta rule: against fla-core's naive references, its kernels, and themselves."""

import importlib.util
import warnings

import pytest
import torch

import diffattn
from diffattn import CausalLinearAttention, config
from diffattn.cores import RWKV6, RWKV7, GatedDeltaRule, GatedLinearAttention, LayerInfo, Rotary
from diffattn.streaming import streaming

CORES = [GatedLinearAttention, RWKV6, RWKV7, GatedDeltaRule]
gpu = pytest.mark.gpu


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def qkv(N=20, D=8, **where):
    return torch.randn(3, 2, N, 3, D, **where).unbind()


def naive(core, x, scale):
    """fla-core's references, some with heads before tokens, some with a scale of D^-0.5 alone."""
    heads_first = {n: t.transpose(1, 2) if t.dim() > 2 else t for n, t in x.items()}
    if isinstance(core, GatedLinearAttention):
        from fla.ops.gla.naive import naive_recurrent_gla

        return naive_recurrent_gla(x["q"], x["k"], x["v"], x["g"], output_final_state=True)
    if isinstance(core, RWKV6):
        from fla.ops.rwkv6.recurrent_naive import naive_recurrent_rwkv6

        r, k, v, w, u = (heads_first[n] for n in "rkvwu")
        o, S = naive_recurrent_rwkv6(r, k, v, w, u, output_final_state=True)
        return o.transpose(1, 2), S
    if isinstance(core, RWKV7):
        from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence

        r, k, v, a, b, w = (heads_first[n] for n in "rkvabw")
        o, S = dplr_recurrence(r, k, v, a, b, w)
        return o.transpose(1, 2), S
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule

    return naive_recurrent_gated_delta_rule(**x, output_final_state=True)


@pytest.mark.parametrize("cls", CORES)
def test_recurrence_is_the_reference_of_fla(cls):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pytest.importorskip("fla.ops")
        except (ImportError, RuntimeError) as error:
            pytest.skip(f"fla-core does not import here: {error}")
    core = cls(8)
    if cls is RWKV6:
        torch.nn.init.normal_(core.gates["bonus"].value)
    with torch.no_grad():
        x = core.arguments(*qkv())
        o, S = core.recurrence(x, 8**-0.5, None)
        expected, expected_S = naive(core, x, 8**-0.5)
    torch.testing.assert_close(o, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(S, expected_S, rtol=1e-5, atol=1e-5)


def test_gla_is_causal_linear_attention():
    core = GatedLinearAttention(8).double()
    q, k, v = (x.double() for x in qkv())
    gate = torch.nn.Sequential(core.gates["decay"], torch.nn.LogSigmoid()).double()

    class Slow(torch.nn.Module):
        def forward(self, k):
            return gate(k) / 16

    expected = CausalLinearAttention(None, normalize=False, decay=Slow())(q, k, v)
    torch.testing.assert_close(core(q, k, v), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cut", [(1,) * 7, (3, 3, 1), (7,), (1, 3, 2, 1)])
@pytest.mark.parametrize("cls", CORES)
def test_frame_by_frame_is_the_whole(cls, cut):
    core = cls(8).eval()
    q, k, v = qkv(N=7)
    angles = torch.rand(7, 4)
    rotate = (Rotary(angles.cos(), angles.sin()),) * 2
    with torch.no_grad(), streaming(core, None) as stream:
        whole = core(q, k, v, rotate=rotate)
        outs, first = [], 0
        for n in cut:
            part = slice(first, first + n)
            piece = (Rotary(angles[part].cos(), angles[part].sin()),) * 2
            outs.append(stream(q[:, part], k[:, part], v[:, part], rotate=piece))
            first += n
    out = torch.cat(outs, 1)
    assert (out - whole).norm() <= 1e-5 * whole.norm()


@pytest.mark.parametrize("cls", CORES)
def test_gradients_reach_the_gates(cls):
    core = cls(8)
    q, k, v = qkv(N=5)
    core(q, k, v).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in core.gates.parameters())


def test_patch_makes_the_gates():
    from tests.models.video_stream import VIDEO_STREAM

    model = next(m for m in VIDEO_STREAM if m.cls == "SanaVideoTransformer3DModel").model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        handle = diffattn.patch(model, RWKV7(16), layers="*attn1")
    processors = list(handle.installed.values())
    assert processors[0].core.gates["decay"].weight is not processors[1].core.gates["decay"].weight
    core = RWKV7()
    core.prepare(LayerInfo(heads=2, kv_heads=2, head_dim=16))
    assert core.gates["decay"].weight.shape == (16, 16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c, q, k, v: c(q, k, v, mask=torch.ones(1)), "mask: got shape"),
        (lambda c, q, k, v: c(q, k[:, :, :1], v[:, :, :1]), "expected the tokens and heads of q"),
        (lambda c, q, k, v: c(*(x[..., :4] for x in (q, k, v))), "head_dim: made for 8, expected 4"),
        (lambda c, q, k, v: c(q, k, v, state=c.new_state(1, 3, 8)), "state: got .1, 3, 8, 8."),
        (lambda c, q, k, v: c(q, k, v, state=RWKV7(8).new_state(2, 3, 8)), "belongs to another layer"),
        (lambda c, q, k, v: c.check(4, 2), "got 4 heads and 2 key/value heads"),
        (lambda c, q, k, v: RWKV7()(q, k, v), "head_dim: made for None"),
        (lambda c, q, k, v: RWKV7(0), "head_dim: got 0"),
        (lambda c, q, k, v: c.prepare(LayerInfo(heads=2, kv_heads=2)), "needs the head dim"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(RWKV7(8), *qkv(N=3))


def test_triton_on_a_cpu_is_refused(triton_backend):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match="fla-core's kernels need CUDA"):
        RWKV7(8)(*qkv(N=3))


@gpu
@pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="needs fla-core")
@pytest.mark.parametrize("N", [1, 40, 300])
@pytest.mark.parametrize("cls", CORES)
def test_kernels_of_fla(cls, N, device, monkeypatch):
    core = cls(64).to(device)
    q, k, v = (x.bfloat16() for x in qkv(N, 64, device=device))
    core = core.bfloat16()
    with torch.no_grad():
        out = core(q, k, v)
        monkeypatch.setattr(config, "backend", "torch")
        expected = core(q, k, v)
    assert (out.float() - expected.float()).norm() <= 1e-2 * expected.float().norm()
