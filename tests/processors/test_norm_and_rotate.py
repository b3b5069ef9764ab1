"""Norms and rotary embedding of a layer: one kernel where that is the same computation, else the modules."""

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from torch import nn

import diffattn
from diffattn.cores import LinearAttention, Rotary, SoftmaxAttention
from diffattn.processors import base
from diffattn.processors.base import norm_and_rotate
from tests.models import BY_NAME

B, N, H, D = 2, 5, 4, 8
CORE = SoftmaxAttention()


class RecordedNorm(RMSNorm):
    """A subclass may do more than its base: it has to be called."""


@pytest.fixture
def fused(monkeypatch):
    """Calls of the kernel's function from processors, as (norms, rotate, all heads at once)."""
    calls = []

    def recorded(q, k, *, norms, rotate, across_heads):
        calls.append((norms, rotate, across_heads))
        return run(q, k, norms=norms, rotate=rotate, across_heads=across_heads)

    run = base.qk_norm_rope
    monkeypatch.setattr(base, "qk_norm_rope", recorded)
    return calls


def heads(seed, device="cpu"):
    return torch.randn(B, N, H, D, generator=torch.Generator().manual_seed(seed)).to(device)


def rms_norm(features, device="cpu", kind=RMSNorm, **options):
    norm = kind(features, eps=1e-5, **options).to(device)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 1, 0.3)
    return norm.requires_grad_(False)


def rotation(device="cpu"):
    angles = torch.rand(N, D // 2, generator=torch.Generator().manual_seed(3)).to(device) * 6
    rotary = Rotary(angles.cos(), angles.sin())
    return rotary, rotary


RMS_NORMS = ["Lumina2Transformer2DModel", "SanaTransformer2DModel", "SanaVideoTransformer3DModel"]


@pytest.mark.parametrize("name", [*RMS_NORMS, "LuminaNextDiT2DModel", "StableAudioDiTModel"])
def test_models_compute_with_the_kernel_what_stock_computes(name, fused, device, triton_backend):
    family = BY_NAME[name]
    with torch.device(device), torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        model = family.model().to(device)
        stock = family.run(model, torch.Generator(device).manual_seed(1))
        handle = diffattn.patch(model)
        ours = family.run(model, torch.Generator(device).manual_seed(1))
    assert ((ours - stock).norm() / stock.norm()).item() <= 1e-5
    # Lumina-Next has layer norms, Stable Audio none.
    assert len(fused) == (len(handle.installed) if name in RMS_NORMS else 0)
    assert all(rotate is None for _, rotate, _ in fused) == (name != "Lumina2Transformer2DModel")


@pytest.mark.parametrize("kind", [RMSNorm, nn.RMSNorm])
@pytest.mark.parametrize("all_heads", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_rms_norms_are_fused(affine, all_heads, kind, fused, device, triton_backend):
    features = H * D if all_heads else D
    norms = [rms_norm(features, device, kind, elementwise_affine=affine) for _ in "qk"]
    q, k = heads(1, device), heads(2, device)
    out = norm_and_rotate(CORE, q, k, norms, rotation(device), all_heads=all_heads)
    assert out[2] is None and len(fused) == 1
    diffattn.config.backend = "torch"
    expected = norm_and_rotate(CORE, q, k, norms, rotation(device), all_heads=all_heads)
    assert expected[2] is None and len(fused) == 1
    for a, b in zip(out[:2], expected[:2], strict=True):
        torch.testing.assert_close(a, b)


def offloaded(norm):
    forward = norm.forward
    norm.forward = lambda x: forward(x)  # as accelerate's hooks do it
    return norm


def with_hook(norm, register):
    getattr(norm, register)(lambda *_: None)
    return norm


@pytest.mark.parametrize(
    "make",
    [
        lambda: rms_norm(D, kind=RecordedNorm),
        lambda: rms_norm(D, bias=True),
        lambda: nn.RMSNorm(D).requires_grad_(False),  # its eps depends on the dtype
        lambda: nn.LayerNorm(D).requires_grad_(False),
        lambda: nn.Identity(),
        lambda: offloaded(rms_norm(D)),
        lambda: with_hook(rms_norm(D), "register_forward_hook"),
        lambda: with_hook(rms_norm(D), "register_forward_pre_hook"),
        lambda: rms_norm(D).requires_grad_(),
    ],
    ids=["subclass", "bias", "eps", "layer-norm", "other", "offloaded", "hook", "pre-hook", "gradient"],
)
@pytest.mark.parametrize("both", [True, False])
def test_other_norms_are_called(make, both, fused, device, triton_backend):
    """One such norm is enough: then both are called, and the result is the modules' own."""
    norms = make().to(device), (make() if both else rms_norm(D)).to(device)
    q, k = heads(1, device), heads(2, device)
    called_q, called_k, left = norm_and_rotate(CORE, q, k, norms)
    assert not fused and left is None
    assert torch.equal(called_q, norms[0](q)) and torch.equal(called_k, norms[1](k))


def test_linear_cores_get_the_rotation_and_softmax_cores_do_not(fused, device, triton_backend):
    norms = rms_norm(D, device), rms_norm(D, device)
    rotate = rotation(device)
    q, k = heads(1, device), heads(2, device)
    q1, k1, left = norm_and_rotate(LinearAttention(), q, k, norms, rotate)
    assert left is rotate and fused[-1][1] is None
    q2, k2, left = norm_and_rotate(CORE, q, k, norms, rotate)
    assert left is None and fused[-1][1] is rotate
    v = heads(4, device)
    torch.testing.assert_close(CORE(q1, k1, v, rotate=rotate), CORE(q2, k2, v))


@pytest.mark.parametrize("norms", [(None, None), (None, "k"), ("q", None)])
def test_a_norm_may_be_absent(norms, fused, device, any_rotation, triton_backend):
    norms = [name and rms_norm(D, device) for name in norms]
    q, k = heads(1, device), heads(2, device)
    rotate = any_rotation and rotation(device)
    out = norm_and_rotate(CORE, q, k, norms, rotate)
    diffattn.config.backend = "torch"
    expected = norm_and_rotate(CORE, q, k, norms, rotate)
    for a, b in zip(out[:2], expected[:2], strict=True):
        torch.testing.assert_close(a, b)


@pytest.fixture(params=[True, False])
def any_rotation(request):
    return request.param or None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_without_the_kernel_nothing_changes(dtype, fused):
    """On a CPU: the modules, then the rotation, bit for bit."""
    norms = rms_norm(H * D).to(dtype), rms_norm(H * D).to(dtype)
    q, k = heads(1).to(dtype), heads(2).to(dtype)
    out_q, out_k, left = norm_and_rotate(CORE, q, k, norms, rotation(), all_heads=True)
    assert left is None and not fused
    for out, norm, x, rotary in zip((out_q, out_k), norms, (q, k), rotation(), strict=True):
        expected = diffattn.cores.apply_rotary(norm(x.flatten(2)).unflatten(-1, (H, D)), rotary)
        assert torch.equal(out, expected)
