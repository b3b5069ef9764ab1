"""Fewer key/value heads by SVD: the nearest products that a shared projection allows."""

import pytest
import torch

import diffattn
from diffattn import GroupedQueryAttention
from diffattn.cores import LayerInfo
from diffattn.cores.pooling import svd_pooled
from tests.models import BY_NAME
from tests.plugins.common import UNET, error, out

pytestmark = pytest.mark.filterwarnings("ignore:diffattn. .* another mechanism")

H, D, C = 4, 6, 20


def svd(kv_heads=1):
    return GroupedQueryAttention(kv_heads=kv_heads, pooling="svd")


def layer(kv_heads=H, bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = {"q": H * D, "k": kv_heads * D, "v": kv_heads * D}
    weights = {role: (random(n, C), random(n) if bias else None) for role, n in rows.items()}
    return LayerInfo(H, kv_heads, D, weights | {"out": (random(C, H * D), random(C))}, plain_scores=True)


def products(weights, kv_heads):
    """q_h^T k_h and o_h v_h of each query head, biases as one more input: what scores and outputs are made of."""

    def heads(role, n):
        weight, bias = weights[role]
        wide = weight if bias is None else torch.cat((weight, bias[:, None]), dim=1)
        return wide.detach().double().unflatten(0, (n, D))

    out = weights["out"][0].detach().double().unflatten(1, (H, D)).transpose(0, 1)
    q, k, v = heads("q", H), heads("k", kv_heads), heads("v", kv_heads)
    k, v = (t.repeat_interleave(H // kv_heads, dim=0) for t in (k, v))
    return q.mT @ k, out @ v


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("before, after", [(4, 1), (4, 2), (2, 1)])
def test_no_shared_projections_are_nearer(before, after, bias):
    """The distance of each group is that of its truncated SVD, which nothing of that rank undercuts."""
    info = layer(before, bias)
    made = svd_pooled(info, after)
    made = {role: (module.weight, module.bias) for role, module in made.items()}
    for wanted, got in zip(products(info.weights, before), products(made, after), strict=True):
        for far, near in zip(wanted.chunk(after), got.chunk(after), strict=True):
            values = torch.linalg.svdvals(far.flatten(0, 1))
            torch.testing.assert_close((far - near).norm(), values[D:].norm())
    assert made["k"][0].shape == (after * D, C) and made["q"][0].shape == (H * D, C)
    assert torch.equal(made["out"][1], info.weights["out"][1])


def test_heads_that_are_alike_but_for_their_basis_lose_nothing():
    """Multi-query attention in disguise: its keys and values turned and stretched from head to head."""
    unet = UNET.model()
    for name, attn in unet.named_modules():
        if name.endswith("attn1"):
            width = attn.inner_dim // attn.heads
            with torch.no_grad():
                for module in (attn.to_k, attn.to_v):
                    turned = [torch.randn(width, width) @ module.weight[:width] for _ in range(attn.heads)]
                    module.weight.copy_(torch.cat(turned))
    stock = out(UNET, unet)
    diffattn.patch(unet, svd())
    assert error(out(UNET, unet), stock) <= 1e-5
    diffattn.unpatch(unet)
    diffattn.patch(unet, "mqa")
    assert error(out(UNET, unet), stock) > 1e-3


def test_starts_nearer_than_the_mean():
    unet = UNET.model()
    stock = out(UNET, unet)
    errors = {}
    for core in ("mqa", "mqa-svd"):
        with diffattn.patched(unet, core):
            errors[core] = error(out(UNET, unet), stock)
    assert errors["mqa-svd"] < errors["mqa"]
    assert torch.equal(out(UNET, unet), stock)


def test_saved_loaded_and_finalized(tmp_path, monkeypatch):
    unet = UNET.model()
    diffattn.patch(unet, svd(2))
    expected = out(UNET, unet)
    folder = str(diffattn.save_weights(unet, tmp_path))
    other = UNET.model()
    monkeypatch.setattr(torch.linalg, "eigh", None)  # loading does not compute what it overwrites
    diffattn.patch(other, weights=folder)
    diffattn.finalize(other)
    assert torch.equal(out(UNET, other), expected)
    assert diffattn.status(other).installed.popitem()[1].core.pooling == "svd"


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "HunyuanDiT2DModel", "fused"])
def test_layers_that_it_cannot_serve(name):
    """Norms and rotations between the projections and their product, projections that cannot be replaced."""
    if name == "fused":
        model = UNET.model()
        model.fuse_qkv_projections()
    else:
        model = BY_NAME[name].model()
    with pytest.raises(ValueError, match=r"pooling: 'svd' changes all four projections together.*expected 'mean'"):
        diffattn.patch(model, svd())
    assert not diffattn.status(model).installed


def test_bad_argument():
    with pytest.raises(ValueError, match="pooling: got 'max', expected 'mean' or 'svd'"):
        GroupedQueryAttention(1, pooling="max")
