"""Linear attention: the oracle is the reference in float64 on the same rounded inputs."""

import math

import pytest
import torch
from diffusers.models.attention_processor import Attention, SanaLinearAttnProcessor2_0

from diffattn import config
from diffattn.kernels import _backend
from diffattn.kernels.linear_attention import linear_attention, linear_attention_reference

MAPS = ("relu", "elu1", "softmax", None)
# relative Frobenius errors; rounding the output alone costs 1.7e-3, 2.1e-4 and 3e-8
BUDGET = {torch.bfloat16: 2.5e-3, torch.float16: 4e-4, torch.float32: 1e-5}
HEAD_DIMS = [(d, d) for d in (4, 10, 32, 40, 64, 72, 96, 112, 128, 160, 256)]
HEAD_DIMS += [(5, 20), (20, 5), (80, 40), (160, 64), (16, 256)]
on_gpu = torch.cuda.is_available()
gpu = pytest.mark.gpu
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=gpu)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_inputs(device, dtype, *, B=1, N=100, M=None, H=2, Hkv=None, D=32, E=None, feature_map="relu"):
    M, Hkv, E = M or N, Hkv or H, E or D
    q, k, v = (
        torch.randn(shape, device=device, dtype=dtype) for shape in ((B, N, H, D), (B, M, Hkv, D), (B, M, Hkv, E))
    )
    return (q.abs(), k.abs(), v) if feature_map is None else (q, k, v)


def make_rotary(device, N, D, *, B=None, dtype=torch.float32):
    angles = 6.3 * torch.rand((N, D // 2) if B is None else (B, N, D // 2), device=device)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def run(f, q, k, v, grad, **options):
    """[o, dq, dk, dv]"""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    o = f(q, k, v, **options)
    return [o.detach(), *torch.autograd.grad(o, (q, k, v), grad)]


def oracle(q, k, v, grad, *, rotary=None, **options):
    rotary = rotary and tuple(x.double() for x in rotary)
    q, k, v, grad = (x.double() for x in (q, k, v, grad))
    return run(linear_attention_reference, q, k, v, grad, rotary=rotary, **options)


def assert_close(actual, expected, dtype, names=("o", "dq", "dk", "dv")):
    for name, a, e in zip(names, actual, expected, strict=True):
        assert a.shape == e.shape
        assert a.dtype == dtype
        assert a.isfinite().all(), name
        error = (a.double() - e).norm() / e.norm().clamp_min(1e-30)
        assert error <= BUDGET[dtype], f"{name}: relative error {error:.2e}"


def check(q, k, v, **options):
    """Output and gradients of the kernels against the oracle."""
    grad = torch.randn(*q.shape[:3], v.shape[3], device=q.device, dtype=q.dtype)
    actual = run(linear_attention, q, k, v, grad, **options)
    assert_close(actual, oracle(q, k, v, grad, **options), q.dtype)
    return actual


# The reference, against code that is not ours


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


# The kernels: shapes, maps, dtypes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("feature_map", MAPS)
def test_maps(feature_map, rotated, dtype, device, triton_backend):
    q, k, v = make_inputs(device, dtype, N=150, H=2, Hkv=1, D=40, feature_map=feature_map)
    rotary = make_rotary(device, 150, 40) if rotated else None
    check(q, k, v, feature_map=feature_map, rotary=rotary)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=gpu)])
@pytest.mark.parametrize(("D", "E"), HEAD_DIMS)
def test_head_dims(D, E, dtype, device, triton_backend):
    feature_map = "elu1" if D % 3 == 1 else "relu"
    check(*make_inputs(device, dtype, N=40, H=1, D=D, E=E), feature_map=feature_map)


@pytest.mark.parametrize("feature_map", ["relu", "softmax"])
@pytest.mark.parametrize(("D", "E"), [(4, 5), (96, 64), (64, 128), (128, 160)])
def test_head_dims_float32(D, E, feature_map, device, triton_backend):
    q, k, v = make_inputs(device, torch.float32, N=40, H=1, D=D, E=E)
    check(q, k, v, feature_map=feature_map, rotary=make_rotary(device, 40, D) if D == 96 else None)


@pytest.mark.parametrize("feature_map", ["relu", "softmax"])
@pytest.mark.parametrize(("N", "M"), [(1, 300), (63, 100), (100, 2), (1024, 1024), (200, 1025)])
def test_lengths(N, M, feature_map, device, triton_backend):
    check(*make_inputs(device, torch.float16, B=2, N=N, M=M, H=1, D=20), feature_map=feature_map)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature_map", ["relu", "softmax"])
