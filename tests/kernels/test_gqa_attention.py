"""Grouped-query attention: the Triton kernels and the torch paths against the equation in float64."""

import pytest
import torch
import torch.nn.functional as F

from diffattn import config
from diffattn.kernels import gqa_attention
from diffattn.kernels.gqa_attention.reference import gqa_attention_reference
from tests.kernels.accuracy import relative_error

# Relative Frobenius error of an output or a gradient. Half precision rounds the result and, before the second
# product, the probabilities: 1.63e-3 each in bfloat16, 2.0e-4 in float16, 2.3e-3 and 2.9e-4 together.
BUDGET = {torch.float32: 1e-5, torch.float16: 4e-4, torch.bfloat16: 2.5e-3}

float32, float16 = torch.float32, torch.float16
bfloat16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)
DTYPES = [float32, float16, bfloat16]

# B, N, M, H, Hkv, D, E: multi-head, grouped and multi-query; self- and cross-attention; padded and split blocks.
SHAPES = [
    (2, 1, 1, 2, 2, 4, 4),
    (1, 1, 100, 6, 1, 5, 5),
    (2, 63, 77, 4, 2, 10, 10),
    (1, 100, 77, 4, 1, 20, 20),
    (2, 100, 100, 4, 2, 40, 40),
    (1, 130, 128, 3, 3, 64, 64),
    (1, 63, 300, 4, 1, 64, 32),
    (1, 100, 63, 2, 1, 72, 72),
    (1, 64, 64, 2, 1, 80, 80),
    (1, 77, 140, 2, 2, 96, 96),
    (1, 40, 50, 2, 1, 112, 48),
    (1, 65, 63, 2, 1, 128, 128),
    (1, 33, 40, 2, 1, 160, 160),
    (1, 20, 33, 2, 1, 256, 256),
    (1, 20, 33, 2, 1, 40, 160),
]


def make(B, N, M, H, Hkv, D, E, dtype=float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, N, H, D), (B, M, Hkv, D), (B, M, Hkv, E)
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def exact(q, k, v, mask=None, scale=None):
    """The equation in float64, and its inputs there."""
    inputs = [x.detach().double().requires_grad_() for x in (q, k, v)]
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.detach().double()
    return gqa_attention_reference(*inputs, mask, scale), inputs


