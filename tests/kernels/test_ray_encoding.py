"""Features in ray coordinates: the oracle is diffusers' own functions in float64."""

import pytest
import torch

from diffattn.kernels import ray_encoding

# relative Frobenius errors; rounding the output alone costs 1.7e-3, 2.1e-4 and 3e-8
BUDGET = {torch.bfloat16: 2.5e-3, torch.float16: 4e-4, torch.float32: 1e-5}
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]

wm = pytest.importorskip("diffusers.models.transformers.transformer_sana_wm")


def make_inputs(device="cpu", dtype=torch.float32, *, B=2, N=21, H=3, D=16, tables="one"):
    x = torch.randn(B, N, H, D, device=device).to(dtype)
    shape = {None: None, "one": (N, D // 4), "each": (B, N, D // 4)}[tables]
    angles = None if shape is None else torch.randn(shape, device=device)
    matrices = torch.randn(B, N, 4, 4, device=device).to(dtype)
    return x, matrices, None if angles is None else (angles.cos(), angles.sin())


def stock(x, matrices, rotary, scale=1.0, limit=False):
    """In float64, from (B, N, H, D) to there and back."""
    x = x.double().permute(0, 2, 1, 3) * scale
    freqs = None
    if rotary is not None:
        freqs = torch.complex(*(t.double() for t in rotary))
        freqs = freqs if freqs.dim() == 2 else freqs[:, None]
    # its rotation is float32: it has the rotation's half again
    y = wm._apply_ucpe_transform(x, matrices.double(), None)
    half = x.shape[-1] // 2
    if freqs is not None:
        turned = torch.view_as_real(torch.view_as_complex(x[..., half:].unflatten(-1, (-1, 2)).contiguous()) * freqs)
        y = torch.cat((y[..., :half], turned.flatten(-2)), -1)
    if not limit:
        return y.permute(0, 2, 1, 3), None
    before, after = x.transpose(2, 3), y.transpose(2, 3)
    y = wm._downscale_to_reference_rms(before, after)
    norms = (torch.linalg.vector_norm(t, dim=2).clamp_min(1e-6) for t in (y, before))
    after, before = (t.transpose(1, 2) for t in norms)
    return y.permute(0, 3, 1, 2), (after / before) ** 2


def check(x, *arguments, **options):
    y, growth = ray_encoding(x, *arguments, **options)
    expected, expected_growth = stock(x, *arguments, **options)
    assert y.dtype == x.dtype and y.isfinite().all()
    error = (y.double() - expected).norm() / expected.norm()
    assert error <= BUDGET[x.dtype], f"relative error {error:.2e}"
    assert (growth is None) == (expected_growth is None)
    if growth is not None:
        assert growth.dtype == torch.float32
        assert (growth - expected_growth).norm() <= BUDGET[torch.float32] * expected_growth.norm()


@pytest.mark.parametrize("options", [dict(), dict(scale=0.03, limit=True)], ids=["plain", "limit"])
@pytest.mark.parametrize("tables", [None, "one", "each"])
@pytest.mark.parametrize("shape", [dict(), dict(N=1, D=8, H=1), dict(B=1, N=9, D=112)], ids=str)
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_what_diffusers_computes(dtype, kernels, shape, tables, options, device, request):
    if kernels:
        request.getfixturevalue("triton_backend")
    check(*make_inputs(device, dtype, tables=tables, **shape), **options)


@pytest.mark.parametrize(("B", "N"), [(0, 3), (2, 0)])
def test_no_tokens(B, N, any_backend, device):
    y, growth = ray_encoding(
        torch.randn(B, N, 2, 8, device=device), torch.randn(B, N, 4, 4, device=device), limit=True
    )
    assert y.shape == (B, N, 2, 8)
    assert growth.shape == (B, N, 2)


@pytest.mark.parametrize("limit", [False, True])
def test_gradients(limit):
    x, matrices, rotary = make_inputs(dtype=torch.float64, B=1, N=2, H=1, D=8)
    inputs = [x.requires_grad_(), matrices.requires_grad_()]

    def outputs(x, matrices):
        y, growth = ray_encoding(x, matrices, rotary, scale=0.5, limit=limit)
        return (y, growth) if limit else y

    assert torch.autograd.gradcheck(outputs, inputs)


@pytest.mark.parametrize("kernels", [False, True])
def test_strides_and_zeros(kernels, device, request):
    if kernels:
        request.getfixturevalue("triton_backend")
    x, matrices, rotary = make_inputs(device)
    x[:, 2] = 0
    apart = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    check(apart, matrices.mT, rotary, scale=0.1, limit=True)
    y, growth = ray_encoding(apart, matrices, rotary, limit=True)
    assert not y[:, 2].any() and (growth[:, 2] == 1).all()


def test_autocast_changes_nothing(device):
    x, matrices, rotary = make_inputs(device)
    expected = ray_encoding(x, matrices, rotary, limit=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        y, growth = ray_encoding(x, matrices, rotary, limit=True)
    assert torch.equal(y, expected[0]) and torch.equal(growth, expected[1])


def test_opcheck(device, triton_backend):
    x, matrices, (cos, sin) = make_inputs(device)
    op, checks = torch.ops.diffattn.ray_encoding.default, ("test_schema", "test_faketensor")
    for limit in (False, True):
        torch.library.opcheck(op, (x, matrices, cos, sin, 0.5, limit), test_utils=checks)


def test_bad_input():
    x, matrices, rotary = make_inputs()
    for error, match, changed in (
        (TypeError, "x: got NoneType", dict(x=None)),
        (ValueError, r"x: got shape \(2, 21, 3, 12\), .* multiple of 8", dict(x=x[..., :12])),
        (ValueError, r"matrices: got shape \(2, 21, 4\), expected \(2, 21, 4, 4\)", dict(matrices=matrices[..., 0])),
        (TypeError, "matrices: got torch.int64", dict(matrices=matrices.long())),
        (TypeError, "rotary: got Tensor, expected a pair", dict(rotary=rotary[0])),
        (ValueError, r"rotary: cos: got shape \(20, 4\)", dict(rotary=(rotary[0][1:], rotary[1]))),
        (ValueError, "expected them alike", dict(rotary=(rotary[0], rotary[1].double()))),
        (ValueError, "scale: got inf", dict(scale=float("inf"))),
    ):
        with pytest.raises(error, match=match):
            ray_encoding(**dict(x=x, matrices=matrices, rotary=rotary) | changed)
