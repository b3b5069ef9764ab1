"""gqa_attention's inference kernel for Hopper against the equation in float64."""

import pytest
import torch

from diffattn.kernels import gqa_attention
from diffattn.kernels.gqa_attention.reference import gqa_attention_reference

pytestmark = pytest.mark.gpu
# As in test_gqa_attention: two roundings of 1.63e-3 in bfloat16, of 2.0e-4 in float16, and float32 sums.
BUDGET = {torch.float16: 4e-4, torch.bfloat16: 2.5e-3}


@pytest.fixture(autouse=True)
def hopper_only(device, triton_backend):
    from diffattn.kernels.gqa_attention import hopper

    x = torch.empty(1, 128, 1, 64, dtype=torch.float16, device=device)
    if not hopper.takes(x, x, x, None, 1.0):
        pytest.skip("needs a Hopper GPU and Triton 3.6")


def make(B, N, M, H, Hkv, D, dtype, device):
    shapes = (B, N, H, D), (B, M, Hkv, D), (B, M, Hkv, D)
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


def assert_accurate(q, k, v, mask=None, scale=None):
    out = gqa_attention(q, k, v, mask=mask, scale=scale)
    added = mask if mask is None or mask.dtype == torch.bool else mask.double()
    expected = gqa_attention_reference(*(x.double() for x in (q, k, v)), added, scale)
    assert ((out.double() - expected).norm() / expected.norm()).item() <= BUDGET[q.dtype]
    assert all(torch.equal(out, gqa_attention(q, k, v, mask=mask, scale=scale)) for _ in range(5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("D", [8, 40, 64, 72, 96, 128, 160, 192])
@pytest.mark.parametrize("N, M", [(128, 128), (300, 333), (129, 1100), (4352, 1024)])
def test_matches_float64(N, M, D, dtype, device):
    # Enough tiles that programs take several.
    q, k, v = make(2, N, M, 24, 8, D, dtype, device)
    assert_accurate(q, k, v)
    assert_accurate(q, k, v, mask=torch.rand(2, 1, 1, M, device=device) > 0.3)


@pytest.mark.parametrize("lowest", [False, float("-inf"), torch.finfo(torch.float32).min])
def test_masks_over_keys(lowest, device):
    q, k, v = make(2, 200, 300, 4, 2, 64, torch.float16, device)
    mask = torch.zeros(2, 1, 1, 300, dtype=torch.bool if lowest is False else torch.float32, device=device)
    mask[...] = lowest is False
    mask[0, ..., :250] = lowest
    assert_accurate(q, k, v, mask)
    assert_accurate(q, k, v, mask[:1])
    mask[1] = lowest
    out = gqa_attention(q, k, v, mask=mask)[1]
    expected = v[1].float().mean(dim=0).repeat_interleave(2, dim=0) if lowest not in (False, float("-inf")) else 0.0
    assert (out - expected).abs().max() <= 1e-3


def test_strides_and_scale(device):
    q, k, v = make(2, 200, 300, 4, 2, 64, torch.float16, device)
    fused = torch.randn(2, 300, 8 * 64, dtype=torch.float16, device=device).unflatten(-1, (8, 64))
    assert_accurate(q.transpose(1, 2).contiguous().transpose(1, 2), *fused[:, :, 4:].split(2, dim=2))
    assert_accurate(q[:, ::2], k.expand(2, -1, -1, -1), v, scale=0.3)
    assert_accurate(q[:, :128, :2], k[:, :, :1], v[:, :, :1])


def configurations():
    from diffattn.kernels.gqa_attention.hopper import CONFIGS

    return [(most, config) for most, configs in CONFIGS.items() for config in configs]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("D, config", configurations(), ids=str)
def test_every_configuration(D, config, dtype, device):
    """On scores whose maximum grows from block to block, or that are all far below zero."""
    from diffattn.kernels.gqa_attention.hopper import hopper_fwd

    q, k, v = make(2, 700, 1100, 24, 8, D, dtype, device)
    slope = torch.linspace(-4, 4, 1100, device=device)[None, :, None, None] * q[:, :1, :8].sign()
    for a, b in ((q, k), (q, (k + slope).to(dtype)), (q, (k - slope).to(dtype)), (q * 8, k), (q * 0 + 4, k * 0.1 - 4)):
        out = hopper_fwd(a, b, v, None, D**-0.5, config=config)
        expected = gqa_attention_reference(*(x.double() for x in (a, b, v)))
        assert ((out.double() - expected).norm() / expected.norm()).item() <= BUDGET[dtype]


@pytest.mark.parametrize("i", [0, 5, 131, 299])
def test_nan_in_a_key_reaches_every_row(i, device):
    q, k, v = make(2, 200, 300, 4, 2, 64, torch.bfloat16, device)
    k[:, i] = float("nan")
    assert gqa_attention(q, k, v).isnan().all()
