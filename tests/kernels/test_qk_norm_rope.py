"""RMS norm and rotary embedding of q and k: the Triton kernel and the torch path against the equation in float64."""

import pytest
import torch

from diffattn import config
from diffattn.kernels import Rotary, qk_norm_rope
from diffattn.kernels.qk_norm_rope.reference import norm_rope_reference
from tests.kernels.accuracy import at_odd_address, relative_error

# Relative Frobenius error. The result is rounded once: 1.63e-3 in bfloat16, 2.0e-4 in float16.
BUDGET = {torch.float32: 1e-5, torch.float16: 4e-4, torch.bfloat16: 2.5e-3}

float32, float16 = torch.float32, torch.float16
bfloat16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)
DTYPES = [float32, float16, bfloat16]

# B, N, M, H, Hkv, D, rotated features: one token and odd numbers of them, padded heads, partial rotation.
SHAPES = [
    (2, 1, 1, 1, 1, 2, 2),
    (1, 1, 63, 5, 1, 8, 8),
    (2, 63, 5, 5, 5, 8, 4),
    (1, 20, 33, 3, 2, 5, 2),
    (1, 100, 7, 4, 2, 40, 40),
    (1, 63, 9, 2, 2, 64, 32),
    (1, 33, 33, 2, 1, 72, 72),
    (1, 9, 20, 24, 8, 96, 96),
    (2, 7, 9, 5, 1, 112, 56),
    (1, 17, 17, 3, 3, 128, 128),
    (1, 5, 6, 2, 1, 256, 256),
]
# N, heads, D of a norm across heads: 2240 features, one step of heads and several, more heads than fit one.
ACROSS = [(1, 1, 8), (63, 5, 8), (7, 5, 40), (5, 20, 112), (3, 40, 128), (9, 24, 64), (2, 70, 32), (3, 3, 5)]


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def tables(N, R, interleaved=True, device="cpu", dtype=float32, batch=()):
    angles = rand(*batch, N, R // 2, seed=5) * 3
    return Rotary(angles.cos().to(device, dtype), angles.sin().to(device, dtype), interleaved)


def make(B, N, M, H, Hkv, D, R, *, interleaved=True, across=False, dtype=float32, device="cpu"):
    """Arguments of `qk_norm_rope`."""

    def norm(heads, seed):
        weight = 1 + 0.3 * rand(heads * D if across else D, seed=seed)
        return weight.to(device, dtype), 1e-5

    q, k = (rand(B, n, heads, D).to(device, dtype) for n, heads in ((N, H), (M, Hkv)))
    rotate = (tables(N, R, interleaved, device), tables(M, R, interleaved, device)) if R else None
    return dict(q=q, k=k, norms=(norm(H, 1), norm(Hkv, 2)), rotate=rotate, across_heads=across)


def double(t):
    return None if t is None else t.detach().double()


def exact(q, k=None, norms=(None, None), rotate=(None, None), across_heads=False):
    """The equation in float64, for each of q and k."""
    for x, norm, rotary in zip((q, k), norms or (None, None), rotate or (None, None), strict=True):
        if norm is not None:
            norm = double(norm[0]), norm[1]
        if rotary is not None:
            rotary = Rotary(double(rotary[0]), double(rotary[1]), rotary[2])
        yield None if x is None else norm_rope_reference(double(x), norm, rotary, across_heads)


def assert_accurate(**arguments):
    outs = qk_norm_rope(**arguments)
    for out, x, expected in zip(outs, (arguments["q"], arguments["k"]), exact(**arguments), strict=True):
        # Not "error > budget": a NaN has to fail.
        assert relative_error(out, expected) <= BUDGET[x.dtype]
        assert out.dtype == x.dtype and out.shape == x.shape


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("R", [8, 4, 0])
def test_reference_is_the_equation(R, interleaved, across):
    B, N, H, D = 2, 5, 3, 8
    x, weight, angles = rand(B, N, H, D).double(), rand(H * D if across else D).double(), rand(N, R // 2).double()
    rotary = Rotary(angles.cos(), angles.sin(), interleaved) if R else None
    expected = x.clone()
    for b in range(B):
        for n in range(N):
            for h in range(H):
                mean = x[b, n].square().mean() if across else x[b, n, h].square().mean()
                y = x[b, n, h] / (mean + 0.1).sqrt() * (weight.view(H, D)[h] if across else weight)
                expected[b, n, h] = y
                for i in range(R // 2):
                    first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + R // 2)
                    turned = torch.complex(y[first], y[second]) * torch.polar(torch.ones(()).double(), angles[n, i])
                    expected[b, n, h, first], expected[b, n, h, second] = turned.real, turned.imag
    torch.testing.assert_close(norm_rope_reference(x, (weight, 0.1), rotary, across), expected)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_matches_float64(shape, dtype, interleaved, device, triton_backend):
    assert_accurate(**make(*shape, interleaved=interleaved, dtype=dtype, device=device))


@pytest.mark.parametrize("interleaved", [True, False, None])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ACROSS, ids=str)
def test_triton_matches_float64_across_heads(shape, dtype, interleaved, device, triton_backend):
    N, H, D = shape
    R = 0 if interleaved is None else D // 2 * 2
    shape = (2, N, N + 1, H, max(1, H // 2), D, R)
    assert_accurate(**make(*shape, interleaved=interleaved, across=True, dtype=dtype, device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, across",
    [
        ((2, 4352, 4352, 24, 8, 96, 96), False),
        ((1, 4608, 4096, 24, 24, 128, 128), False),
        ((1, 1025, 1500, 16, 16, 72, 40), False),
        ((1, 3001, 3001, 40, 40, 128, 128), True),
        ((2, 1100, 1100, 20, 20, 112, 112), True),
        ((1, 999, 999, 70, 70, 32, 32), True),
    ],
    ids=str,
)
def test_triton_matches_float64_at_image_sizes(shape, across, dtype, interleaved, device, triton_backend):
    assert_accurate(**make(*shape, interleaved=interleaved, across=across, dtype=dtype, device=device))


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("shape", SHAPES[1::3], ids=str)
def test_dispatch_matches_float64(shape, across, backend, device, monkeypatch):
    monkeypatch.setattr(config, "backend", backend)
    for dtype in (float32, float16):
        assert_accurate(**make(*shape, across=across, dtype=dtype, device=device))


@pytest.mark.parametrize("across", [True, False])
def test_norm_and_rotation_each_alone(across, device, any_backend):
    arguments = make(2, 9, 5, 4, 2, 16, 8, across=across, dtype=float16, device=device)
    q_rotary, k_rotary = arguments["rotate"]
    (q_weight, eps), k_norm = arguments["norms"]
    assert_accurate(**arguments | {"norms": None})
    assert_accurate(**arguments | {"rotate": None})
    assert_accurate(**arguments | {"norms": ((None, eps), k_norm)})
    assert_accurate(**arguments | {"norms": (None, k_norm), "rotate": (q_rotary, None)})
    assert_accurate(**arguments | {"norms": ((q_weight, 0.5), k_norm), "rotate": (None, k_rotary)})
    # Pairs of another kind for each.
    assert_accurate(**arguments | {"rotate": (q_rotary, k_rotary._replace(interleaved=False))})


def test_what_has_nothing_to_do_comes_back(device, any_backend):
    arguments = make(2, 9, 5, 4, 2, 16, 16, device=device)
    q, k, (rotary, _) = arguments["q"], arguments["k"], arguments["rotate"]
    assert qk_norm_rope(q) is q
    assert qk_norm_rope(q, k, norms=(None, None), rotate=(None, None)) == (q, k)
    rotated, same = qk_norm_rope(q, k, rotate=(rotary, None))
    assert same is k and torch.equal(qk_norm_rope(q, rotate=(rotary, None)), rotated)
    same, rotated = qk_norm_rope(k, q, rotate=(None, rotary))
    assert same is k and torch.equal(qk_norm_rope(q, rotate=(rotary, None)), rotated)


@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("extra", [0, 1, 8])
def test_strided_inputs(extra, interleaved, across, device, any_backend):
    """Parts of a fused projection whose rows start where loads like it and where they do not; other storage orders."""
    arguments = make(2, 9, 9, 4, 2, 16, 16, interleaved=interleaved, across=across, device=device)
    B, N, H, Hkv, D = 2, 9, 4, 2, 16
    fused = rand(B, N, (H + 2 * Hkv) * D + extra).to(device)[..., extra:]
    q, k, _ = (x.unflatten(-1, (-1, D)) for x in fused.split((H * D, Hkv * D, Hkv * D), dim=-1))
    assert_accurate(**arguments | {"q": q, "k": k})
    k = k.transpose(1, 2).contiguous().transpose(1, 2)
    assert_accurate(**arguments | {"q": q.transpose(2, 3).contiguous().transpose(2, 3), "k": k})
    assert_accurate(**arguments | {"q": q.flip(1), "k": k[:1, :, :1].expand(B, -1, Hkv, -1)})
    assert_accurate(**arguments | {"q": q[..., ::2].repeat_interleave(2, dim=-1), "k": k})


@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("interleaved", [True, False])
def test_tables_of_every_kind(interleaved, across, device, any_backend):
    B, N, R = 2, 9, 8
    arguments = make(B, N, N, 4, 2, 16, R, interleaved=interleaved, across=across, device=device)
    freqs = torch.polar(torch.ones(B, N, R // 2), rand(B, N, R // 2)).to(device)
    cos, sin = freqs.real, freqs.imag
    for pair in (
        (cos, sin),
        (cos[0], sin[0]),
        (cos[:1], sin[:1]),
        (cos.contiguous(), sin.contiguous()),
        (cos.contiguous(), sin),
        (cos.half(), sin.half()),
        (cos.double(), sin.double()),
        (cos.contiguous().mT.contiguous().mT, sin.contiguous().mT.contiguous().mT),
        (cos.repeat_interleave(2, dim=-1)[..., 0::2], sin.repeat_interleave(2, dim=-1)[..., 1::2]),
    ):
        rotary = Rotary(*pair, interleaved)
        assert_accurate(**arguments | {"rotate": (rotary, rotary)})


@pytest.mark.parametrize("across", [True, False])
def test_weights_of_every_kind(across, device, any_backend):
    arguments = make(1, 9, 9, 4, 4, 16, 16, across=across, dtype=float16, device=device)
    weight = rand(128 if across else 32).to(device)
    for w in (weight[::2], weight[::2].half(), weight[::2].double(), weight[:1].expand(weight.numel() // 2)):
        assert_accurate(**arguments | {"norms": ((w, 1e-6), (w, 0))})


@pytest.mark.parametrize("across", [True, False])
def test_extreme_values(across, device, any_backend):
    """float16 squares overflow and their mean underflows in float16, not in float32; a row of zeros stays zeros."""
    arguments = make(1, 4, 4, 4, 4, 16, 16, across=across, dtype=float16, device=device)
    q = arguments["q"].sign() * torch.tensor([300.0, 6e-5, 0.0, 1.0], device=device).half()[:, None, None]
    assert_accurate(**arguments | {"q": q})
    out, _ = qk_norm_rope(**arguments | {"q": q})
    assert (out[:, 2] == 0).all()


@pytest.mark.parametrize("interleaved", [True, False])
def test_what_does_not_rotate_passes_through(interleaved, device, any_backend):
    q = rand(1, 5, 2, 16).to(device)
    q[..., 9], q[..., 12] = torch.inf, torch.nan
    out = qk_norm_rope(q, rotate=(tables(5, 8, interleaved, device), None))
    assert torch.equal(out[..., 8:].nan_to_num(7.0), q[..., 8:].nan_to_num(7.0)) and out[..., :8].isfinite().all()
    assert not torch.equal(out[..., :8], q[..., :8])


def test_a_nan_stays_with_its_token_or_head(device, triton_backend):
    for across in (True, False):
        arguments = make(1, 20, 20, 5, 5, 16, 16, across=across, device=device)
        arguments["q"][0, 7, 2, 3] = torch.nan
        out, _ = qk_norm_rope(**arguments)
        expected = torch.zeros(1, 20, 5, 16, dtype=torch.bool, device=device)
        expected[0, 7, slice(None) if across else 2] = True
        assert torch.equal(out.isnan(), expected)


@pytest.mark.parametrize("N, B", [(0, 2), (5, 0)])
def test_no_tokens(N, B, device, any_backend):
    arguments = make(B, N, 5, 4, 2, 8, 8, device=device)
    q, k = qk_norm_rope(**arguments)
    assert q.shape == (B, N, 4, 8) and k.shape == (B, 5, 2, 8)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("across", [True, False])
def test_every_element_is_written(across, interleaved, device, triton_backend, poisoned_memory):
    assert_accurate(**make(2, 13, 5, 5, 2, 20, 12, interleaved=interleaved, across=across, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("across", [True, False])
def test_runs_repeat_bit_for_bit(across, dtype, device, triton_backend):
    arguments = make(2, 33, 20, 5, 2, 40, 40, across=across, dtype=dtype, device=device)
    for a, b in zip(qk_norm_rope(**arguments), qk_norm_rope(**arguments), strict=True):
        assert torch.equal(a, b) and a.is_contiguous()


@pytest.mark.parametrize("across", [True, False])
def test_gradients_reach_inputs_and_weights(across, device, any_backend):
    """Whatever the backend: a call that wants gradients is plain torch."""
    arguments = make(2, 5, 7, 4, 2, 8, 4, across=across, device=device)
    (q_weight, eps), (k_weight, _) = arguments["norms"]
    inputs = [x.requires_grad_() for x in (arguments["q"], arguments["k"], q_weight, k_weight)]
    outs = qk_norm_rope(**arguments)
    grads = torch.autograd.grad(sum(x.square().sum() * i for i, x in enumerate(outs, 1)), inputs)
    copies = [x.detach().double().requires_grad_() for x in inputs]
    rotate = [Rotary(double(r.cos), double(r.sin), r.interleaved) for r in arguments["rotate"]]
    expected = [
        norm_rope_reference(x, (w, eps), r, across) for x, w, r in zip(copies[:2], copies[2:], rotate, strict=True)
    ]
    expected = torch.autograd.grad(sum(x.square().sum() * i for i, x in enumerate(expected, 1)), copies)
    assert all(relative_error(a, b) <= 1e-5 for a, b in zip(grads, expected, strict=True))
    # The tables are constants.
    rotary = Rotary(*(t.clone().requires_grad_() for t in arguments["rotate"][0][:2]))
    assert not qk_norm_rope(arguments["q"].detach(), rotate=(rotary, None)).requires_grad


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("across", [True, False])
def test_offsets_beyond_32_bits(across, device, triton_backend):
    """More than 2 ** 31 elements of input and output; then heads, and then tokens, 2 ** 29 elements apart."""
    N, H, D = 2**20 + 64, 16, 128
    a = make(1, 64, 64, H, H, D, D, across=across, dtype=float16, device=device)
    q = torch.randn(1, N, H, D, dtype=float16, device=device)
    cos, sin = (torch.empty(N, D // 2, device=device) for _ in range(2))
    cos[-64:], sin[-64:] = a["rotate"][0][:2]
    out = qk_norm_rope(q, norms=(a["norms"][0], None), rotate=(Rotary(cos, sin), None), across_heads=across)
    a["q"] = q[:, -64:].clone()
    assert relative_error(out[:, -64:], next(exact(**a))) <= BUDGET[float16]
    del q, out, cos, sin

    storage = torch.empty(2**29 * 9, dtype=float16, device=device)
    for strides in ((0, 128, 2**29, 1), (0, 2**29, 128, 1)):
        shape = (1, 8, 8, 128)
        a = make(1, 8, 8, 8, 8, 128, 128, across=across, dtype=float16, device=device)
        a["q"] = torch.as_strided(storage, shape, strides).normal_()
        assert_accurate(**a)


@pytest.mark.parametrize("across", [False, True])
def test_a_kept_launch_serves_only_its_layout(across, device, triton_backend):
    shape = dict(B=2, N=5, M=3, H=4, Hkv=2, D=16, R=8, across=across, device=device)
    arguments = make(**shape)
    for _ in range(2):
        assert_accurate(**arguments)
    assert_accurate(**arguments | {name: at_odd_address(arguments[name]) for name in "qk"})
    weights = tuple((at_odd_address(weight), eps) for weight, eps in arguments["norms"])
    assert_accurate(**arguments | dict(norms=weights))
    assert_accurate(**make(**shape, dtype=torch.float16))
    # the data in float32, weights and tables in another dtype
    assert_accurate(**arguments | dict(norms=tuple((weight.half(), eps) for weight, eps in weights)))
    rotate = tuple(Rotary(r.cos.half(), r.sin.half(), r.interleaved) for r in arguments["rotate"])
    assert_accurate(**arguments | dict(rotate=rotate))
    # other strides, features apart, and a row of padding
    q = arguments["q"]
    assert_accurate(**arguments | dict(q=q.transpose(1, 2).contiguous().transpose(1, 2)))
    assert_accurate(**arguments | dict(q=q.transpose(2, 3).contiguous().transpose(2, 3)))
    assert_accurate(**arguments | dict(q=torch.cat((q, q), 3)[..., :16]))
    assert_accurate(**arguments | dict(norms=((weights[0][0], 0.5), (weights[1][0], 0.25))))
    assert_accurate(**arguments)


def test_heads_of_one_feature(device, triton_backend):
    """Heads that are neighbours in memory: all other strides are multiples of 16."""
    assert_accurate(**make(B=2, N=3, M=2, H=16, Hkv=32, D=1, R=0, across=True, device=device))
