"""Block-sparse attention in plain torch that reads the listed blocks alone, against the one that masks all pairs."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffattn.kernels import block_sparse_attention, window_attention
from diffattn.kernels.block_sparse_attention import gathered as module
from diffattn.kernels.block_sparse_attention.blocks import Blocks, number_of_blocks, top_blocks
from diffattn.kernels.block_sparse_attention.gathered import gathered_attention
from diffattn.kernels.block_sparse_attention.reference import block_sparse_attention_reference, near
from diffattn.kernels.gqa_attention.reference import gqa_attention_reference
from tests.kernels.accuracy import relative_error

# B, N, M, H, Hkv, D, E, rows, keys, and the length of the lists: short last blocks, shared heads, other values.
SHAPES = [
    (2, 37, 50, 4, 2, 8, 8, 16, 16, 2),
    (1, 70, 129, 3, 1, 16, 12, 32, 16, 5),
    (2, 128, 64, 2, 2, 8, 8, 64, 16, 1),
    (1, 16, 33, 1, 1, 4, 4, 16, 16, 3),
]


def make(B, N, M, H, Hkv, D, E, rows, keys, kept, dtype=torch.float64, lists=(None, None)):
    """q, k, v, and lists of which some are shorter, or empty; what follows them is no block at all."""
    generator = torch.Generator().manual_seed(0)
    shapes = (B, N, H, D), (B, M, Hkv, D), (B, M, Hkv, E)
    q, k, v = (torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes)
    lead = [all_of if size is None else size for all_of, size in zip((B, H), lists, strict=True)]
    scores = torch.randn(*lead, number_of_blocks(N, rows), number_of_blocks(M, keys), generator=generator)
    blocks = top_blocks(scores, kept, rows, keys)
    count = torch.randint(0, kept + 1, blocks.count.shape, generator=generator, dtype=torch.int32)
    index = torch.where(torch.arange(kept) < count[..., None], blocks.index, 10**6)
    return q, k, v, Blocks(index, torch.zeros_like(count), count, rows, keys)


def with_gradients(function, q, k, v, *arguments):
    out = function(q, k, v, *arguments)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return out, *torch.autograd.grad(out, (q, k, v), grad.to(out.dtype))


def places_of(N, M):
    generator = torch.Generator().manual_seed(2)
    q_places, k_places = torch.rand(3, N, generator=generator) * 8, torch.rand(3, M, generator=generator) * 8
    k_places[2, :3] = math.inf
    return q_places, k_places


def bias_of(B, M, dtype):
    bias = torch.randn(B, M, generator=torch.Generator().manual_seed(3), dtype=dtype)
    bias[:, 5:9] = -math.inf
    return bias


@pytest.mark.parametrize("at_a_time", [1, 2**21], ids=["one block at a time", "all at once"])
@pytest.mark.parametrize("checks", ["none", "bias", "places", "both"])
@pytest.mark.parametrize("lists", [(None, None), (1, 1), (None, 1), (1, None)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gives_what_masking_all_pairs_gives(shape, lists, checks, at_a_time, monkeypatch):
    monkeypatch.setattr(module, "GATHERED", at_a_time)
    q, k, v, blocks = make(*shape, lists=lists)
    B, N, M = shape[:3]
    places = places_of(N, M) if checks in ("places", "both") else (None, None)
    # Of the whole batch where each has its own.
    bias = bias_of(lists[0] or B, M, q.dtype) if checks in ("bias", "both") else None
    arguments = (blocks, *places, bias, -0.4)
    expected = with_gradients(block_sparse_attention_reference, q, k, v, *arguments)
    torch.testing.assert_close(with_gradients(gathered_attention, q, k, v, *arguments), expected)
    assert all(x.any() for x in expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_rounds_as_any_softmax(shape):
    q, k, v, blocks = make(*shape)
    expected = with_gradients(block_sparse_attention_reference, q, k, v, blocks)
    q, k, v = (x.detach().float().requires_grad_() for x in (q, k, v))
    for one, other in zip(with_gradients(gathered_attention, q, k, v, blocks), expected, strict=True):
        assert one.dtype == torch.float32 and relative_error(one, other) <= 1e-5


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made inside."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple) else (out,):
            # A view is no memory.
            if isinstance(x, torch.Tensor) and not x._is_view():
                self.elements = max(self.elements, x.numel())
        return out


def test_plain_torch_keeps_to_what_is_listed(monkeypatch):
    """Short lists, without gradients: the largest tensor is one of the arguments."""
    monkeypatch.setattr(module, "GATHERED", 4096)
    q = torch.randn(1, 1024, 2, 8)
    blocks = top_blocks(torch.randn(1, 2, 16, 64), 4, 64, 16)
    with Largest() as largest, torch.no_grad():
        block_sparse_attention(q, q, q, blocks)
    assert largest.elements <= q.numel()

    with Largest() as largest, torch.no_grad():
        block_sparse_attention_reference(q, q, q, blocks)
    assert largest.elements == 2 * 1024**2


def test_windows_keep_to_what_is_near(monkeypatch):
    monkeypatch.setattr(module, "GATHERED", 4096)
    q, k, v = (torch.randn(1, 48 * 40 + 9, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    arguments = dict(radius=4.5, grid=(48, 40), text=(4, 5))
    with Largest() as largest:
        got = with_gradients(lambda q, k, v: window_attention(q, k, v, **arguments), q, k, v)
    assert largest.elements < q.shape[1] ** 2 / 5

    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(40.0), indexing="ij")
    reach = 4.5**2 - 0.1  # of whole numbers: fewer than 4.5 squared
    picture = torch.stack((y.flatten(), x.flatten(), torch.full((48 * 40,), reach)))
    before, behind = torch.full((3, 4), math.inf), torch.full((3, 5), math.inf)
    before[:2], behind[:2] = 0, 0
    places = torch.cat((before, picture, behind), dim=1)
    own = places.clone()
    own[2, 4:-5] = 0
    mask = near(places, own)
    torch.testing.assert_close(got, with_gradients(lambda q, k, v: gqa_attention_reference(q, k, v, mask), q, k, v))


def test_one_graph_for_any_number_of_tokens():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def attend(q, scores):
        return block_sparse_attention(q, q, q, top_blocks(scores, 3, 16, 16), scale=0.3)

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (100, 150, 208, 75):
        q = torch.randn(2, tokens, 2, 8)
        scores = torch.randn(2, 2, *[number_of_blocks(tokens, 16)] * 2)
        torch.testing.assert_close(compiled(q, scores), attend(q, scores))
    assert len(graphs) == 1
