"""gqa_attention(precision="int8"): the kernels and the reference against exact attention, and what they refuse."""

import pytest
import torch

from diffattn import config
from diffattn.kernels import gqa_attention
from diffattn.kernels.gqa_attention.reference import gqa_attention_int8_reference, gqa_attention_reference

# What SageAttention's int8 scores are off on Gaussian inputs.
BUDGET = 1.3e-2
DTYPES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]

# B, N, M, H, Hkv, D, E
SHAPES = [
    (2, 1, 1, 2, 2, 4, 4),
    (2, 63, 77, 4, 2, 10, 10),
    (1, 100, 77, 4, 1, 40, 40),
    (1, 130, 128, 3, 3, 64, 64),
    (1, 63, 300, 4, 1, 64, 32),
    (1, 77, 140, 2, 2, 96, 96),
    (1, 65, 63, 2, 1, 128, 128),
    (1, 33, 40, 2, 1, 160, 160),
    (1, 20, 33, 2, 1, 21, 256),
]


def make(B, N, M, H, Hkv, D, E, dtype=torch.float16, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = (B, N, H, D), (B, M, Hkv, D), (B, M, Hkv, E)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def error(out, q, k, v, mask=None, scale=None):
    """Frobenius, relative to attention in float64 of the same inputs."""
    exact = gqa_attention_reference(*(x.double() for x in (q, k, v)), mask, scale)
    return ((out.double() - exact).norm() / exact.norm()).item()


def assert_near_reference(q, k, v, mask=None, scale=None):
    """The same rounding but for ties: far closer to the reference than either is to exact attention."""
    out = gqa_attention(q, k, v, mask=mask, scale=scale, precision="int8")
    expected = gqa_attention_int8_reference(q, k, v, mask, scale)
    difference = (out.double() - expected.double()).norm() / expected.double().norm()
    # Two roundings to the dtype and one of the probabilities.
    assert difference <= {torch.float16: 1e-3, torch.bfloat16: 4.5e-3}[q.dtype]
    assert out.dtype == q.dtype and out.shape == expected.shape


@pytest.fixture(params=["torch", "triton"])
def any_backend(request):
    before, config.backend = config.backend, request.param
    yield request.param
    config.backend = before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_rounds_as_the_reference_does(shape, dtype, device, triton_backend):
    assert_near_reference(*make(*shape, dtype=dtype, device=device))


@pytest.mark.parametrize("D", [64, 128])
def test_error_on_gaussian_inputs(D, device, any_backend):
    q, k, v = make(1, 128, 1024, 2, 1, D, D, device=device)
    assert 1e-3 < error(gqa_attention(q, k, v, precision="int8"), q, k, v) <= BUDGET


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("outliers", ["mean of keys", "keys"])
def test_error_with_outlier_channels(outliers, D, device, any_backend):
    """A few channels of keys far from 0, or far wider than the others while those of queries are as much narrower."""
    q, k, v = make(1, 128, 1024, 2, 1, D, D, device=device)
    if outliers == "mean of keys":
        k[..., 3::29] += 8
    else:
        k[..., 3::29] *= 4
        q[..., 3::29] /= 4
    assert error(gqa_attention(q, k, v, precision="int8"), q, k, v) <= BUDGET


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [40, 64, 72, 96, 128, 160, 256])
def test_error_at_image_sizes(D, dtype, device, triton_backend):
    q, k, v = make(1, 1024, 4100, 4, 2, D, D, dtype=dtype, device=device)
    assert error(gqa_attention(q, k, v, precision="int8"), q, k, v) <= BUDGET
    mask = torch.arange(4100, device=device) % 7 != 0
    assert error(gqa_attention(q, k, v, mask=mask, precision="int8"), q, k, v, mask) <= BUDGET


@pytest.mark.parametrize("shape", [(2, 1, 1, 77), (2, 4, 100, 77), (77,)], ids=str)
@pytest.mark.parametrize("masked", ["bool", "additive"])
def test_masks(masked, shape, device, any_backend):
    q, k, v = make(2, 100, 77, 4, 2, 40, 40, device=device)
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(device, torch.float16)
    mask = mask > -0.5 if masked == "bool" else mask
    assert_near_reference(q, k, v, mask)


@pytest.mark.parametrize("scale", [1.0, 0.05, -0.3])
def test_scale(scale, device, any_backend):
    q, k, v = make(1, 33, 40, 2, 1, 16, 16, device=device)
    assert_near_reference(q, k, v, scale=scale)


def test_strides_and_rows_of_zeros(device, any_backend):
    q, k, v = make(2, 50, 60, 4, 2, 32, 32, device=device)
    q[:, 7], k[:, 5] = 0, 0
    assert_near_reference(q.flip(1), k[:, ::2], v[:, ::2])
    assert_near_reference(q.transpose(1, 2).contiguous().transpose(1, 2), k[:1].expand(2, -1, -1, -1), v)
    assert_near_reference(q, torch.ones_like(k), v)


@pytest.mark.parametrize("N, M", [(0, 5), (5, 0)])
def test_no_queries_or_no_keys(N, M, device, any_backend):
    q, k, v = make(2, N, M, 4, 2, 8, 8, device=device)
    out = gqa_attention(q, k, v, precision="int8")
    assert out.shape == (2, N, 4, 8) and (out == 0).all()


def test_nan_is_not_hidden(device, any_backend):
    q, k, v = make(1, 20, 40, 2, 1, 16, 16, device=device)
    q[0, 3, 1, 2] = float("nan")
    out = gqa_attention(q, k, v, precision="int8")
    assert out[0, 3, 1].isnan().all() and out.isnan().sum() == 16


def test_gradients_are_refused(device, any_backend):
    q, k, v = make(1, 9, 7, 2, 1, 8, 8, device=device)
    with pytest.raises(RuntimeError, match="precision='int8' has no gradient"):
        gqa_attention(q.requires_grad_(), k, v, precision="int8")
    with torch.no_grad():
        gqa_attention(q, k, v, precision="int8")


def test_bad_precision_is_named():
    q, k, v = make(1, 9, 7, 2, 1, 8, 8)
    with pytest.raises(ValueError, match="precision: got 'int4', expected None or 'int8'"):
        gqa_attention(q, k, v, precision="int4")
    with pytest.raises(TypeError, match=r"precision: got .int8. with torch\.float32"):
        gqa_attention(q.float(), k.float(), v.float(), precision="int8")


def test_operator_passes_opcheck(device, triton_backend):
    q, k, v = make(2, 9, 7, 4, 2, 8, 4, device=device)
    mask = torch.rand(1, 1, 9, 7, device=device) > 0.3
    torch.library.opcheck(torch.ops.diffattn.gqa_attention_int8.default, (q, k, v, mask, 0.3))


def test_compiles_to_one_graph_for_every_length(device, any_backend):
    torch.compiler.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(q, k, v):
        return gqa_attention(q * 2, k, v, precision="int8")

    with torch._dynamo.config.patch(error_on_recompile=True):
        for N, M in ((9, 7), (20, 33), (5, 64)):
            q, k, v = make(2, N, M, 4, 2, 8, 8, device=device)
            torch.testing.assert_close(compiled(q, k, v), gqa_attention(q * 2, k, v, precision="int8"))
