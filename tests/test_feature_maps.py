"""Learned maps against their equations, written out in float64, and how near they start to softmax attention."""

import pytest
import torch
import torch.nn.functional as F

import diffattn
from diffattn import LinearAttention, SoftmaxAttention
from diffattn.cores import LayerInfo, Rotary, apply_rotary
from diffattn.cores.feature_maps import HedgehogMap, InputMLP
from tests.models.base import Rand
from tests.models.unets import build_unet, run_unet

pytestmark = pytest.mark.filterwarnings("ignore:diffattn. .* another mechanism")

B, N, H, HKV, D = 2, 9, 4, 2, 8
LAYER = LayerInfo(H, HKV, D)


@pytest.fixture
def rand():
    draw = Rand(torch.Generator().manual_seed(0))
    return lambda *shape: draw(*shape).double()


def hedgehog(x, weight):
    """(Zhang et al. 2024): exponentials of W x and - W x, here divided by their sum."""
    wx = torch.stack([x[:, :, h] @ (weight[h] * D**0.25) for h in range(x.shape[2])], dim=2)
    e = torch.cat((wx.exp(), (-wx).exp()), dim=-1)
    return e / e.sum(-1, keepdim=True)


def attend(q, k, v):
    """Linear attention over all pairs."""
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
    weights = torch.einsum("bnhd,bmhd->bhnm", q, k)
    return torch.einsum("bhnm,bmhd->bnhd", weights / weights.sum(-1, keepdim=True), v)


