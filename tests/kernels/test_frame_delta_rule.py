"""The delta rule over frames: the oracle is the recurrence as written, in float64."""

import pytest
import torch

from diffattn.kernels import frame_delta_rule
from diffattn.kernels.frame_delta_rule import frame_delta_rule_reference

# relative Frobenius errors; rounding the output alone costs 1.7e-3, 2.1e-4 and 3e-8
BUDGET = {torch.bfloat16: 2.5e-3, torch.float16: 4e-4, torch.float32: 1e-5}
NAMES = ("o", "dq", "dk", "dv", "dbeta", "dkept")


def make_inputs(device="cpu", dtype=torch.float32, *, B=2, T=4, S=6, H=2, D=8, E=None, tables="one"):
    """(q, k, v, beta, kept), rotary. Features as SANA-WM's: nonnegative, many of them 0."""
    N = T * S
    q, k = torch.randn(2, B, N, H, D, device=device).relu().to(dtype)
    v = torch.randn(B, N, H, E or D, device=device).to(dtype)
    beta, kept = torch.rand(B, N, H, device=device), torch.rand(B, T, H, device=device)
    shape = {None: None, "one": (N, D // 2), "each": (B, N, D // 2)}[tables]
    angles = None if shape is None else torch.randn(shape, device=device)
    return (q, k, v, beta, kept), None if angles is None else (angles.cos(), angles.sin())


def rotate(x, rotary):
    if rotary is None:
        return x
    cos, sin = (t.unsqueeze(-2).to(x.dtype) for t in rotary)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


def written_out(q, k, v, beta, kept, *, rotary=None, normalize=True, scale=None, eps=1e-15):
    """Frame by frame and direction by direction, the last time over all of the frames before or after each."""
    B, N, H, D = q.shape
    T = kept.shape[1]
    S = N // T
    k = k * ((D * S) ** -0.5 if scale is None else scale)
    rq, rk = rotate(q, rotary), rotate(k, rotary)

    def frame(x, t):
        return x[:, t * S : (t + 1) * S]

    def step(state, k, v, t):
        """The state after frame t: what it kept, corrected by each of its tokens."""
        b, k, v = frame(beta, t), frame(k, t), frame(v, t)
        state = state * kept[:, t, :, None, None]
        wrong = v - torch.einsum("bhed,bshd->bshe", state, k)
        return state + torch.einsum("bsh,bshe,bshd->bhed", b, wrong, k)

    def scanned(k, v):
        zero = v.new_zeros(B, H, v.shape[3], D)
        for t in range(T):
            before, after = zero, zero
            for i in range(t + 1):
                before = step(before, k, v, i)
            for i in range(T - 1, t, -1):
                after = step(after, k, v, i)
            yield before + after

    outputs = []
    for t, (state, normalizer) in enumerate(zip(scanned(rk, v), scanned_ones(scanned, k), strict=True)):
        o = torch.einsum("bhed,bshd->bshe", state, frame(rq, t))
        if normalize:
            o = o / (torch.einsum("bhed,bshd->bshe", normalizer, frame(q, t)) + eps)
        outputs.append(o)
    return torch.cat(outputs, 1)


def scanned_ones(scanned, k):
    return scanned(k, torch.ones_like(k[..., :1]))


def run(f, inputs, grad, **options):
    inputs = [x.detach().requires_grad_() for x in inputs]
    o = f(*inputs, **options)
    return [o.detach(), *torch.autograd.grad(o, inputs, grad)]


def check(inputs, rotary, **options):
    """Output with gradients, all of those, and output without, against the recurrence in float64."""
    q, _, v, *_ = inputs
    grad = torch.randn(*q.shape[:3], v.shape[3], device=q.device).to(q.dtype)
    doubles = [x.double() for x in inputs]
    tables = None if rotary is None else tuple(t.double() for t in rotary)
    expected = run(written_out, doubles, grad.double(), rotary=tables, **options)
    actual = run(frame_delta_rule, inputs, grad, rotary=rotary, **options)
    with torch.no_grad():
        actual.append(frame_delta_rule(*inputs, rotary=rotary, **options))
    assert actual[0].dtype == q.dtype
    for name, a, e in zip((*NAMES, "o without gradients"), actual, [*expected, expected[0]], strict=True):
        assert a.shape == e.shape and a.isfinite().all(), name
        error = (a.double() - e).norm() / e.norm().clamp_min(1e-30)
        assert error <= BUDGET[q.dtype], f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("tables", [None, "one", "each"])
def test_equation(tables, normalize):
    inputs, rotary = make_inputs(dtype=torch.float64, E=6, tables=tables)
    grad = torch.randn(*inputs[0].shape[:3], 6, dtype=torch.float64)
    options = dict(rotary=rotary, normalize=normalize, eps=1e-3)
    actual, expected = (run(f, inputs, grad, **options) for f in (frame_delta_rule, written_out))
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        torch.testing.assert_close(a, e.to(a.dtype), msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("chunk_size", [21, 2])
def test_it_is_what_diffusers_computes(chunk_size):
    """Its functions, which keep float64, called as its attention modules call them."""
    wm = pytest.importorskip("diffusers.models.transformers.transformer_sana_wm")
    T, S, D = 5, 6, 8
    (q, k, v, beta, kept), (cos, sin) = make_inputs(dtype=torch.float64, T=T, S=S, D=D)
    scaled = k * (D * S) ** -0.5
    channels = [x.permute(0, 2, 3, 1) for x in (q, scaled, v, rotate(q, (cos, sin)), rotate(scaled, (cos, sin)))]
    beta_frames = beta.double().unflatten(1, (T, S)).permute(0, 3, 1, 2)
    gates = beta_frames, kept.double().transpose(1, 2)

    def flipped(x, shift=None):
        x = x.unflatten(-1, (T, S)).transpose(2, 3)
        x = x.flip(2) if shift is None else wm.flip_and_shift(x, 2, shift)
        return x.transpose(2, 3).flatten(-2)

    def both(f):
        ahead = f(*channels, *gates)
        queries, others = (0, 3), (1, 2, 4)
        back = [None] * 5
        for i in queries:
            back[i] = flipped(channels[i])
        for i in others:
            back[i] = flipped(channels[i], 0.0)
        back = f(*back, wm.flip_and_shift(gates[0], 2, 0.0), wm.flip_and_shift(gates[1], 2, 1.0))
        return [a + flipped(b) for a, b in zip(ahead, back, strict=True)]

    options = dict(chunk_size=chunk_size)
    num, den = both(lambda *x: wm.torch_chunk_sana_gdn(*x, return_components=True, **options))
    expected = (num / (den + 1e-6)).permute(0, 3, 1, 2)
    ours = frame_delta_rule(q, k, v, beta, kept, rotary=(cos, sin), eps=1e-6)
    torch.testing.assert_close(ours, expected)

    def single(q, k, v, rotated_q, rotated_k, beta, kept):
        return (wm.torch_chunk_cam_single_path_delta_rule(rotated_q, rotated_k, v, beta, kept, **options),)

    (expected,) = both(single)
    ours = frame_delta_rule(q, k, v, beta, kept, rotary=(cos, sin), normalize=False)
    torch.testing.assert_close(ours, expected.permute(0, 3, 1, 2))


SHAPES = [dict(), dict(T=1), dict(S=1, T=4), dict(B=1, H=1, D=40, S=33), dict(D=16, E=10)]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32(shape, normalize, device):
    check(*make_inputs(device, **shape), normalize=normalize, eps=1e-4)


gpu = pytest.mark.gpu
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=gpu)]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("tables", [None, "one", "each"])
@pytest.mark.parametrize("shape", [*SHAPES, dict(B=1, H=1, D=72, E=128, T=2, S=70)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels(dtype, shape, tables, normalize, device, triton_backend):
    if dtype == torch.float16 and (tables == "one") == normalize and not torch.cuda.is_available():
        pytest.skip("slow in the interpreter; float32 takes every pair of tables and normalize")
    inputs, rotary = make_inputs(device, dtype, tables=tables, **shape)
    options = dict(normalize=normalize, eps=1e-4)
    o = frame_delta_rule(*inputs, rotary=rotary, **options)
    tables = None if rotary is None else tuple(t.double() for t in rotary)
    expected = written_out(*(x.double() for x in inputs), rotary=tables, **options)
    assert o.dtype == dtype and o.is_contiguous() and o.isfinite().all()
    error = (o.double() - expected).norm() / expected.norm()
    assert error <= BUDGET[dtype], f"relative error {error:.2e}"


@gpu
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_kernels_at_the_size_of_the_model(dtype, normalize, device, triton_backend):
    """161 frames of 704 x 1280: 21 latent frames of 880 tokens, 20 heads of 112."""
    inputs, rotary = make_inputs(device, dtype, B=2, T=21, S=880, H=20, D=112)
    o = frame_delta_rule(*inputs, rotary=rotary, normalize=normalize, eps=1e-8)
    scale = (112 * 880) ** -0.5
    for i in range(2):  # in float64 a sample at a time
        one = [x[i : i + 1].double() for x in inputs]
        expected = frame_delta_rule_reference(*one, rotary=rotary, normalize=normalize, scale=scale, eps=1e-8)
        error = (o[i : i + 1].double() - expected).norm() / expected.norm()
        assert error <= BUDGET[dtype], f"relative error {error:.2e}"


def test_opcheck(device, triton_backend):
    (q, k, v, beta, kept), rotary = make_inputs(device, torch.float16, B=1, T=2, H=1)
    op = torch.ops.diffattn.frame_delta_rule.default
    checks = ("test_schema", "test_faketensor")
    for tables in ((None, None), rotary):
        torch.library.opcheck(op, (q, k, v, beta, kept, *tables, True, 0.1, 1e-6), test_utils=checks)


def test_wide_heads_and_float64_take_plain_torch(device):
    for dtype, D in ((torch.float64, 8), (torch.float32, 130)):
        inputs, _ = make_inputs(device, dtype, B=1, T=2, H=1, D=D, tables=None)
        expected = written_out(*(x.double() for x in inputs))
        o = frame_delta_rule(*inputs)
        assert (o.double() - expected).norm() <= BUDGET[torch.float32] * expected.norm()


@pytest.mark.parametrize("kernels", [False, True])
def test_strides_and_dtypes_of_gates(kernels, device, request):
    if kernels:
        request.getfixturevalue("triton_backend")
    (q, k, v, beta, kept), rotary = make_inputs(device)
    expected = frame_delta_rule(q, k, v, beta.half().float(), kept, rotary=rotary)
    apart = torch.stack((q, k, v), 2).unbind(2)
    turned = beta.half().transpose(1, 2).contiguous().transpose(1, 2)
    assert not apart[0].is_contiguous() and not turned.is_contiguous()
    actual = frame_delta_rule(*apart, turned, kept.double(), rotary=rotary)
    assert (actual - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("kernels", [False, True])
def test_tokens_without_correction_change_nothing(kernels, device, request):
    """beta 0 hides keys and values, kept 1 the frame: the others' outputs are those of a shorter video."""
    if kernels:
        request.getfixturevalue("triton_backend")
    (q, k, v, beta, kept), rotary = make_inputs(device, T=5)
    hidden = slice(12, 18)  # the third of five frames of six tokens
    beta[:, hidden], kept[:, 2] = 0, 1
    k[:, hidden], v[:, hidden] = 1e3, 1e3
    rest = torch.arange(30, device=device)
    rest = rest[(rest < 12) | (rest >= 18)]
    shorter = frame_delta_rule(
        q[:, rest], k[:, rest], v[:, rest], beta[:, rest], kept[:, [0, 1, 3, 4]],
        rotary=tuple(t[rest] for t in rotary),
    )  # fmt: skip
    longer = frame_delta_rule(q, k, v, beta, kept, rotary=rotary)[:, rest]
    assert (longer - shorter).norm() <= 1e-5 * shorter.norm()


@pytest.mark.parametrize("kernels", [False, True])
def test_autocast_changes_nothing(kernels, device, request):
    if kernels:
        request.getfixturevalue("triton_backend")
    inputs, rotary = make_inputs(device)
    expected = frame_delta_rule(*inputs, rotary=rotary)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(frame_delta_rule(*inputs, rotary=rotary), expected)


@pytest.mark.parametrize("kernels", [False, True])
def test_dead_queries_give_zero(kernels, device, request):
    """relu(q) may be 0 for a whole head: 0 / eps."""
    if kernels:
        request.getfixturevalue("triton_backend")
    (q, k, v, beta, kept), rotary = make_inputs(device)
    q[:, 3] = 0
    out = frame_delta_rule(q, k, v, beta, kept, rotary=rotary)
    assert out.isfinite().all() and not out[:, 3].any()


def test_bad_input():
    (q, k, v, beta, kept), rotary = make_inputs()
    for error, match, changed in (
        (ValueError, r"k: got shape \(2, 24, 1, 8\), expected \(2, 24, 2, 8\)", dict(k=k[:, :, :1], v=v[:, :, :1])),
        (TypeError, "beta: got NoneType", dict(beta=None)),
        (TypeError, "beta: got torch.int64", dict(beta=beta.long())),
        (ValueError, r"beta: got shape \(2, 23, 2\), expected \(2, 24, 2\)", dict(beta=beta[:, 1:])),
        (ValueError, r"kept: got shape \(2, 0, 2\)", dict(kept=kept[:, :0])),
        (ValueError, r"kept: got shape \(2, 5, 2\), .* that divide the 24 tokens", dict(kept=torch.rand(2, 5, 2))),
        (ValueError, r"kept: got shape \(2, 4\)", dict(kept=kept[..., 0])),
        (ValueError, "scale: got nan", dict(scale=float("nan"))),
        (ValueError, "eps: got -1", dict(eps=-1)),
        (ValueError, r"rotary: cos has shape \(24, 3\)", dict(rotary=tuple(t[:, :3] for t in rotary))),
    ):
        with pytest.raises(error, match=match):
            frame_delta_rule(**dict(q=q, k=k, v=v, beta=beta, kept=kept) | changed)
