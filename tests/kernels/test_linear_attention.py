"""Linear attention's kernels: shapes, feature maps, dtypes, layouts. Numbers at the edge and large sizes are in
test_linear_edges.py."""

import pytest
import torch

from diffattn import config
from diffattn.kernels._launch import padded
from diffattn.kernels.linear_attention import linear_attention, linear_attention_reference
from diffattn.kernels.linear_attention.launches import pieces
from tests.kernels.accuracy import at_odd_address
from tests.kernels.linear_oracle import (
    BUDGET,
    DTYPES,
    MAPS,
    assert_close,
    check,
    make_inputs,
    make_rotary,
    oracle,
    run,
)

HEAD_DIMS = [(d, d) for d in (4, 10, 32, 40, 64, 72, 96, 112, 128, 160, 256)]
HEAD_DIMS += [(5, 20), (20, 5), (80, 40), (160, 64), (16, 256)]
on_gpu = torch.cuda.is_available()
gpu = pytest.mark.gpu


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


def test_pieces():
    """Tiles that cover the features, with no more padding than one tile has, and none narrower than 64."""
    for features in range(1, 257):
        first, second = pieces(features)
        assert first + second >= features > (first if second else 0)
        assert first + second <= max(64, padded(features))
        assert all(width == max(64, padded(width)) for width in (first, second) if width)
    assert [pieces(features) for features in (40, 96, 160, 250)] == [(64, 0), (128, 0), (128, 64), (256, 0)]
    assert pieces(20, least=32) == (32, 0)


@pytest.mark.parametrize(("D", "E"), [(40, 96), (72, 40), (250, 200)])
@pytest.mark.parametrize("rotated", [False, True])
def test_pieces_of_both_widths(D, E, rotated, device, triton_backend):
    """One or two pieces of keys and of values, and states that are cut along E."""
    q, k, v = make_inputs(device, torch.float16, N=70, H=2, Hkv=1, D=D, E=E)
    check(q, k, v, feature_map="elu1", rotary=make_rotary(device, 70, D) if rotated else None)


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [torch.clone, channel_first, heads_first])
@pytest.mark.parametrize(
    ("N", "H", "D", "feature_map"), [(128, 2, 32, "relu"), (70, 4, 16, "elu1"), (200, 6, 8, None)]
)
def test_heads_that_share_a_tile(N, H, D, feature_map, layout, dtype, device, triton_backend):
    q, k, v = (layout(x) for x in make_inputs(device, dtype, B=2, N=N, H=H, D=D, feature_map=feature_map))
    # what one head gets is its neighbours' affair only where nothing separates 0 from 0 / 0
    check(q, k, v, feature_map=feature_map, eps=0.0)
    if on_gpu or layout is torch.clone:  # slow in the interpreter
        check(q, k, v, feature_map=feature_map)


@pytest.mark.parametrize("layout", [torch.clone, channel_first])
@pytest.mark.parametrize(("N", "D", "E"), [(128, 72, 128), (150, 128, 72), (128, 160, 160)])
def test_wide_heads(N, D, E, layout, device, triton_backend):
    """Programs share the work, and a state is cut in blocks or not, by its dtype."""
    for dtype in (torch.float16, torch.bfloat16) if on_gpu else (torch.float16,):
        check(*(layout(x) for x in make_inputs(device, dtype, N=N, H=2, Hkv=1, D=D, E=E)))


def test_slices_of_fused_projections(device, triton_backend):
    # an odd offset and a row of odd length: nothing is aligned
    fused = torch.randn(2, 90, 1 + 3 * 2 * 20, device=device, dtype=torch.float16)
    q, k, v = (x.unflatten(2, (2, 20)) for x in fused[..., 1:].chunk(3, 2))
    check(q, k, v)


@pytest.mark.parametrize("N", [100, 2100])  # one kernel without gradients, and three
def test_kept_launches_serve_only_what_they_were_made_for(N, device, triton_backend):
    """The same layouts again from odd addresses and in another dtype, then other strides."""

    def check_both(q, k, v):
        if N == 100:
            check(q, k, v)
        exact = linear_attention_reference(q.double(), k.double(), v.double())
        assert_close([linear_attention(q, k, v)], [exact], q.dtype, ["o"])

    for dtype in (torch.float16, torch.float32):
        inputs = make_inputs(device, dtype, N=N, D=16)
        check_both(*inputs)
        check_both(*map(at_odd_address, inputs))
        check_both(*inputs)
    check_both(*torch.stack(inputs, 2).unbind(2))


def test_expanded_gradient(device, triton_backend):
    q, k, v = (x.requires_grad_() for x in make_inputs(device, torch.float32, N=50, D=16))
    actual = torch.autograd.grad(linear_attention(q, k, v).sum(), (q, k, v))
    expected = oracle(q, k, v, torch.ones_like(q))[1:]
    assert_close(actual, expected, torch.float32, ("dq", "dk", "dv"))


# Memory and order


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
        # the kernels' choices for bfloat16 alone
        *(
            pytest.param(D, feature_map, torch.bfloat16, marks=gpu)
            for D in (40, 96, 128, 160)
            for feature_map in ("relu", "elu1")
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
