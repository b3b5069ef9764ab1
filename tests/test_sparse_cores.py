"""Sparse-linear and window attention against their definitions, and as cores of real models."""

import copy
import json
import math
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diffattn
from diffattn import SoftmaxAttention, SparseLinearAttention, WindowAttention, config
from diffattn.cores import LayerInfo, Rotary, apply_rotary
from diffattn.cores.sparse_linear import blocks_for
from diffattn.cores.window import token_grid
from tests.models import BY_NAME
from tests.models.unets import build_unet, run_unet

pytestmark = pytest.mark.filterwarnings("ignore:diffattn. .* another mechanism")

H, D = 4, 8


def qkv(tokens, kv_heads=2, keys=None, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, tokens, H, D), *[(2, keys or tokens, kv_heads, D)] * 2]
    return [torch.randn(*s, generator=generator, dtype=dtype) for s in shapes]


def sparse_linear(keep=0.25, block=16, feature_map="softmax", trained=True):
    core = SparseLinearAttention(keep, block, feature_map)
    core.prepare(LayerInfo(H, 2, D))
    if trained:
        torch.manual_seed(1)
        for parameter in core.parameters():
            nn.init.normal_(parameter)
    return core.double()


def softmax(q, k, v, pairs, scale=None):
    """Over (B, H, N, M) pairs, heads repeated."""
    q, k, v = (x.transpose(1, 2) for x in (q, *(x.repeat_interleave(H // x.shape[2], dim=2) for x in (k, v))))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=pairs, scale=scale).transpose(1, 2)


def critical(q, k, keep, block, live):
    """(B, H, N, M) from the definition, block by block; live: (B, M), keys that are not hidden."""
    B, N, M = *q.shape[:2], k.shape[1]
    pairs = torch.zeros(B, H, N, M, dtype=torch.bool)
    parts = [slice(start, min(start + block, M)) for start in range(0, M, block)]
    kept = max(4, math.ceil(keep * len(parts)))
    for b, h, start in product(range(B), range(H), range(0, N, block)):
        rows = slice(start, min(start + block, N))
        query, keys = q[b, rows, h].mean(0), k[b, :, h * k.shape[2] // H]
        scores = [
            float(query @ keys[part][live[b, part]].mean(0)) if live[b, part].any() else -math.inf for part in parts
        ]
        for j in sorted(range(len(parts)), key=lambda j: -scores[j])[:kept]:
            pairs[b, h, rows, parts[j]] = True
    return pairs


# Sparse-linear attention


@pytest.mark.parametrize("tokens, keys", [(96, 96), (101, 90), (7, 150)])
@pytest.mark.parametrize("feature_map", ["softmax", "elu1"])
@pytest.mark.parametrize("masked", [None, "boolean", "additive"])
def test_sparse_linear_is_what_the_paper_says(tokens, keys, feature_map, masked):
    q, k, v = qkv(tokens, keys=keys)
    core = sparse_linear(feature_map=feature_map)
    live, mask = torch.ones(2, keys, dtype=torch.bool), None
    if masked:
        live[1, 20:60] = False
        mask = live[:, None, None]
    if masked == "additive":
        mask = torch.zeros(2, 1, 1, keys, dtype=torch.float64).masked_fill(~mask, -1e4)
    pairs = critical(q, k, 0.25, 16, live)
    sparse = softmax(q, k, v, pairs & live[:, None, None])

    phi = {"softmax": lambda x: x.softmax(-1), "elu1": lambda x: F.elu(x) + 1}[feature_map]
    weights = torch.einsum("bnhd,bmhd->bhnm", phi(q), phi(k).repeat_interleave(2, dim=2))
    weights = weights.masked_fill(pairs | ~live[:, None, None], 0.0)
    rest = torch.einsum("bhnm,bmhe->bnhe", weights / weights.sum(-1, keepdim=True), v.repeat_interleave(2, dim=2))
    expected = sparse + rest @ core.linear_out.weight.T + core.linear_out.bias
    torch.testing.assert_close(core(q, k, v, mask=mask), expected)


def test_sparse_linear_starts_as_block_sparse_softmax():
    q, k, v = qkv(96)
    pairs = critical(q, k, 0.25, 16, torch.ones(2, 96, dtype=torch.bool))
    torch.testing.assert_close(sparse_linear(trained=False)(q, k, v), softmax(q, k, v, pairs))
    torch.testing.assert_close(SparseLinearAttention(block=16)(q, k, v), softmax(q, k, v, pairs))


def test_sparse_linear_with_every_block_is_softmax():
    mask = torch.rand(2, 1, 1, 64) < 0.7
    for tokens, core in ((64, SparseLinearAttention()), (96, SparseLinearAttention(keep=1.0, block=32))):
        q, k, v = qkv(tokens)
        given = mask if tokens == 64 else None
        expected = SoftmaxAttention()(q, k, v, mask=given, scale=0.3)
        torch.testing.assert_close(core(q, k, v, mask=given, scale=0.3), expected)


@pytest.mark.parametrize(
    "tokens, blocks", [(64, (16, 16)), (511, (16, 16)), (512, (32, 32)), (1024, (64, 64)), (4096, (128, 64))]
)
def test_blocks_are_no_larger_than_needed(tokens, blocks):
    assert blocks_for(tokens, tokens) == blocks


def test_blocks_of_queries_and_keys_may_differ():
    q, k, v = qkv(96)
    core = SparseLinearAttention(block=[32, 16])
    means = torch.einsum("bihd,bjhd->bhij", q.unflatten(1, (3, 32)).mean(2), both(k).unflatten(1, (6, 16)).mean(2))
    pairs = (means >= means.topk(4).values[..., -1:]).repeat_interleave(32, -2).repeat_interleave(16, -1)
    torch.testing.assert_close(core(q, k, v), softmax(q, k, v, pairs))
    assert SparseLinearAttention(**json.loads(json.dumps(core.config()))).config() == core.config()


def both(k):
    """Each key head for its two query heads."""
    return k.repeat_interleave(2, dim=2)


@pytest.mark.parametrize("core", [sparse_linear(), WindowAttention(3)], ids=["sparse-linear", "window"])
def test_rotation_comes_first(core):
    q, k, v = qkv(100)
    angle = torch.rand(100, D // 2, dtype=torch.float64) * 6
    rotary = Rotary(angle.cos(), angle.sin())
    expected = core(apply_rotary(q, rotary), apply_rotary(k, rotary), v)
    torch.testing.assert_close(core(q, k, v, rotate=(rotary, rotary)), expected)
    assert core.rotates_first


def test_every_weight_of_sparse_linear_is_trained():
    q, k, v = (x.requires_grad_() for x in qkv(96))
    core = sparse_linear()
    core(q, k, v).square().sum().backward()
    assert all(x.grad is not None and x.grad.any() for x in (q, k, v, *core.parameters()))
    assert [name for name, _ in core.named_parameters()] == ["linear_out.weight", "linear_out.bias"]


# Windows


def window_of(height, width, radius, before=0, behind=0):
    places = torch.tensor([(y, x) for y in range(height) for x in range(width)], dtype=torch.float64)
    pairs = torch.ones(*[before + height * width + behind] * 2, dtype=torch.bool)
    pairs[before : before + height * width, before : before + height * width] = torch.cdist(places, places) < radius
    return pairs


@pytest.mark.parametrize(
    "core, tokens, pairs",
    [
        (WindowAttention(3), 81, window_of(9, 9, 3)),
        (WindowAttention(2.5, grid=(768, 1024)), 48, window_of(6, 8, 2.5)),
        (WindowAttention(3, grid=[2, 1], text=[5, 3]), 26, window_of(6, 3, 3, 5, 3)),
        (WindowAttention(100), 81, window_of(9, 9, 100)),
    ],
    ids=str,
)
def test_window_is_a_circle_in_the_picture(core, tokens, pairs):
    q, k, v = qkv(tokens)
    mask = torch.rand(2, 1, 1, tokens) < 0.9
    mask[..., :3] = True
    torch.testing.assert_close(core(q, k, v, scale=0.3), softmax(q, k, v, pairs, 0.3))
    expected = torch.where((pairs & mask).any(-1)[..., None], softmax(q, k, v, pairs & mask).transpose(1, 2), 0.0)
    torch.testing.assert_close(core(q, k, v, mask=mask), expected.transpose(1, 2))
    additive = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -math.inf)
    torch.testing.assert_close(core(q, k, v, mask=additive), expected.transpose(1, 2))


def test_set_grid_changes_the_next_calls_alone():
    unet = build_unet().eval()
    diffattn.patch(unet, WindowAttention(2))
    cores = [m for m in unet.modules() if isinstance(m, WindowAttention)]
    q, k, v = qkv(32)
    with pytest.raises(ValueError, match=r"grid: got 32 image tokens, expected a square.*set_grid"):
        cores[0](q, k, v)
    diffattn.set_grid(unet, (64, 32))
    torch.testing.assert_close(cores[0](q, k, v), softmax(q, k, v, window_of(8, 4, 2)))
    assert all(core.now == ((64, 32), (0, 0)) and core.config()["grid"] is None for core in cores)
    with pytest.raises(ValueError, match="target: Linear has no layer with WindowAttention"):
        diffattn.set_grid(nn.Linear(1, 1), None)


@pytest.mark.parametrize(
    "tokens, grid, expected",
    [(1024, None, (32, 32)), (1536, (3, 2), (48, 32)), (384, (48, 32), (24, 16)), (6, (1024, 1536), (2, 3))],
)
def test_grids_in_any_unit(tokens, grid, expected):
    assert token_grid(tokens, grid, (0, 0)) == expected


@pytest.mark.parametrize(
    "tokens, grid", [(1000, None), (0, None), (1024, (3, 2)), (4, (3, 4)), (-5, (1, 1)), (2, (8, 1))]
)
def test_unknown_grids_are_refused(tokens, grid):
    with pytest.raises(ValueError, match=f"grid: got {tokens} image tokens"):
        token_grid(tokens, grid, (0, 0))


# As cores of models


@pytest.mark.parametrize(
    "core", [SparseLinearAttention(block=16), WindowAttention(2)], ids=["sparse-linear", "window"]
)
def test_weights_go_to_a_folder_and_back(core, tmp_path):
    def patched(seed):
        torch.manual_seed(0)
        unet = build_unet(attention_head_dim=(4, 8)).eval()
        handle = diffattn.patch(unet, core)
        torch.manual_seed(seed)
        for processor in handle.installed.values():
            for parameter in processor.parameters():
                nn.init.normal_(parameter)
        return unet

    def run(unet):
        with torch.no_grad():
            return run_unet(unet, torch.Generator().manual_seed(1))

    one, two = patched(1), patched(2)
    folder = diffattn.save_weights(one, tmp_path / "weights")
    layers = json.loads((folder / "diffattn.json").read_text())["layers"]
    assert {layer.pop("core") for layer in layers.values()} == {type(core).__name__}
    assert all(type(core)(**arguments).config() == core.config() for arguments in layers.values())
    diffattn.load_weights(two, folder)
    assert torch.equal(run(one), run(two)) and torch.equal(run(one), run(copy.deepcopy(one)))


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "SD3Transformer2DModel", "UNet2DConditionModel"])
def test_a_window_as_large_as_the_picture_leaves_a_model_as_it_was(name):
    tiny = BY_NAME[name]
    model = tiny.model()
    generator = torch.Generator().manual_seed(0)
    stock = tiny.run(model, generator)
    seen = tokens_of(model, lambda: tiny.run(model, torch.Generator().manual_seed(0)))
    for layer, (image, text) in seen.items():
        diffattn.patch(model, WindowAttention(1000, grid=image, text=text), layers=layer)
    torch.testing.assert_close(tiny.run(model, torch.Generator().manual_seed(0)), stock, rtol=1e-4, atol=1e-5)


def tokens_of(model, run):
    """Any grid that holds each layer's tokens: all pairs are near."""
    seen = {}

    class Seeing(SoftmaxAttention):
        def forward(self, q, k, v, **options):
            if q.shape[1] == k.shape[1]:
                seen[self.layer] = ((1, q.shape[1]), (0, 0))
            return super().forward(q, k, v, **options)

    handle = diffattn.patch(model, Seeing())
    for layer, processor in handle.installed.items():
        processor.core.layer = layer
    run()
    handle.undo()
    return seen


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "make", [lambda: sparse_linear().float(), lambda: WindowAttention(3)], ids=["sparse", "window"]
)
def test_one_graph_under_compile(make, backend):
    core = make()
    before, config.backend = config.backend, backend
    try:
        compiled = torch.compile(core, fullgraph=True, backend="aot_eager")
        for tokens in (100, 81)[: 2 if backend == "torch" else 1]:
            q, k, v = (x[:1, :, :2].requires_grad_() for x in qkv(tokens, dtype=torch.float32))
            out, expected = compiled(q, k, v), core(q, k, v)
            torch.testing.assert_close(out, expected)
            grads = (torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, expected))
            torch.testing.assert_close(*grads)
    finally:
        config.backend = before


@pytest.mark.onnx
@pytest.mark.parametrize("name", ["sparse-linear", "window"])
def test_exports_to_onnx(name, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from diffattn.export import ExportError, to_onnx

    class Attend(nn.Module):
        def __init__(self, core):
            super().__init__()
            self.core = core

        def forward(self, q, k, v, return_dict=True):
            return (self.core(q, k, v),)

    model = Attend(sparse_linear().float() if name == "sparse-linear" else WindowAttention(3))
    inputs = dict(zip("qkv", qkv(100, dtype=torch.float32), strict=True))
    # Compared with the model at other sizes.
    free = {0: "batch", 1: "tokens"} if name == "sparse-linear" else {0: "batch"}
    to_onnx(model, tmp_path / "model.onnx", sample_inputs=inputs, dynamic=dict.fromkeys("qkv", free))
    if name == "window":
        with pytest.raises(ExportError, match="one size alone of tokens of q, 100"):
            anywhere = {key: {1: "tokens"} for key in "qkv"}
            to_onnx(model, tmp_path / "other.onnx", sample_inputs=inputs, dynamic=anywhere)


def test_the_benchmark_compares_what_it_says(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import sparse

    case = sparse.Case("small", 1, 16, 2, 8, text=9)
    q, k, v = (torch.randn(1, case.N, 2, 8, dtype=torch.bfloat16) for _ in range(3))
    outs = {name: core(q, k, v) for name, core in sparse.cores(case, "cpu").items()}
    assert all(out.shape == q.shape and out.dtype == q.dtype for out in outs.values())
    # A radius of 32 sees a picture of 16 x 16 tokens whole.
    torch.testing.assert_close(outs["window, radius 32"], outs["dense"], rtol=2e-2, atol=2e-3)
    assert not torch.allclose(outs["window, radius 8"], outs["dense"], rtol=2e-2, atol=2e-3)
    assert len({case.name for case in sparse.CASES}) == len(sparse.CASES)


# Errors


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SparseLinearAttention(keep=0), "keep: got 0, expected a share"),
        (lambda: SparseLinearAttention(keep="all"), "keep: got 'all'"),
        (lambda: SparseLinearAttention(block=24), r"block: got 24, expected None, one of \(16, 32, 64, 128\)"),
        (
            lambda: SparseLinearAttention(feature_map="exp"),
            "feature_map: got 'exp', expected one of softmax, elu1, relu",
        ),
        (lambda: SparseLinearAttention().prepare(LayerInfo(4, 4)), "needs the head dim"),
        (lambda: WindowAttention(0), "radius: got 0, expected a positive"),
        (lambda: WindowAttention(math.inf), "radius: got inf"),
        (lambda: WindowAttention(3, grid=64), "grid: got 64, expected"),
        (lambda: WindowAttention(3, grid=(0, 4)), r"grid: got \(0, 4\), expected"),
        (lambda: WindowAttention(3, text=512), r"text: got 512, expected \(before, behind\)"),
        (lambda: WindowAttention(3)(*qkv(9, keys=16)), "k: got 16 tokens and 9 queries"),
        (lambda: WindowAttention(3, text=(4, 0))(*qkv(9)), "grid: got 5 image tokens besides 4 of text"),
    ],
)
def test_errors_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("core", [SparseLinearAttention(), WindowAttention(3)], ids=["sparse-linear", "window"])
@pytest.mark.parametrize("shape", [(2, 1, 100, 100), (2, H, 1, 100), (100, 100)])
def test_masks_over_pairs_are_refused(core, shape):
    with pytest.raises(ValueError, match=r"mask: got shape .*, expected \(B, 1, 1, M\)"):
        core(*qkv(100), mask=torch.ones(shape, dtype=torch.bool))