@pytest.mark.parametrize("N", [1, 40])
def test_one_key(N, feature_map, dtype, device, triton_backend):
    """Every row is the value of the one key (for "softmax" too), whatever q and k are."""
    q, k, v = make_inputs(device, dtype, N=N, M=1, H=2, Hkv=1, D=20, feature_map=None)
    grad = torch.randn_like(q)
    o, dq, dk, dv = run(linear_attention, q, k, v, grad, feature_map=feature_map)
    expected = oracle(q, k, v, grad, feature_map=feature_map)
    assert_close([o, dv], [expected[0], expected[3]], dtype, ("o", "dv"))
    # zero, but as the difference of two terms of the size of v g / q
    assert dq.norm() < BUDGET[dtype] * grad.norm()
    assert dk.norm() < BUDGET[dtype] * grad.norm()


@pytest.mark.parametrize("kv_heads", [1, 3, 6])
@pytest.mark.parametrize("feature_map", ["elu1", "softmax"])
def test_kv_heads(kv_heads, feature_map, device, triton_backend):
    q, k, v = make_inputs(device, torch.float32, B=2, N=140, M=70, H=6, Hkv=kv_heads, D=16, E=24)
    check(q, k, v, feature_map=feature_map)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("feature_map", "eps"), [("elu1", 1e-4), ("relu", 0.5), ("softmax", 0.5)])