def rounded(q, k, v, grad, mask=None, scale=None):
    """Output and gradients in float64, rounded to the dtype of q where the kernels round."""

    def cut(x):
        return x.to(q.dtype).double()

    (H, D), Hkv = q.shape[2:], v.shape[2]
    Q, K, V, dO = (x.detach().double().transpose(1, 2) for x in (q, k, v, grad))
    K, V = (x.repeat_interleave(H // Hkv, dim=1) for x in (K, V))
    scale = D**-0.5 if scale is None else scale
    scores = Q @ K.mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.double()
    exps = (scores - scores.amax(-1, keepdim=True).clamp_min(-1e300)).exp()
    total = exps.sum(-1, keepdim=True)
    total = total.masked_fill(total == 0, 1.0)  # a query with every key masked
    out, probs = cut(exps) @ V / total, exps / total
    # The backward has the output in two parts, so delta takes no error from its rounding.
    delta = ((cut(out) + cut(out - cut(out))) * dO).sum(-1, keepdim=True)
    dS = cut(probs * (dO @ V.mT - delta))
    dk, dv = (x.unflatten(1, (Hkv, -1)).sum(2) for x in (dS.mT @ Q * scale, cut(probs).mT @ dO))
    return [cut(x.transpose(1, 2)) for x in (out, dS @ K * scale, dk, dv)]


def assert_accurate(q, k, v, mask=None, scale=None, like_rounded=False):
    """Output and gradients for a random output gradient.

    like_rounded: a budget no less than the error that the formula's own roundings make, plus 2 % for float32 sums.
    """
    out = gqa_attention(q, k, v, mask=mask, scale=scale)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    grads = torch.autograd.grad(out, (q, k, v), grad)
    expected, inputs = exact(q, k, v, mask, scale)
    expected = (expected, *torch.autograd.grad(expected, inputs, grad.double()))
    errors = [relative_error(a, b) for a, b in zip((out, *grads), expected, strict=True)]
    budgets = [BUDGET[q.dtype]] * 4
    if like_rounded:
        own = [relative_error(a, b) for a, b in zip(rounded(q, k, v, grad, mask), expected, strict=True)]
        budgets = [max(a, 1.02 * b) for a, b in zip(budgets, own, strict=True)]
    # Not "error > budget": a NaN has to fail.
    assert all(error <= budget for error, budget in zip(errors, budgets, strict=True)), (errors, budgets)
    assert out.dtype == q.dtype and [g.shape for g in grads] == [x.shape for x in (q, k, v)]


@pytest.mark.parametrize("masked", [None, "bool", "additive"])
@pytest.mark.parametrize("heads", [(6, 6), (6, 2), (6, 1)])
def test_reference_is_softmax_attention_with_repeated_heads(heads, masked):
    H, Hkv = heads
    q, k, v = (x.detach().double().requires_grad_() for x in make(2, 9, 7, H, Hkv, 8, 5))
    mask = None
    if masked == "bool":
        mask = torch.rand(2, H, 9, 7) > 0.3
        mask[..., 0] = True
    if masked == "additive":
        mask = torch.randn(2, 1, 9, 7, dtype=torch.float64, requires_grad=True)
    inputs = [x for x in (q, k, v, mask) if x is not None and x.requires_grad]
    out = gqa_attention_reference(q, k, v, mask)
    repeated = [x.repeat_interleave(H // Hkv, dim=2).transpose(1, 2) for x in (k, v)]
    expected = F.scaled_dot_product_attention(q.transpose(1, 2), *repeated, attn_mask=mask).transpose(1, 2)
    grad = torch.randn_like(out)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_matches_float64(shape, dtype, device, triton_backend):
    # Over a few numbers the same roundings add up to more or less than they do over many.
    assert_accurate(*make(*shape, dtype=dtype, device=device), like_rounded=dtype.itemsize == 2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D, E", [(16, 16), (20, 20), (32, 32), (64, 64), (32, 64), (96, 96), (160, 160), (256, 256)])
def test_triton_matches_float64_past_the_last_full_block(D, E, dtype, device, triton_backend):
    """Keys, then queries, that fill some blocks of a compiled loop and part of one more."""
    half = dtype.itemsize == 2
    assert_accurate(*make(1, 63, 300, 4, 1, D, E, dtype=dtype, device=device), like_rounded=half)
    mask = torch.arange(300, device=device) % 7 != 0
    assert_accurate(*make(2, 301, 300, 4, 2, D, E, dtype=dtype, device=device), mask, like_rounded=half)


@pytest.mark.gpu
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "D, E", [(64, 32), (32, 64), (32, 16), (64, 16), (128, 16), (128, 32), (128, 64), (72, 80), (40, 160), (256, 64)]
)
def test_triton_matches_float64_where_value_heads_differ(D, E, dtype, aligned, device, triton_backend):
    """Full blocks of keys and part of one more, through descriptors and, where rows start off 16 bytes, pointers."""
    for B, N, Hkv, mask in ((1, 63, 1, None), (2, 130, 2, torch.arange(300, device=device) % 7 != 0)):
        q, k, v = make(B, N, 300, 4, Hkv, D, E, dtype=dtype, device=device)
        if not aligned:
            k, v = (F.pad(x.detach(), (0, 1))[..., :-1].requires_grad_() for x in (k, v))
        assert_accurate(q, k, v, mask, like_rounded=dtype.itemsize == 2)
        with torch.no_grad():
            inference = gqa_attention(q, k, v, mask=mask)
        assert torch.equal(inference, gqa_attention(q, k, v, mask=mask))


@pytest.mark.parametrize("D, E, width", [(20, 5, 32), (5, 20, 32), (16, 16, 16)])
def test_keys_and_values_are_read_in_tiles_of_one_width(D, E, width, device, triton_backend, monkeypatch):
    """ptxas 12.8 reads shared memory at a wrong address where key tiles are wider than value tiles."""
    from diffattn.kernels.gqa_attention import triton_bwd, triton_fwd

    widths = []
    for module in (triton_fwd, triton_bwd):

        def recorded(*tiles, loads=module.block_loads):
            widths.extend(width for _, _, width in tiles)
            return loads(*tiles)

        monkeypatch.setattr(module, "block_loads", recorded)
    assert_accurate(*make(1, 9, 7, 2, 1, D, E, device=device))
    assert widths == [width] * 6


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_inference_gives_the_output_of_training(dtype, masked, device, triton_backend):
    q, k, v = make(2, 33, 40, 4, 2, 20, 12, dtype=dtype, device=device)
    mask = torch.arange(40, device=device) % 3 != 0 if masked else None
    with torch.no_grad():
        out = gqa_attention(q, k, v, mask=mask)
    assert not out.requires_grad
    assert torch.equal(out, gqa_attention(q, k, v, mask=mask))


@pytest.mark.parametrize("dtype", [float16, bfloat16])
def test_triton_matches_float64_at_1024_tokens(dtype, device, triton_backend):
    assert_accurate(*make(1, 1024, 1024, 2, 1, 64, 64, dtype=dtype, device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 4096, 4096, 4, 2, 64, 64), (1, 4352, 4352, 6, 2, 96, 96)], ids=str)
def test_triton_matches_float64_at_image_sizes(shape, dtype, device, triton_backend):
    assert_accurate(*make(*shape, dtype=dtype, device=device))


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("shape", SHAPES[2::3], ids=str)
def test_dispatch_matches_float64(shape, backend, device, monkeypatch):
    monkeypatch.setattr(config, "backend", backend)
    assert_accurate(*make(*shape, device=device))


@pytest.mark.parametrize("dtype", [float16, bfloat16])
def test_gradients_do_not_suffer_from_the_rounded_output(dtype, device, triton_backend):
    """delta = o . do cancels against dP where values share a mean or the softmax has a peak: o needs more bits."""
    q, k, v = make(1, 128, 256, 2, 1, 64, 64, dtype=dtype, device=device)
    assert_accurate(q, k, (v.detach() + 1).requires_grad_())
    assert_accurate((q.detach() * 2).requires_grad_(), k, v)


@pytest.mark.parametrize("masked", ["bool", "additive", "additive float32"])
@pytest.mark.parametrize("shape", [(2, 1, 1, 77), (1, 1, 100, 77), (2, 4, 100, 77), (77,), (4, 1, 1)], ids=str)
def test_masks(shape, masked, device, any_backend):
    dtype = float16 if any_backend == "triton" and masked != "additive" else float32
    q, k, v = make(2, 100, 77, 4, 2, 40, 40, dtype=dtype, device=device)
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(device)
    mask = mask > -0.5 if masked == "bool" else mask.to(float32 if "float32" in masked else dtype)
    if masked == "bool" and shape == (4, 1, 1):
        mask[:] = True
    assert_accurate(q, k, v, mask)


def test_mask_is_read_by_its_strides(device, triton_backend):
    q, k, v = make(2, 33, 40, 4, 2, 16, 16, device=device)
    mask = torch.randn(40, 4, 33, 2, device=device).permute(3, 1, 2, 0)
    assert_accurate(q, k, v, mask)
    assert_accurate(q, k, v, (mask > 0)[..., ::2].repeat_interleave(2, dim=-1))
    assert_accurate(q, k, v, mask[:, :1, :1].expand(2, 4, 33, 40))


@pytest.mark.parametrize("lowest", [False, float("-inf"), torch.finfo(float32).min])
def test_rows_with_every_key_masked(lowest, device, any_backend):
    """No key gives zeros and zero gradients; a lowest finite number is not a masked key, it gives the mean."""
    q, k, v = make(1, 40, 50, 2, 1, 16, 16, device=device)
    mask = torch.zeros(1, 1, 40, 50, dtype=torch.bool if lowest is False else float32, device=device)
    mask[...] = lowest is False
    mask[:, :, 3:7] = lowest
    out = gqa_attention(q, k, v, mask=mask)
    # torch's attention on a CPU gets the gradients of the rows that give the mean wrong: M times too large.
    if any_backend == "triton" or lowest != torch.finfo(float32).min:
        assert_accurate(q, k, v, mask)
    if lowest == torch.finfo(float32).min:
        expected = v.mean(dim=1, keepdim=True).expand(1, 4, 2, 16)
        torch.testing.assert_close(out[:, 3:7], expected)
    else:
        assert (out[:, 3:7] == 0).all()
        (dq,) = torch.autograd.grad(out.sum(), q)
        assert (dq[:, 3:7] == 0).all()
        assert (gqa_attention(q, k, v, mask=mask & False if lowest is False else mask - torch.inf) == 0).all()


def test_mask_gradient_is_given_or_refused(device, any_backend):
    q, k, v = make(2, 9, 7, 4, 2, 8, 8, device=device)
    mask = torch.randn(2, 1, 9, 7, device=device, requires_grad=True)
    if any_backend == "triton":
        with pytest.raises(RuntimeError, match="no gradient for mask"):
            gqa_attention(q, k, v, mask=mask)
        with torch.no_grad():
            gqa_attention(q, k, v, mask=mask)
        return
    grad = torch.randn(2, 9, 4, 8, device=device)
    (actual,) = torch.autograd.grad(gqa_attention(q, k, v, mask=mask), mask, grad)
    copy = mask.detach().double().requires_grad_()
    expected = gqa_attention_reference(*(x.detach().double() for x in (q, k, v)), copy)
    (expected,) = torch.autograd.grad(expected, copy, grad.double())
    assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize("scale", [1.0, 0.05, -0.3, 0.0])
def test_scale(scale, device, any_backend):
    q, k, v = make(1, 33, 40, 2, 1, 16, 16, device=device)
    if scale:
        assert_accurate(q, k, v, scale=scale)
    else:
        expected = v.mean(dim=1, keepdim=True).expand(1, 33, 2, 16)
        torch.testing.assert_close(gqa_attention(q, k, v, scale=scale), expected)


@pytest.mark.parametrize("aligned", [True, False])
def test_strided_inputs(aligned, device, any_backend):
    """Slices of a fused projection and (B, H, N, D) storage, where rows start on 16 bytes and where they do not."""
    B, N, H, Hkv, D = 2, 50, 4, 2, 32
    fused = torch.randn(B, N, (H + 2 * Hkv) * D + (0 if aligned else 1), device=device, requires_grad=True)
    q, k, v = (
        x.unflatten(-1, (-1, D)) for x in fused[..., : (H + 2 * Hkv) * D].split((H * D, Hkv * D, Hkv * D), dim=-1)
    )
    assert_accurate(q, k, v)
    assert_accurate(q, *(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)))
    assert_accurate(q, *(x.transpose(2, 3).contiguous().transpose(2, 3) for x in (k, v)))
    assert_accurate(q.flip(1), k[:, ::2], v[:, ::2])
    assert_accurate(q, k[:1].expand(B, -1, -1, -1), v[:, :1].expand(-1, N, -1, -1))


def test_output_gradient_may_be_expanded(device, triton_backend):
    q, k, v = make(1, 33, 40, 2, 1, 16, 16, device=device)
    grads = torch.autograd.grad(gqa_attention(q, k, v).sum(), (q, k, v))
    expected, inputs = exact(q, k, v)
    for a, b in zip(grads, torch.autograd.grad(expected.sum(), inputs), strict=True):
        assert (a.double() - b).abs().max() < 1e-5


@pytest.mark.parametrize("N, M", [(0, 5), (5, 0)])
def test_no_queries_or_no_keys(N, M, device, any_backend):
    q, k, v = make(2, N, M, 4, 2, 8, 8, device=device)
    out = gqa_attention(q, k, v)
    assert out.shape == (2, N, 4, 8) and (out == 0).all()
    for grad, x in zip(torch.autograd.grad(out.sum(), (q, k, v)), (q, k, v), strict=True):
        assert grad.shape == x.shape and (grad == 0).all()


def test_large_float16_inputs_stay_finite(device, any_backend):
    q, k, v = make(1, 70, 90, 2, 1, 64, 64, dtype=float16, device=device)
    q, k, v = (x.detach().sign().mul_(300).requires_grad_() for x in (q, k, v))
    out = gqa_attention(q, k, v)
    assert out.isfinite().all()
    expected, _ = exact(q, k, v)
    assert relative_error(out, expected) < BUDGET[float16]
    if any_backend == "triton":
        # dP reaches 300 * 300 * 64 on the way, past float16's 65504.
        q.data.mul_(1e-5)
        for grad in torch.autograd.grad(gqa_attention(q, k, v, scale=1e-3), (q, k, v), torch.full_like(out, 300.0)):
            assert grad.isfinite().all()


def test_small_float16_probabilities_keep_their_precision(device, triton_backend):
    """1 / M and dP / M are subnormal numbers of float16 here, with an error of a tenth and more."""
    q, k, v = make(1, 16, 1024, 1, 1, 16, 16, dtype=float16, device=device)
    q, v = (q.detach() * 0.1).requires_grad_(), (v.detach() * 0.01).requires_grad_()
    out = gqa_attention(q, k, v)
    grad = torch.randn_like(out) * 1e-2
    grads = torch.autograd.grad(out, (k, v), grad)
    expected, inputs = exact(q, k, v)
    expected = torch.autograd.grad(expected, inputs[1:], grad.double())
    # The gradients themselves are subnormal, so the bound is half a unit in their last place, and the budget.
    for a, b in zip(grads, expected, strict=True):
        assert (a.double() - b).abs().max() <= 2.0**-25 + 4e-3 * b.abs().max()


@pytest.mark.parametrize("masked", [False, True])
def test_every_element_is_written(masked, device, triton_backend, poisoned_memory):
    mask = torch.arange(70, device=device) < 60 if masked else None
    assert_accurate(*make(2, 50, 70, 4, 2, 20, 40, dtype=float16, device=device), mask)


@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_repeat_bit_for_bit(dtype, device, triton_backend):
    q, k, v = make(2, 150, 77, 4, 2, 40, 40, dtype=dtype, device=device)
    grad = torch.randn(2, 150, 4, 40, device=device).to(dtype)
    runs = []
    for _ in range(2):
        out = gqa_attention(q, k, v)
        runs.append((out, *torch.autograd.grad(out, (q, k, v), grad)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
@pytest.mark.slow
def test_offsets_beyond_32_bits(device, triton_backend):
    """More than 2 ** 31 elements of q and out; then keys whose rows are 2 ** 26 elements apart."""
    N = 2**20 + 64
    q = torch.randn(1, N, 32, 64, dtype=float16, device=device)
    k, v = (torch.randn(1, 64, 1, 64, dtype=float16, device=device) for _ in range(2))
    out = gqa_attention(q, k, v)
    expected, _ = exact(q[:, -64:], k, v)
    assert relative_error(out[:, -64:], expected) < BUDGET[float16]
    del q, out

    storage = torch.empty(2**26 * 40, dtype=float16, device=device)
    q = torch.randn(1, 64, 2, 64, dtype=float16, device=device)
    for offset in (0, 64, 129):
        k, v = (torch.as_strided(storage, (1, 40, 1, 64), (0, 2**26, 64, 1), offset + 256 * i) for i in range(2))
        k.normal_(), v.normal_()
        expected, _ = exact(q, k, v)
        assert relative_error(gqa_attention(q, k, v), expected) < BUDGET[float16]


@pytest.mark.parametrize("E", [16, 24])
def test_autocast_keeps_dtype_and_the_reference(E, any_backend, device):
    """Where E is not D, plain torch runs the equation, whose products autocast would round."""
    q, k, v = (torch.randn(2, 20, 2, n, device=device) for n in (16, 16, E))
    expected = gqa_attention(q, k, v)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = gqa_attention(q, k, v)
    assert out.dtype == q.dtype
    if E == 24:
        assert torch.equal(out, expected)
