"""The reference of linear attention, against code that is not ours."""

import pytest
import torch
from diffusers.models.attention_processor import Attention, SanaLinearAttnProcessor2_0

from diffattn.kernels.linear_attention import linear_attention_reference
from tests.kernels.linear_oracle import MAPS, make_inputs, make_rotary


def quadratic_attention(q, k, v, feature_map, rotary, eps, normalizer):
    """The N x M form: weights first, one head after the other."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    if feature_map == "relu":
        q, k = torch.relu(q), torch.relu(k)
    elif feature_map == "elu1":
        q, k = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
    elif feature_map == "softmax":
        q, k = q.softmax(3), k.softmax(1)
    plain = torch.einsum("bnhd,bmhd->bhnm", q, k)
    if rotary is not None:
        turn = torch.complex(*rotary)
        turn = turn.reshape(-1, turn.shape[-2], 1, turn.shape[-1])
        q, k = (torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2) for x in (q, k))
    weights = torch.einsum("bnhd,bmhd->bhnm", q, k)
    if feature_map != "softmax":
        if normalizer == "mean":
            weights, plain = weights / k.shape[1], plain / k.shape[1]
        weights = weights / (plain.sum(-1, keepdim=True) + eps)
    return torch.einsum("bhnm,bmhe->bnhe", weights, v)


@pytest.mark.parametrize("normalizer", ["sum", "mean"])
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("feature_map", MAPS)
def test_reference_is_the_quadratic_form(feature_map, rotated, normalizer):
    q, k, v = make_inputs("cpu", torch.float64, B=2, N=9, H=4, Hkv=2, D=6, E=5, feature_map=feature_map)
    rotary = make_rotary("cpu", 9, 6, B=2, dtype=torch.float64) if rotated else None
    options = dict(feature_map=feature_map, rotary=rotary, eps=1e-4, normalizer=normalizer)
    torch.testing.assert_close(linear_attention_reference(q, k, v, **options), quadratic_attention(q, k, v, **options))


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("feature_map", MAPS)
def test_gradients_of_the_reference(feature_map, rotated):
    inputs = make_inputs("cpu", torch.float64, N=4, H=2, Hkv=1, D=2, E=2, feature_map=feature_map)
    rotary = make_rotary("cpu", 4, 2, dtype=torch.float64) if rotated else None
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(
        lambda q, k, v: linear_attention_reference(q, k, v, feature_map=feature_map, rotary=rotary, eps=1e-3), inputs
    )


def test_reference_is_diffusers_sana():
    attn = Attention(32, heads=2, dim_head=16, processor=SanaLinearAttnProcessor2_0(), out_bias=False)
    attn.to_out[0].weight.data = torch.eye(32)
    x = torch.randn(2, 50, 32)
    q, k, v = (f(x).unflatten(2, (2, 16)) for f in (attn.to_q, attn.to_k, attn.to_v))
    torch.testing.assert_close(linear_attention_reference(q, k, v).flatten(2), attn(x), rtol=1e-5, atol=1e-6)


def test_reference_is_diffusers_sana_video():
    sana_video = "diffusers.models.transformers.transformer_sana_video"
    sana_video = pytest.importorskip(sana_video, reason="this diffusers has no SANA-Video")
    processor = sana_video.SanaLinearAttnProcessor3_0()
    attn = Attention(32, heads=2, dim_head=16, processor=processor, out_bias=False)
    attn.to_out[0].weight.data = torch.eye(32)
    x = torch.randn(2, 50, 32)
    cos, sin = make_rotary("cpu", 50, 16)
    stock = attn(x, rotary_emb=[f.repeat_interleave(2, -1)[None, :, None] for f in (cos, sin)])
    q, k, v = (f(x).unflatten(2, (2, 16)) for f in (attn.to_q, attn.to_k, attn.to_v))
    ours = linear_attention_reference(q, k, v, rotary=(cos, sin)).flatten(2)
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-6)


def test_reference_is_linfusion():
    q, k, v = make_inputs("cpu", torch.float32, B=2, N=50, D=16)
    ours = linear_attention_reference(q, k, v, feature_map="elu1", normalizer="mean", eps=1e-4)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    q, k = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
    z = q @ k.mean(dim=-2, keepdim=True).transpose(-2, -1) + 1e-4
    kv = (k.transpose(-2, -1) * 50**-0.5) @ (v * 50**-0.5)
    torch.testing.assert_close(ours, (q @ kv / z).transpose(1, 2))