@pytest.mark.parametrize("rotated", [False, True])
def test_hedgehog_is_its_equation(rand, rotated):
    core = LinearAttention("hedgehog")
    core.prepare(LAYER)
    core.double()
    for map in core.head_maps.values():
        map.weight.data += rand(*map.weight.shape) / 4
    q, k, v = rand(B, N, H, D), rand(B, N, HKV, D), rand(B, N, HKV, D)
    angle = rand(N, D // 2)
    rotary = Rotary(angle.cos(), angle.sin())
    rq, rk = (apply_rotary(t, rotary) for t in (q, k)) if rotated else (q, k)
    expected = attend(hedgehog(rq, core.head_maps["q"].weight), hedgehog(rk, core.head_maps["k"].weight), v)
    out = core(q, k, v, rotate=(rotary, rotary) if rotated else None)
    torch.testing.assert_close(out, expected)


def test_hedgehog_starts_with_the_first_terms_of_softmax_attention(rand):
    """1 + q.k D^-1/2 for small q and k, where elu + 1 has another slope."""
    core = LinearAttention("hedgehog")
    core.prepare(LAYER)
    core.double()
    q, k, v = rand(B, N, H, D) / 20, rand(B, N, HKV, D) / 20, rand(B, N, HKV, D)
    teacher = SoftmaxAttention()(q, k, v)
    mean = v.mean(1, keepdim=True).repeat_interleave(H // HKV, dim=2)
    far = (teacher - mean).norm()  # what is left when all weights are alike
    assert (core(q, k, v) - teacher).norm() < 0.01 * far
    assert (LinearAttention("elu1")(q, k, v) - teacher).norm() > 0.3 * far


def test_hedgehog_stays_finite_in_half_precision(rand):
    map = HedgehogMap(H, D).half()
    x = (rand(B, N, H, D) * 100).half()
    out = map(x)
    assert out.dtype == torch.float16 and out.isfinite().all() and (out >= 0).all()


@pytest.mark.parametrize("mid_dim", [None, 5, -1])
def test_input_mlp_is_linfusions(rand, mid_dim):
    map = InputMLP(D, mid_dim).double()
    x = rand(B, N, D)
    torch.testing.assert_close(map(x), 2 * x if mid_dim == -1 else x)  # as it starts
    for parameter in map.parameters():
        parameter.data = rand(*parameter.shape)
    if mid_dim == -1:
        return
    w1, b1, scale, shift, w2, b2 = map.parameters()
    hidden = x @ w1.T + b1
    hidden = (hidden - hidden.mean(-1, keepdim=True)) / (hidden.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    hidden = hidden * scale + shift
    expected = x + torch.where(hidden > 0, hidden, 0.01 * hidden) @ w2.T + b2
    torch.testing.assert_close(map(x), expected)


@pytest.mark.parametrize("core", ["linfusion", "hedgehog"])
def test_a_learned_map_learns(rand, core):
    """Every weight of it gets a gradient, in each of the layers on its own."""
    unet = build_unet().eval()
    handle = diffattn.patch(unet, core)
    for processor in handle.installed.values():  # LinFusion's first layer gets one once the second is no longer 0
        for parameter in processor.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    run_unet(unet, torch.Generator().manual_seed(1)).square().sum().backward()
    gradients = [p.grad for processor in handle.installed.values() for p in processor.parameters()]
    assert len(gradients) == len(handle.installed) * {"linfusion": 12, "hedgehog": 2}[core]
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)


def test_what_a_map_needs_is_said():
    with pytest.raises(ValueError, match=r"input_map: 'mlp' maps hidden states .* does not hand over"):
        LinearAttention.linfusion().prepare(LAYER)
    with pytest.raises(ValueError, match="'hedgehog' needs the head dim"):
        LinearAttention("hedgehog").prepare(LayerInfo(H, HKV))
    q = torch.zeros(B, N, H, D)
    with pytest.raises(RuntimeError, match=r"diffattn\.patch"):
        LinearAttention("hedgehog")(q, q, q)
    with pytest.raises(ValueError, match="cannot have its own 'q' here: this layer's processor hands over none"):
        LinearAttention().own(LAYER, ["q"])
    with pytest.raises(ValueError, match="learned map has weights for each"):
        diffattn.LinearAttnProcessor("hedgehog")


def test_patching_draws_no_random_numbers():
    unet = build_unet().eval()
    before = torch.random.get_rng_state()
    diffattn.patch(unet, "linfusion")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_model_without_the_seam_refuses_input_maps_and_stays_stock():
    from tests.models import BY_NAME

    joy = BY_NAME["JoyImageEditTransformer3DModel"]  # one module for all of q, k and v
    model = joy.model()
    with pytest.raises(ValueError, match=r"blocks.0.attn: input_map: 'mlp' maps hidden states"):
        diffattn.patch(model, "linfusion")
    assert not diffattn.status(model).installed
    assert F.mse_loss(joy.run(model), joy.run(joy.model())) == 0


def test_configurations_go_to_json_and_back():
    import json

    cores = [
        LinearAttention.linfusion(mid_dim=5),
        LinearAttention("hedgehog"),
        LinearAttention("elu1", input_map="mlp"),
    ]
    for core in cores:
        twin = LinearAttention(**json.loads(json.dumps(core.config())))
        assert repr(twin) == repr(core) and twin.formula(8, 8) == core.formula(8, 8)
    assert repr(cores[0]) == (
        "LinearAttention(feature_map='elu1', normalizer='mean', eps=0.0001, input_map='mlp', mid_dim=5)"
    )
    assert len({str(core.formula(8, 8)) for core in cores}) == 3


@pytest.mark.parametrize(
    "arguments, match",
    [
        (dict(input_map="mpl"), "input_map: got 'mpl', expected None or one of mlp"),
        (dict(mid_dim=4), "mid_dim: got 4 with input_map=None"),
        (dict(input_map="mlp", mid_dim=0), "mid_dim: got 0"),
    ],
)
def test_bad_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        LinearAttention(**arguments)


def test_hedgehog_serves_models_with_rotations_and_norms():
    from tests.models import BY_NAME

    for name in ("FluxTransformer2DModel", "SD3Transformer2DModel", "WanTransformer3DModel"):
        tiny = BY_NAME[name]
        model = tiny.model()
        stock = tiny.run(model)
        handle = diffattn.patch(model, "hedgehog")
        out = tiny.run(model)
        assert handle.installed and out.isfinite().all() and not torch.equal(out, stock)
        out.square().sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in next(iter(handle.installed.values())).parameters())
