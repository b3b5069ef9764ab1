"""Cores against their equations, written out over all (query, key) pairs in float64."""

import math

import pytest
import torch
from torch import nn

from diffattn import GroupedQueryAttention, LinearAttention, SoftmaxAttention
from diffattn.cores import Rotary, apply_rotary
from diffattn.kernels import gqa_attention

B, N, M, H, HKV, D = 2, 9, 7, 4, 2, 8


def qkv(n=N, m=M, kv_heads=HKV):
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, n, H, D), (B, m, kv_heads, D), (B, m, kv_heads, D)]
    return [torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes]


def scores(q, k):
    """q.k of every pair, (B, H, N, M)."""
    return torch.einsum("bnhd,bmhd->bhnm", q, k.repeat_interleave(H // k.shape[2], dim=2))


def weigh(weights, v):
    return torch.einsum("bhnm,bmhd->bnhd", weights, v.repeat_interleave(H // v.shape[2], dim=2))


def elu1(x):
    return torch.where(x > 0, x + 1, x.exp())


MAPS = {"relu": lambda x: x.clamp(min=0), "elu1": elu1}


def padding():
    mask = torch.ones(B, 1, 1, M, dtype=torch.bool)
    mask[1, ..., -3:] = False
    return mask


@pytest.mark.parametrize("core", [SoftmaxAttention(), GroupedQueryAttention()], ids=["softmax", "gqa"])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_softmax_cores(core, scale):
    q, k, v = qkv()
    mask = padding()
    s = scores(q, k) * (scale or D**-0.5)
    expected = weigh(s.masked_fill(~mask, -math.inf).softmax(-1), v)
    torch.testing.assert_close(core(q, k, v, mask=mask, scale=scale), expected)
    additive = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -1e4)
    torch.testing.assert_close(core(q, k, v, mask=additive, scale=scale), expected)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("mask", [None, "boolean", "additive"])
def test_linear_core_weighs_keys_by_the_mask(name, mask):
    q, k, v = qkv()
    weights = scores(MAPS[name](q), MAPS[name](k))
    given = padding() if mask else None
    if mask == "additive":
        given = torch.zeros(given.shape, dtype=torch.float64).masked_fill(~given, -1e4)
        given[..., 0] = 0.3
    if mask:
        weights = weights * (given if mask == "boolean" else given.exp())
    expected = weigh(weights / (weights.sum(-1, keepdim=True) + 1e-15), v)
    torch.testing.assert_close(LinearAttention(name)(q, k, v, mask=given), expected)


@pytest.mark.parametrize("mask", [None, "boolean", "additive"])
def test_efficient_attention_normalizes_over_unmasked_tokens(mask):
    q, k, v = qkv()
    given = padding() if mask else None
    bias = 0 if mask is None else torch.zeros(given.shape, dtype=torch.float64).masked_fill(~given, -math.inf)
    keys = k + (bias.permute(0, 3, 1, 2) if mask else 0)
    expected = weigh(scores(q.softmax(-1), keys.softmax(1)), v)
    given = bias if mask == "additive" else given
    torch.testing.assert_close(LinearAttention("softmax")(q, k, v, mask=given), expected)


def test_linear_core_takes_the_mean_as_linfusion_does():
    q, k, v = qkv()
    weights = scores(elu1(q), elu1(k)) / M
    expected = weigh(weights / (weights.sum(-1, keepdim=True) + 1e-2), v)
    out = LinearAttention("elu1", normalizer="mean", eps=1e-2)(q, k, v)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("features", [D, D // 2])
def test_linear_core_rotates_the_numerator_alone(interleaved, features):
    q, k, v = qkv(N, N)
    angle = torch.rand(N, features // 2, dtype=torch.float64) * 6
    rotary = Rotary(angle.cos(), angle.sin(), interleaved)
    q_map, k_map = q.relu(), k.relu()
    numerator = weigh(scores(apply_rotary(q_map, rotary), apply_rotary(k_map, rotary)), v)
    normalizer = scores(q_map, k_map).sum(-1).transpose(1, 2).unsqueeze(-1) + 1e-15
    out = LinearAttention("relu")(q, k, v, rotate=(rotary, rotary))
    torch.testing.assert_close(out, numerator / normalizer)


def test_rotary_equals_complex_multiplication():
    x = qkv()[0]
    angle = torch.rand(N, D // 2, dtype=torch.float64) * 6
    expected = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angle), angle)[:, None]
    torch.testing.assert_close(
        apply_rotary(x, Rotary(angle.cos(), angle.sin())), torch.view_as_real(expected).flatten(-2)
    )


def test_scale_is_a_temperature_of_the_queries():
    q, k, v = qkv()
    torch.testing.assert_close(LinearAttention("elu1")(q, k, v, scale=D**-0.5), LinearAttention("elu1")(q, k, v))
    sharper = LinearAttention("elu1")(q, k, v, scale=2 * D**-0.5)
    torch.testing.assert_close(sharper, LinearAttention("elu1")(2 * q, k, v))


def test_a_learned_map_is_trained():
    core = LinearAttention(nn.Sequential(nn.Linear(D, 6), nn.Softplus())).double()
    q, k, v = qkv()
    core(q, k, v).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in core.parameters())


def test_pooled_heads_equal_pooled_projections():
    """Mean-pooling keys and values is mean-pooling the weights that made them (Ainslie et al. 2023)."""
    q, k, v = qkv(kv_heads=H)
    x, weight = torch.randn(B, M, 5, dtype=torch.float64), torch.randn(H, D, 5, dtype=torch.float64)
    k = torch.einsum("bmc,hdc->bmhd", x, weight)
    pooled = torch.einsum("bmc,hdc->bmhd", x, weight.unflatten(0, (HKV, -1)).mean(1))
    out = GroupedQueryAttention(kv_heads=HKV)(q, k, v)
    v_pooled = v.unflatten(2, (HKV, -1)).mean(3)
    torch.testing.assert_close(out, weigh((scores(q, pooled) * D**-0.5).softmax(-1), v_pooled))


def test_int8_scores_are_another_mechanism():
    """So the exact patch never takes them, and says that they are converted."""
    core, exact = GroupedQueryAttention(precision="int8"), GroupedQueryAttention()
    assert core.formula(H, HKV) != exact.formula(H, HKV)
    q, k, v = (x.half() for x in qkv(kv_heads=HKV))
    assert torch.equal(core(q, k, v), gqa_attention(q, k, v, precision="int8"))
    assert not torch.equal(core(q, k, v), exact(q, k, v))


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: LinearAttention("gelu"), "feature_map: got 'gelu'.*relu, elu1, softmax"),
        (lambda: LinearAttention(normalizer="max"), "normalizer: got 'max'"),
        (lambda: GroupedQueryAttention(kv_heads=0), "kv_heads: got 0"),
        (lambda: GroupedQueryAttention(precision="int4"), "precision: got 'int4', expected None or 'int8'"),
        (lambda: GroupedQueryAttention(kv_heads=3).check(4, 4), "expected a divisor of the layer's 4"),
        (lambda: GroupedQueryAttention(kv_heads=8)(*qkv()), "kv_heads: got 8, expected a divisor of the layer.s 2 "),
        (lambda: LinearAttention()(*qkv(), mask=torch.ones(B, 1, N, M, dtype=torch.bool)), r"expected \(B, 1, 1, M\)"),
        (
            lambda: LinearAttention()(*qkv(), rotate=(Rotary(torch.ones(N, 4), torch.ones(N, 4)), None)),
            "rotate: .* self-attention",
        ),
    ],
)
def test_what_a_core_cannot_do_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_configurations_go_to_json_and_back():
    import json

    for core in (LinearAttention("elu1", normalizer="mean", eps=1e-4), GroupedQueryAttention(2), SoftmaxAttention()):
        twin = type(core)(**json.loads(json.dumps(core.config())))
        assert repr(twin) == repr(core) and twin.formula(8, 8) == core.formula(8, 8)
