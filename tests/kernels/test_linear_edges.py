"""Linear attention: numbers at the edge of what a dtype holds, and sizes for a GPU."""

import math

import pytest
import torch

from diffattn import config
from diffattn.kernels.linear_attention import linear_attention
from tests.kernels.linear_oracle import DTYPES, MAPS, assert_close, check, make_inputs, make_rotary, oracle, run

gpu = pytest.mark.gpu


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


# Sizes for a GPU


@pytest.fixture
def give_memory_back():
    """Other processes test on the same GPU."""
    yield
    torch.cuda.empty_cache()


@gpu
@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize(
    ("N", "H", "D"),
    [(16384, 4, 32), (16384, 2, 40), (65536 + 17, 1, 64), (16384, 2, 96), (16384, 2, 112), (16384, 2, 128)],
)
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