def test_mean_normalizer(feature_map, eps, dtype, device, triton_backend):
    q, k, v = make_inputs(device, dtype, N=90, M=130, D=40)
    check(q, k, v, feature_map=feature_map, eps=eps, normalizer="mean")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize(
    ("N", "M", "H", "Hkv", "D", "E"),
    [(100, 100, 2, 2, 32, 32), (63, 130, 3, 3, 16, 16), (130, 63, 2, 2, 40, 24), (64, 256, 4, 2, 32, 32),
     (33, 20, 2, 2, 72, 80), (2049, 100, 1, 1, 8, 8), (50, 2049, 2, 2, 8, 8)],
)  # fmt: skip
def test_without_gradients(N, M, H, Hkv, D, E, feature_map, dtype, device, triton_backend):
    """Few tokens take one kernel for all; packed heads, odd lengths and the limit between the kernels."""
    B = 1 if max(N, M) > 2048 else 2
    q, k, v = make_inputs(device, dtype, B=B, N=N, M=M, H=H, Hkv=Hkv, D=D, E=E, feature_map=feature_map)
    options = dict(feature_map=feature_map, eps=1e-6)
    expected = linear_attention_reference(*(x.double() for x in (q, k, v)), **options)
    assert_close([linear_attention(q, k, v, **options)], [expected], dtype, ["o"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rotary_per_sample_in_model_dtype(dtype, device, triton_backend):
    q, k, v = make_inputs(device, dtype, B=2, N=70, H=2, Hkv=1, D=20)
    cos, sin = make_rotary(device, 70, 20, B=2, dtype=dtype)
    check(q, k, v, rotary=(cos, sin))
    # the two need not share strides
    check(q, k, v, rotary=(cos.mT.contiguous().mT, sin))


def test_rotary_is_constant(device, triton_backend):
    q, k, v = make_inputs(device, torch.float32, N=20, D=16)
    rotary = [x.requires_grad_() for x in make_rotary(device, 20, 16)]
    for backend in ("triton", "torch"):
        config.backend = backend
        assert not linear_attention(q, k, v, rotary=rotary).requires_grad


# Layouts


def channel_first(x):
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def heads_first(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("layout", [channel_first, heads_first])
@pytest.mark.parametrize("D", [32, 40])
def test_strides(layout, D, device, triton_backend):
    q, k, v = (layout(x) for x in make_inputs(device, torch.float16, B=2, N=150, H=3, D=D))
    assert not q.is_contiguous()
    grad = layout(torch.randn(q.shape, device=device, dtype=q.dtype))
    assert_close(run(linear_attention, q, k, v, grad), oracle(q, k, v, grad), q.dtype)


def test_slices_of_fused_projections(device, triton_backend):
    # an odd offset and a row of odd length: nothing is aligned
    fused = torch.randn(2, 90, 1 + 3 * 2 * 20, device=device, dtype=torch.float16)
    q, k, v = (x.unflatten(2, (2, 20)) for x in fused[..., 1:].chunk(3, 2))
    check(q, k, v)


def test_expanded_gradient(device, triton_backend):
    q, k, v = (x.requires_grad_() for x in make_inputs(device, torch.float32, N=50, D=16))
    actual = torch.autograd.grad(linear_attention(q, k, v).sum(), (q, k, v))
    expected = oracle(q, k, v, torch.ones_like(q))[1:]
    assert_close(actual, expected, torch.float32, ("dq", "dk", "dv"))


# Numbers at the edge


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_dead_rows_are_zero(backend, device, triton_backend):
    config.backend = backend
    q, k, v = make_inputs(device, torch.float32, B=2, N=80, D=20)
    q[:, 7] = -1.0
    k[1] = -1.0
    grad = torch.randn_like(q)
    actual = run(linear_attention, q, k, v, grad)
    assert_close(actual, oracle(q, k, v, grad), torch.float32)
    assert (actual[0][:, 7] == 0).all()
    assert (actual[0][1] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature_map", ["relu", "elu1"])
def test_normalizer_near_zero(feature_map, dtype, device, triton_backend):
    # phi(q) . z of about 1e-9: eps = 1e-15 is nothing beside it and must stay so
    q, k, v = make_inputs(device, dtype, N=80, D=32)
    q, k = (q * 1e-5, k * 1e-5) if feature_map == "relu" else (q - 12, k - 12)
    check(q, k, v, feature_map=feature_map)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dead_key_features(dtype, device, triton_backend):
    # no key has feature 3, and one query has no other: its denominator is eps and the gradient of S there is 1e15
    q, k, v = make_inputs(device, dtype, N=80, D=16)
    k[..., 3] = -1.0
    q[:, 5] = -1.0
    q[:, 5, :, 3] = 1.0
    check(q, k, v)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("feature_map", ["relu", "elu1", "softmax"])
def test_absent_keys(feature_map, rotated, backend, device, triton_backend):
    """Keys of -inf are as if they were not there, get no gradient, and rows without any key are 0."""
    config.backend = backend
    q, k, v = make_inputs(device, torch.float32, B=2, N=90, D=16)
    rotary = make_rotary(device, 90, 16) if rotated else None
    absent = torch.rand(90, device=device) < 0.4
    k[0, absent] = -math.inf
    k[1] = -math.inf
    grad = torch.randn_like(q)
    o, dq, dk, dv = run(linear_attention, q, k, v, grad, feature_map=feature_map, rotary=rotary)
    for x in (o[1], dq[1], dk[1], dv[1], dk[0, absent], dv[0, absent]):
        assert (x == 0).all()
    if rotated:
        expected = oracle(q[:1], k[:1], v[:1], grad[:1], feature_map=feature_map, rotary=rotary)
        assert_close([x[:1] for x in (o, dq, dk, dv)], expected, torch.float32)
    else:
        present = ~absent
        expected = oracle(q[:1], k[:1, present], v[:1, present], grad[:1], feature_map=feature_map)
        assert_close([o[:1], dq[:1], dk[:1, present], dv[:1, present]], expected, torch.float32)


@pytest.mark.parametrize("feature_map", ["relu", "elu1", "softmax"])
@pytest.mark.parametrize("rotated", [False, True])
def test_large_float16(feature_map, rotated, device, triton_backend):
    # S reaches 1e7 and more, 65504 is the largest float16
    q, k, v = (300 * x.clamp(-1, 1) for x in make_inputs(device, torch.float16, N=300, D=32))
    check(q, k, v, feature_map=feature_map, rotary=make_rotary(device, 300, 32) if rotated else None)


def test_nan_is_not_hidden(device, triton_backend):
    q, k, v = make_inputs(device, torch.float32, N=40, D=16)
    q[0, 3, 0, 2] = math.nan
    o = linear_attention(q, k, v)
    assert o[0, 3, 0].isnan().all()
    assert o.isnan().sum() == o.shape[3]


# Memory and order


@pytest.fixture
def poisoned_memory():
    """`torch.empty` returns NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.mark.parametrize(
    ("feature_map", "rotated", "E"),
    [("relu", False, 20), ("softmax", False, 20), ("softmax", True, 20), ("elu1", True, 80)],
)
def test_every_element_is_written(feature_map, rotated, E, device, triton_backend, poisoned_memory):
    # in float32 a head of 128 x 80 is cut in two
    D = 20 if E == 20 else 128
    q, k, v = make_inputs(device, torch.float32, N=90, D=D, E=E)
    assert torch.empty(3, device=device).isnan().all()
    grad = torch.randn(1, 90, 2, E, device=device)
    rotary = make_rotary(device, 90, D) if rotated else None
    for x in run(linear_attention, q, k, v, grad, feature_map=feature_map, rotary=rotary):
        assert x.isfinite().all()


@pytest.mark.parametrize(
    ("D", "feature_map", "dtype"),
    [
        (20, "elu1", torch.float16),
        pytest.param(20, None, torch.float32, marks=gpu),
        *(
            pytest.param(D, feature_map, dtype, marks=gpu)
            for D in (32, 64, 128, 256)
            for feature_map in ("relu", "softmax", None)
            for dtype in (torch.float16, torch.bfloat16)
        ),
    ],
)
def test_same_bits_every_time(D, feature_map, dtype, device, triton_backend):
    # a race in a pipelined loop may cost too little accuracy to be seen otherwise
    N, H = (5000, 8) if on_gpu else (300, 4)
    q, k, v = make_inputs(device, dtype, N=N, H=H, Hkv=2, D=D, feature_map=feature_map)
    grad = torch.randn_like(q)
    first = run(linear_attention, q, k, v, grad, feature_map=feature_map)
    for _ in range(10 if on_gpu else 1):
        again = run(linear_attention, q, k, v, grad, feature_map=feature_map)
        assert [torch.equal(a, b) for a, b in zip(first, again, strict=True)] == [True] * 4


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize(("N", "M"), [(0, 5), (5, 0), (0, 0)])
def test_no_tokens(N, M, feature_map, backend, device, triton_backend):
    config.backend = backend
    shapes = (2, N, 2, 4), (2, M, 1, 4), (2, M, 1, 3)
    q, k, v = (torch.randn(s, device=device, requires_grad=True) for s in shapes)
    o = linear_attention(q, k, v, feature_map=feature_map)
    assert o.shape == (2, N, 2, 3)
    assert (o == 0).all()
    o.sum().backward()
    for x in (q, k, v):
        assert x.grad.shape == x.shape
        assert (x.grad == 0).all()


# The operator


def op_arguments(device, feature_map, rotated, normalizer, E=16):
    q, k, v = (x.requires_grad_() for x in make_inputs(device, torch.float32, N=40, H=2, Hkv=1, D=16, E=E))
    q = heads_first(q.detach()).requires_grad_()
    cos, sin = make_rotary(device, 40, 16) if rotated else (None, None)
    return q, k, v, cos, sin, feature_map, normalizer, 1e-4


@pytest.mark.parametrize(
    ("feature_map", "rotated", "normalizer"), [("relu", True, "sum"), ("softmax", False, "sum"), (None, False, "mean")]
)
def test_opcheck(feature_map, rotated, normalizer, device, triton_backend):
    arguments = op_arguments(device, feature_map, rotated, normalizer)
    torch.library.opcheck(torch.ops.diffattn.linear_attention.default, arguments)
    arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    o, state = torch.ops.diffattn.linear_attention(*arguments)
    grad = heads_first(torch.randn_like(o))
    q, k, v, cos, sin, *options = arguments
    torch.library.opcheck(
        torch.ops.diffattn.linear_attention_backward.default, (grad, q, k, v, cos, sin, state, *options)
    )


@pytest.mark.parametrize(
    ("feature_map", "rotated", "backend"),
    [("relu", True, "triton"), ("softmax", False, "triton"), ("softmax", True, "torch")],
)
def test_compiles_once(feature_map, rotated, backend, device, triton_backend):
    config.backend = backend
    torch._dynamo.reset()

    def f(q, k, v, rotary):
        return linear_attention(2 * q, k, v, feature_map=feature_map, rotary=rotary, normalizer="mean") + 1

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for N in (40, 33, 70):
            q, k, v = make_inputs(device, torch.float32, N=N, D=16)
            grad = torch.randn_like(q)
            rotary = make_rotary(device, N, 16) if rotated else None
            actual = run(lambda *qkv: compiled(*qkv, rotary), q, k, v, grad)  # noqa: B023
            expected = run(lambda *qkv: f(*qkv, rotary), q, k, v, grad)  # noqa: B023
            torch.testing.assert_close(actual, expected)


@pytest.mark.skipif(on_gpu, reason="about tensors on a CPU")
def test_operator_on_a_cpu_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(_backend, "_INTERPRETING", False)
    q, k, v = make_inputs("cpu", torch.float32, N=5, D=4)
    with pytest.raises(RuntimeError, match="needs a CUDA device"):
        torch.ops.diffattn.linear_attention(q, k, v, None, None, "relu", "sum", 1e-15)
    # the function does not need one
    assert linear_attention(q, k, v).isfinite().all()


def test_onnx_keeps_dead_rows_at_zero(tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")

    class Core(torch.nn.Module):
        def forward(self, q, k, v):
            return linear_attention(q, k, v), linear_attention(q, k, v, feature_map=None)

    q, k, v = make_inputs("cpu", torch.float32, N=16, H=2, Hkv=1, D=8)
    q[:, 3] = -1.0
    q, k = q.relu(), k.relu()
    length = {1: torch.export.Dim.DYNAMIC}
    path = str(tmp_path / "core.onnx")
    torch.onnx.export(Core(), (q, k, v), path, dynamo=True, dynamic_shapes=(length, length, length), verbose=False)
    session = onnxruntime.InferenceSession(path)
    for n in (16, 11):
        inputs = [x[:, :n] for x in (q, k, v)]
        names = [i.name for i in session.get_inputs()]
        outputs = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
        for actual, expected in zip(outputs, Core()(*inputs), strict=True):
            torch.testing.assert_close(torch.from_numpy(actual), expected)


@pytest.mark.parametrize("config_backend", ["auto", "triton"])
def test_export_takes_torch(config_backend, device, triton_backend):
    config.backend = config_backend

    class Core(torch.nn.Module):
        def forward(self, q, k, v):
            return linear_attention(q, k, v)

    q, k, v = make_inputs(device, torch.float32, N=16, D=8)
    program = torch.export.export(Core(), (q, k, v))
    assert "diffattn" not in program.graph_module.code
    torch.testing.assert_close(program.module()(q, k, v), linear_attention(q, k, v))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_autocast_changes_nothing(backend, compiled, device, triton_backend):
    config.backend = backend
    q, k, v = make_inputs(device, torch.float32, N=40, D=16)
    f = torch.compile(linear_attention, fullgraph=True, backend="aot_eager") if compiled else linear_attention
    with torch.autocast(device, dtype=torch.bfloat16):
        o = f(q, k, v)
    assert_close([o], [linear_attention_reference(q.double(), k.double(), v.double())], torch.float32, ("o",))


# Bad input


def tensors(**changes):
    shapes = dict(q=(2, 6, 4, 8), k=(2, 6, 2, 8), v=(2, 6, 2, 5))
    return {name: changes.get(name, torch.zeros(shape)) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(q=[1.0]), TypeError, r"q: got list, expected a tensor \(B, N, H, D\)"),
        (dict(k=torch.zeros(2, 6, 2, 8, dtype=torch.int64)), TypeError, "k: got torch.int64, expected one of"),
        (dict(v=torch.zeros(2, 6, 5)), ValueError, r"v: got shape \(2, 6, 5\), expected \(B, M, Hkv, E\)"),
        (dict(k=torch.zeros(2, 6, 2, 8).half()), ValueError, "k: got torch.float16, expected torch.float32 as q"),
        (dict(v=torch.zeros(2, 6, 2, 5, device="meta")), ValueError, "v: on meta, expected cpu as q"),
        (dict(k=torch.zeros(1, 6, 2, 8)), ValueError, r"k: got shape \(1, 6, 2, 8\), expected \(2, M, Hkv, 8\)"),
        (dict(k=torch.zeros(2, 6, 2, 4)), ValueError, r"k: got shape \(2, 6, 2, 4\), expected \(2, M, Hkv, 8\)"),
        (dict(k=torch.zeros(2, 6, 3, 8)), ValueError, "k: got 3 heads, expected a divisor of the 4 heads of q"),
        (dict(v=torch.zeros(2, 7, 2, 5)), ValueError, r"v: got shape \(2, 7, 2, 5\), expected \(2, 6, 2\) \+ \(E,\)"),
        (dict(q=torch.zeros(2, 6, 4, 0)), ValueError, "at least one head and one feature"),
        (dict(feature_map="gelu"), ValueError, r"feature_map: got 'gelu', expected one of \('relu', 'elu1'"),
        (dict(normalizer="max"), ValueError, r"normalizer: got 'max', expected one of \('sum', 'mean'\)"),
        (dict(eps="0"), TypeError, "eps: got str, expected a number"),
        (dict(eps=-1.0), ValueError, "eps: got -1.0, expected 0 or more"),
        (dict(rotary=torch.zeros(6, 4)), TypeError, r"rotary: got Tensor, expected a pair of tensors \(cos, sin\)"),
        (dict(rotary=(torch.zeros(6, 4), None)), TypeError, "rotary: sin is NoneType, expected a tensor"),
        (dict(rotary=(torch.zeros(6, 8),) * 2), ValueError, r"rotary: cos has shape \(6, 8\), expected \(6, 4\) or"),
        (dict(rotary=(torch.zeros(6, 4), torch.zeros(2, 6, 4))), ValueError, "expected them alike"),
    ],
)
def test_bad_input(changes, error, message):
    options = {name: x for name, x in changes.items() if name not in ("q", "k", "v")}
    with pytest.raises(error, match=message):
        linear_attention(**tensors(**changes), **options)


def test_bad_rotary_lengths():
    angles = torch.zeros(6, 4)
    with pytest.raises(ValueError, match="rotary: got N = 6 queries and M = 7 keys, expected N = M"):
        linear_attention(**tensors(k=torch.zeros(2, 7, 2, 8), v=torch.zeros(2, 7, 2, 5)), rotary=(angles, angles))
    with pytest.raises(ValueError, match="rotary: q has 7 features, expected an even number"):
        linear_attention(**tensors(q=torch.zeros(2, 6, 4, 7), k=torch.zeros(2, 6, 2, 7)), rotary=(angles, angles))


def test_wide_heads_and_float64_take_torch(device):
    q, k, v = make_inputs(device, torch.float32, N=5, H=1, D=300)
    torch.testing.assert_close(linear_attention(q, k, v), linear_attention_reference(q, k, v))
    assert linear_attention(q.double(), k.double(), v.double()).dtype == torch.float64


# Sizes for a GPU


@pytest.fixture
def give_memory_back():
    """Other processes test on the same GPU."""
    yield
    torch.cuda.empty_cache()


@gpu
@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize(("N", "H", "D"), [(16384, 4, 32), (65536 + 17, 1, 64), (16384, 2, 112), (16384, 2, 128)])
def test_many_tokens(N, H, D, feature_map, device, triton_backend, give_memory_back):
    q, k, v = make_inputs(device, torch.bfloat16, N=N, H=H, D=D, feature_map=feature_map)
    rotary = make_rotary(device, N, D) if D == 112 else None
    check(q, k, v, feature_map=feature_map, rotary=rotary)


@gpu
@pytest.mark.parametrize("feature_map", ["relu", "softmax"])
def test_peak_memory(feature_map, device, triton_backend, give_memory_back):
    """Nothing of the length of the sequence is kept but outputs and gradients."""
    q, k, v = (x.requires_grad_() for x in make_inputs(device, torch.bfloat16, N=65536, H=16, D=64))
    size = q.numel() * q.element_size()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    o = linear_attention(q, k, v, feature_map=feature_map)
    assert torch.cuda.max_memory_allocated() - before < 1.25 * size
    o.backward(torch.randn_like(o))
    # o, the gradient of o, dq, dk, dv
    assert torch.cuda.max_memory_allocated() - before < 5.25 * size


@gpu
@pytest.mark.slow
def test_inputs_beyond_32_bits(device, triton_backend, give_memory_back):
    # 4.3 GB: the second head of each starts 2^31 elements after the first
    N, D, stride = 200, 64, 2**31
    memory = torch.empty(stride + 4 * N * D, device=device, dtype=torch.bfloat16)
    q, k, v, grad = (memory[i * N * D :].as_strided((1, N, 2, D), (0, D, stride, 1)) for i in range(4))
    for x in (q, k, v, grad):
        x.copy_(torch.randn(x.shape))
    assert_close(run(linear_attention, q, k, v, grad), oracle(q, k, v, grad), q.dtype)


@gpu
@pytest.mark.slow
def test_outputs_beyond_32_bits(device, triton_backend, give_memory_back):
    # 2.2e9 elements (4.3 GB) each of o, dq, dk and dv; all heads are alike
    N, H, D = 8192 + 64, 4096, 64
    heads = torch.randn(4, 1, N, 1, D, device=device, dtype=torch.bfloat16)
    q, k, v, grad = heads.expand(4, 1, N, H, D)
    assert q.numel() > 2**31
    o, *gradients = (x[:, :, -1:] for x in run(linear_attention, q, k, v, grad))
    assert_close([o, *gradients], oracle(*heads), torch.bfloat16)
