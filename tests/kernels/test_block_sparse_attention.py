"""Block-sparse attention: lists of blocks, the Triton kernels and the torch paths against the equations in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from diffattn import config
from diffattn.kernels import block_sparse_attention, linear_attention_outside, window_attention
from diffattn.kernels.block_sparse_attention import Blocks, blocks_of_layout, number_of_blocks, pooled, top_blocks
from diffattn.kernels.block_sparse_attention.blocks import kinds_of, lists_of_queries, pairs_of
from diffattn.kernels.block_sparse_attention.reference import block_sparse_attention_reference, near
from diffattn.kernels.block_sparse_attention.window import _plan
from tests.kernels.accuracy import relative_error
from tests.kernels.test_gqa_attention import rounded

# Relative Frobenius error of an output or a gradient, as for gqa_attention: half precision rounds the result and,
# before the second product, the weights.
BUDGET = {torch.float32: 1e-5, torch.float16: 4e-4, torch.bfloat16: 2.5e-3}

float32, float16 = torch.float32, torch.float16
bfloat16 = pytest.param(torch.bfloat16, marks=pytest.mark.gpu)
DTYPES = [float32, float16, bfloat16]

# B, N, M, H, Hkv, D, E, rows, keys: short blocks, one block, shared heads, tiles smaller than blocks.
SHAPES = [
    (1, 1, 1, 1, 1, 4, 4, 16, 16),
    (2, 37, 50, 4, 2, 20, 24, 16, 32),
    (1, 70, 129, 2, 1, 40, 40, 64, 64),
    (1, 128, 64, 2, 2, 64, 64, 64, 16),
    (1, 20, 40, 2, 1, 256, 256, 64, 32),
]
# What a GPU has time for.
LARGE = [(1, 300, 200, 2, 2, d, d, r, m) for d, r, m in ((72, 64, 128), (96, 128, 64), (128, 128, 128), (160, 64, 64))]
SHAPES += [pytest.param(shape, marks=pytest.mark.gpu) for shape in LARGE]


def make(B, N, M, H, Hkv, D, E, rows, keys, dtype=float32, device="cpu", mapped=False):
    """q, k, v and lists that differ from head to head; a block of queries may attend to nothing, or to all."""
    generator = torch.Generator().manual_seed(0)
    shapes = (B, N, H, D), (B, M, Hkv, D), (B, M, Hkv, E)
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    if mapped:
        q, k = q.softmax(-1), k.softmax(-1)
    layout = torch.rand(B, H, number_of_blocks(N, rows), number_of_blocks(M, keys), generator=generator) < 0.5
    blocks = blocks_of_layout(layout.to(device), rows, keys)
    return *(x.to(device, dtype).requires_grad_() for x in (q, k, v)), blocks


def doubled(*tensors):
    return [x.detach().double().requires_grad_() for x in tensors]


def exact(function, q, k, v):
    """What a function of q, k, v gives in float64 by plain torch, and its inputs there."""
    inputs = doubled(q, k, v)
    before, config.backend = config.backend, "torch"
    try:
        return function(*inputs), inputs
    finally:
        config.backend = before


def assert_accurate(function, q, k, v, mask=None, scale=None):
    """Output and gradients for a random output gradient.

    mask: of all pairs; if given, the budget is no less than the error that the formula's own roundings make, plus
        10 %: the kernels round weights of another scale, another draw of errors in a few hundred elements.
    """
    out = function(q, k, v)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    grads = torch.autograd.grad(out, (q, k, v), grad)
    expected, inputs = exact(function, q, k, v)
    expected = (expected, *torch.autograd.grad(expected, inputs, grad.double()))
    errors = [relative_error(a, b) for a, b in zip((out, *grads), expected, strict=True)]
    budgets = [BUDGET[q.dtype]] * 4
    if mask is not None:
        own = [relative_error(a, b) for a, b in zip(rounded(q, k, v, grad, mask, scale), expected, strict=True)]
        budgets = [max(a, 1.1 * b) for a, b in zip(budgets, own, strict=True)]
    assert all(error <= budget for error, budget in zip(errors, budgets, strict=True)), (errors, budgets)
    assert out.dtype == q.dtype and [g.shape for g in grads] == [x.shape for x in (q, k, v)]


def over(blocks, **options):
    """`block_sparse_attention` as a function of q, k, v, in float64 by the reference."""

    def attend(q, k, v):
        function = block_sparse_attention_reference if q.dtype == torch.float64 else block_sparse_attention
        return function(q, k, v, blocks, **options)

    return attend


def attends(blocks, b, h, n, m):
    """Straight from the lists."""
    b, h = (i if size > 1 else 0 for i, size in zip((b, h), blocks.count.shape[:2], strict=True))
    i = n // blocks.rows
    return m // blocks.keys in blocks.index[b, h, i, : blocks.count[b, h, i]]


def test_reference_is_softmax_over_the_pairs_of_the_lists():
    q, k, v, blocks = make(2, 37, 56, 4, 2, 8, 6, 16, 16)
    q, k, v = doubled(q, k, v)
    pairs = [[[[attends(blocks, b, h, n, m) for m in range(56)] for n in range(37)] for h in range(4)] for b in (0, 1)]
    pairs = torch.tensor(pairs)
    repeated = (x.repeat_interleave(2, dim=2).transpose(1, 2) for x in (k, v))
    expected = F.scaled_dot_product_attention(q.transpose(1, 2), *repeated, attn_mask=pairs, scale=0.3)
    expected = torch.where(pairs.any(-1, keepdim=True), expected, 0.0).transpose(1, 2)
    torch.testing.assert_close(block_sparse_attention_reference(q, k, v, blocks, scale=0.3), expected)

    q, k = q.softmax(-1), k.softmax(-1)
    weights = torch.einsum("bnhd,bmhd->bhnm", q, k.repeat_interleave(2, dim=2)).masked_fill(pairs, 0.0)
    expected = torch.einsum("bhnm,bmhe->bnhe", weights, v.repeat_interleave(2, dim=2))
    expected = expected / weights.sum(-1).transpose(1, 2).unsqueeze(-1)
    torch.testing.assert_close(linear_attention_outside(q, k, v, blocks), expected.nan_to_num(0.0))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_lists_of_queries_are_the_lists_the_other_way_round(data):
    B, Hkv, group = (data.draw(st.integers(1, 2)) for _ in range(3))
    N, M = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 90))
    H, shared = Hkv * group, data.draw(st.booleans())
    lead = (1, 1) if shared else (B, H)
    layout = torch.rand(*lead, number_of_blocks(N, 16), number_of_blocks(M, 32)) < data.draw(st.floats(0, 1))
    blocks = blocks_of_layout(layout, 16, 32)
    assert torch.equal(kinds_of(blocks, M) > 0, layout)
    index, full, count = lists_of_queries(blocks, M, H, Hkv)
    for b in range(index.shape[0]):
        for h in range(index.shape[1]):
            for j in range(index.shape[2]):
                listed = index[b, h, j, : count[b, h, j]].tolist()
                wanted = [
                    g * layout.shape[2] + i
                    for g in range(group)
                    for i in range(layout.shape[2])
                    if layout[b, 0 if shared else h * group + g, i, j]
                ]
                assert sorted(listed) == wanted
                # Neither the last block of queries nor the last of keys may go without a check.
                unchecked = listed[: full[b, h, j]]
                assert all(entry % layout.shape[2] < layout.shape[2] - 1 for entry in unchecked)
                assert not unchecked or j < layout.shape[3] - 1


def test_top_blocks_are_those_with_the_highest_scores():
    scores = torch.randn(2, 3, 4, 7)
    blocks = top_blocks(scores, 3, 16, 16)
    least = scores.topk(3, dim=-1).values[..., -1:]
    assert torch.equal(kinds_of(blocks, 7 * 16 - 5) > 0, scores >= least)
    assert (blocks.index.diff(dim=-1) > 0).all() and (blocks.count == 3).all()
    assert torch.equal(blocks.full, 3 - (blocks.index == 6).any(-1).int())


def test_means_of_short_blocks_are_over_what_they_have():
    x = torch.randn(2, 37, 3, 5, dtype=torch.float64)
    keep = torch.rand(2, 37) < 0.5
    keep[0, 16:32] = False
    got, kept = pooled(x, 16), pooled(x, 16, keep)
    for i, part in enumerate((slice(0, 16), slice(16, 32), slice(32, 37))):
        torch.testing.assert_close(got[:, i], x[:, part].mean(1))
        for b in range(2):
            own = x[b, part][keep[b, part]]
            torch.testing.assert_close(kept[b, i], own.mean(0) if len(own) else torch.zeros_like(own.sum(0)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_matches_float64(shape, dtype, device, triton_backend):
    q, k, v, blocks = make(*shape, dtype=dtype, device=device)
    assert_accurate(over(blocks), q, k, v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.3, -0.3])
def test_triton_hides_keys_and_far_tokens(dtype, scale, device, triton_backend):
    B, N, M = 2, 37, 50
    q, k, v, blocks = make(B, N, M, 2, 1, 16, 16, 16, 32, dtype=dtype, device=device)
    blocks = blocks._replace(full=torch.zeros_like(blocks.full))
    generator = torch.Generator().manual_seed(2)
    q_places, k_places = torch.rand(3, N, generator=generator) * 8, torch.rand(3, M, generator=generator) * 8
    k_places[2, :3] = math.inf
    bias = torch.randn(B, M, generator=generator)
    bias[:, 5:9] = -math.inf
    bias[1, :32] -= 20
    checks = {"q_places": q_places.to(device), "k_places": k_places.to(device), "bias": bias.to(device)}
    pairs = pairs_of(blocks, N, M) & near(checks["q_places"], checks["k_places"])
    mask = torch.where(pairs, checks["bias"][:, None, None, :].double(), -math.inf)
    assert_accurate(over(blocks, scale=scale, **checks), q, k, v, mask, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_sums_match_float64(shape, dtype, device, triton_backend):
    """The operator below `linear_attention_outside`: what the blocks hold of a linear attention."""
    q, k, v, blocks = make(*shape, dtype=dtype, device=device, mapped=True)
    (N, H), (M, Hkv) = q.shape[1:3], k.shape[1:3]

    def sums(q, k, v):
        if q.dtype != torch.float64:
            out, total = torch.ops.diffattn.block_sparse_sum(q, k, v, *blocks, 0.25)
        else:
            weights = torch.einsum("bnhd,bmhd->bhnm", q, k.repeat_interleave(H // Hkv, dim=2)) * 0.25
            weights = weights * pairs_of(blocks, N, M)
            out = torch.einsum("bhnm,bmhe->bnhe", weights, v.repeat_interleave(H // Hkv, dim=2))
            total = weights.sum(-1).transpose(1, 2)
        return torch.cat((out.to(q.dtype), total.unsqueeze(-1).to(q.dtype)), dim=-1)

    assert_accurate(sums, q, k, v)


@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
def test_linear_attention_outside_matches_float64(shape, device, triton_backend):
    q, k, v, blocks = make(*shape, device=device, mapped=True)
    blocks = blocks._replace(count=blocks.count.clamp_max(max(1, blocks.index.shape[-1] - 1)))
    assert_accurate(lambda q, k, v: linear_attention_outside(q, k, v, blocks), q, k, v)


@pytest.mark.parametrize("dtype", [float16, bfloat16])
def test_linear_attention_outside_rounds_as_two_linear_attentions(dtype, device, triton_backend):
    """It is a difference of two rounded tensors, so its error is theirs."""
    q, k, v, blocks = make(2, 37, 50, 4, 2, 20, 24, 16, 32, dtype=dtype, device=device, mapped=True)
    out = linear_attention_outside(q, k, v, blocks)
    expected, inputs = exact(lambda q, k, v: linear_attention_outside(q, k, v, blocks), q, k, v)
    weights = torch.einsum("bnhd,bmhd->bhnm", inputs[0], inputs[1].repeat_interleave(2, dim=2))
    inside = (weights * pairs_of(blocks, 37, 50)).sum(-1) / weights.sum(-1)
    left = (1 - inside).transpose(1, 2).unsqueeze(-1)
    everywhere = exact(lambda q, k, v: linear_attention_outside(q, k, v, empty(blocks)), q, k, v)[0]
    assert ((out.double() - expected) * left).norm() <= 2 * BUDGET[dtype] * everywhere.norm()


def empty(blocks):
    return blocks._replace(full=torch.zeros_like(blocks.full), count=torch.zeros_like(blocks.count))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_queries_that_attend_to_nothing_give_zeros(backend, device):
    before, config.backend = config.backend, backend
    try:
        q, k, v, blocks = make(1, 20, 40, 2, 1, 16, 16, 16, 16, device=device)
        hidden = torch.full((1, 40), -math.inf, device=device)
        for out in (
            block_sparse_attention(q, k, v, empty(blocks)),
            block_sparse_attention(q, k, v, blocks, bias=hidden),
            linear_attention_outside(*(x.softmax(-1) for x in (q, k)), v, everything(blocks)),
        ):
            grads = torch.autograd.grad(out, (q, k, v), torch.ones_like(out), allow_unused=True)
            assert all(x is None or not x.any() for x in (out, *grads))
    finally:
        config.backend = before


def everything(blocks):
    return blocks_of_layout(torch.ones_like(blocks.count[..., None]).expand_as(blocks.index) > 0, 16, 16)


@pytest.mark.parametrize("strides", ["heads first", "one tensor", "features last but one"])
def test_strided_inputs(strides, device, triton_backend):
    B, N, H, D = 1, 37, 2, 16
    *_, blocks = make(B, N, N, H, H, D, D, 16, 16, device=device)
    if strides == "heads first":
        q, k, v = (torch.randn(B, H, N, D, device=device).transpose(1, 2) for _ in range(3))
    elif strides == "one tensor":
        q, k, v = torch.randn(B, N, 3, H, D, device=device).unbind(2)
    else:
        q, k, v = (torch.randn(B, N, D, H, device=device).mT for _ in range(3))
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    assert not q.is_contiguous()
    assert_accurate(over(blocks), q, k, v)


@pytest.mark.parametrize("dtype", [float32, float16])
def test_operators_pass_opcheck(dtype, device, triton_backend):
    q, k, v, blocks = make(1, 20, 40, 2, 1, 8, 8, 16, 16, dtype=dtype, device=device)
    places = torch.rand(3, 20, device=device), torch.rand(3, 40, device=device)
    for checks in ((None, None, None), (*places, torch.zeros(1, 40, device=device))):
        torch.library.opcheck(torch.ops.diffattn.block_sparse_attention, (q, k, v, *blocks, *checks, 0.3, True))
    torch.library.opcheck(torch.ops.diffattn.block_sparse_sum, (q, k, v, *blocks, 0.3))


def test_same_bits_from_run_to_run(device, triton_backend):
    q, k, v, blocks = make(1, 37, 50, 2, 1, 16, 16, 16, 16, dtype=float16, device=device)

    def run():
        out = block_sparse_attention(q, k, v, blocks)
        return out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


# Windows


def in_window(height, width, radius, text):
    """(N, N), straight from the definition."""
    before, behind = text
    places = [None] * before + [(y, x) for y in range(height) for x in range(width)] + [None] * behind
    return torch.tensor(
        [
            [p is None or t is None or (p[0] - t[0]) ** 2 + (p[1] - t[1]) ** 2 < radius**2 for t in places]
            for p in places
        ]
    )


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("grid, radius, text", [((9, 7), 2.5, (0, 0)), ((8, 12), 3, (3, 5)), ((1, 70), 1, (0, 0))])
def test_window_is_what_it_says(grid, radius, text, backend, device):
    N = grid[0] * grid[1] + sum(text)
    q, k, v = (torch.randn(2, N, h, 16, device=device, requires_grad=True) for h in (2, 1, 1))
    bias = torch.zeros(2, N, device=device)
    bias[1, 4:7] = -math.inf
    mask = in_window(*grid, radius, text).to(device) & (bias[:, None, None] == 0)

    def window(q, k, v):
        if q.dtype != torch.float64:
            return window_attention(q, k, v, radius, grid, text=text, bias=bias)
        repeated = (x.repeat_interleave(2, dim=2).transpose(1, 2) for x in (k, v))
        out = F.scaled_dot_product_attention(q.transpose(1, 2), *repeated, attn_mask=mask)
        return torch.where(mask.any(-1, keepdim=True), out, 0.0).transpose(1, 2)

    before, config.backend = config.backend, backend
    try:
        assert_accurate(window, q, k, v)
    finally:
        config.backend = before


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.floats(0.5, 50),
    st.tuples(st.integers(0, 70), st.integers(0, 70)),
    st.sampled_from([(16, 16), (128, 64), (64, 64)]),
)
def test_plans_visit_every_pair_within_reach(height, width, radius, text, sizes):
    order, back, q_places, k_places, blocks = _plan((height, width), text, radius, sizes, torch.device("cpu"))
    N = height * width + sum(text)
    assert torch.equal(order[back], torch.arange(N))
    # The places that are tested by the definition in `test_window_is_what_it_says`, in the order of the plan.
    pairs = near(q_places, k_places)
    kinds = kinds_of(blocks, N)[0, 0].repeat_interleave(sizes[0], 0).repeat_interleave(sizes[1], 1)[:N, :N]
    assert not (pairs & (kinds == 0)).any() and not (~pairs & (kinds == 2)).any()


def test_plans_of_whole_tiles_visit_few_blocks():
    plan = _plan((64, 64), (0, 0), 8, (64, 64), torch.device("cpu"))
    # 8 x 8 tiles: the tile itself, 8 around it, and at most 12 more at a distance of less than 8.
    assert plan.blocks.count.max() <= 21 and plan.blocks.full.max() == 0
    wide = _plan((64, 64), (0, 0), 8, (128, 64), torch.device("cpu"))
    assert torch.equal(wide.q_places[:2].long().unflatten(1, (-1, 64)).amin(-1) % 8, torch.zeros(2, 64).long())
    assert wide.blocks.count.max() <= 26
    # A window as large as the picture has blocks without a check.
    assert (_plan((64, 64), (0, 0), 100, (64, 64), torch.device("cpu")).blocks.full == 63).all()


# Errors


@pytest.mark.parametrize(
    "change, message",
    [
        ({"blocks": None}, "blocks: got NoneType, expected Blocks"),
        ({"blocks": {"rows": 24}}, r"blocks: got rows=24, expected one of \(16, 32, 64, 128\)"),
        ({"blocks": {"rows": 32}}, "blocks: got index of shape .* for 40 queries in blocks of 32"),
        ({"blocks": {"count": torch.zeros(1, 2, 3)}}, "blocks: got count of torch.float32"),
        ({"q_places": torch.zeros(3, 40)}, "q_places and k_places: got one of the two"),
        ({"q_places": torch.zeros(2, 40), "k_places": torch.zeros(3, 30)}, r"q_places: got .* expected .*\(3, 40\)"),
        ({"bias": torch.zeros(1, 29)}, r"bias: got shape \(1, 29\), expected 30 keys"),
        ({"bias": torch.zeros(1, 30, dtype=torch.bool)}, "bias: got torch.bool"),
        ({"bias": torch.zeros(1, 30, requires_grad=True)}, "bias: got one that requires a gradient"),
        ({"scale": math.inf}, "scale: got inf"),
        ({"v": torch.zeros(1, 30, 1, 257)}, "v: got 257 features a head, expected 1 to 256"),
    ],
)
def test_errors_name_the_argument(change, message):
    q, k, v, blocks = make(1, 40, 30, 2, 1, 8, 8, 16, 16)
    arguments = {"q": q, "k": k, "v": v, "blocks": blocks} | change
    if isinstance(change.get("blocks"), dict):
        arguments["blocks"] = blocks._replace(**change["blocks"])
    with pytest.raises((TypeError, ValueError), match=message):
        block_sparse_attention(**arguments)


@pytest.mark.parametrize(("B", "N", "M"), [(0, 20, 20), (2, 0, 20), (2, 20, 0), (2, 0, 0)])
def test_no_tokens(B, N, M, any_backend, device):
    shape = [1, 1, number_of_blocks(N, 16), number_of_blocks(M, 16)]
    lists = torch.zeros(shape, dtype=torch.int32, device=device)
    blocks = Blocks(lists, lists.sum(-1, dtype=torch.int32), lists.sum(-1, dtype=torch.int32), 16, 16)
    for function in (block_sparse_attention, linear_attention_outside):
        q, k, v = (torch.rand(B, n, 2, 8, device=device, requires_grad=True) for n in (N, M, M))
        o = function(q, k, v, blocks)
        assert o.shape == (B, N, 2, 8)
        o.sum().backward()
        assert all((x.grad == 0).all() for x in (q, k, v))


@pytest.mark.parametrize("B", [0, 2])
def test_windows_of_no_tokens(B, any_backend, device):
    q = torch.randn(B, 0, 2, 8, device=device)
    assert window_attention(q, q, q, 2, (0, 3)).shape == q.shape


def test_window_refuses_what_does_not_fit():
    q = torch.randn(2, 12, 2, 8)
    for bias in (torch.zeros(1, 13), torch.zeros(3, 12)):
        with pytest.raises(ValueError, match="bias: got"):
            window_attention(q, q, q, 2, (3, 4), bias=bias)
    for radius in (-2, math.inf, math.nan):
        with pytest.raises(ValueError, match="radius: got"):
            window_attention(q, q, q, radius, (3, 4))


def test_window_refuses_another_number_of_tokens():
    q = torch.zeros(1, 40, 1, 8)
    with pytest.raises(ValueError, match=r"grid: got 6 x 6 and 2 \+ 0 tokens of text, expected .* 40 and 40"):
        window_attention(q, q, q, 2, (6, 6), text=(2, 0))


def test_lists_are_a_tuple_of_tensors_and_sizes():
    blocks = blocks_of_layout(torch.ones(1, 1, 2, 3, dtype=torch.bool), 16, 32)
    assert isinstance(blocks, Blocks) and (blocks.rows, blocks.keys) == (16, 32)
    assert blocks.index.tolist() == [[[[0, 1, 2]] * 2]]
    assert blocks.full.tolist() == [[[2, 2]]] and blocks.count.tolist() == [[[3, 3]]]
