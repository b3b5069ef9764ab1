"""Grouped-query attention as an operator: registered, compiled, exported; and what it says of bad input."""

import pytest
import torch

from diffattn.kernels import gqa_attention
from tests.kernels.test_gqa_attention import float16, float32, make


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [float32, float16])
def test_operators_pass_opcheck(dtype, training, device, triton_backend):
    q, k, v = make(2, 9, 7, 4, 2, 8, 4, dtype=dtype, device=device)
    mask = torch.rand(1, 1, 9, 7, device=device) > 0.3
    torch.library.opcheck(torch.ops.diffattn.gqa_attention.default, (q, k, v, mask, 0.3, training))
    q, k, v = (x.detach() for x in (q, k, v))
    torch.library.opcheck(torch.ops.diffattn.gqa_attention_inference.default, (q, k, v, mask, 0.3))
    out, stats, residual = torch.ops.diffattn.gqa_attention(q, k, v, mask, 0.3, True)
    args = (torch.randn_like(out), q, k, v, mask, out, stats, residual, 0.3)
    torch.library.opcheck(torch.ops.diffattn.gqa_attention_backward.default, args)


def test_operator_called_without_training_still_has_gradients(device, triton_backend):
    q, k, v = make(1, 9, 7, 2, 1, 8, 8, device=device)
    out = torch.ops.diffattn.gqa_attention(q, k, v, None, 0.3, False)[0]
    again = torch.ops.diffattn.gqa_attention(q, k, v, None, 0.3, True)[0]
    for a, b in zip(
        torch.autograd.grad(out.sum(), (q, k, v)), torch.autograd.grad(again.sum(), (q, k, v)), strict=True
    ):
        assert torch.equal(a, b)


def test_second_derivative_is_refused(device, triton_backend):
    q, k, v = make(1, 9, 7, 2, 1, 8, 8, device=device)
    (grad,) = torch.autograd.grad(gqa_attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_compiles_to_one_graph_for_every_length(training, masked, device, any_backend):
    torch.compiler.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(q, k, v, mask):
        return gqa_attention(q * 2, k, v, mask=mask)

    with torch._dynamo.config.patch(error_on_recompile=True):
        for N, M in ((9, 7), (20, 33), (5, 64)):
            q, k, v = make(2, N, M, 4, 2, 8, 8, device=device)
            if not training:
                q, k, v = (x.detach() for x in (q, k, v))
            mask = torch.rand(2, 1, 1, M, device=device) > 0.3 if masked else None
            out, expected = compiled(q, k, v, mask), gqa_attention(q * 2, k, v, mask=mask)
            torch.testing.assert_close(out, expected)
            if training:
                for a, b in zip(
                    torch.autograd.grad(out.sum(), (q, k, v)),
                    torch.autograd.grad(expected.sum(), (q, k, v)),
                    strict=True,
                ):
                    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("masked", [False, True])
def test_exports_to_onnx_with_heads_shared(masked, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")

    class Attention(torch.nn.Module):
        def forward(self, q, k, v, mask=None):
            return gqa_attention(q, k, v, mask=mask)

    def inputs(B, N, M):
        q, k, v = (x.detach() for x in make(B, N, M, 6, 2, 8, 5))
        mask = torch.rand(B, 1, 1, M, generator=torch.Generator().manual_seed(3)) > 0.3
        mask[0] = False
        return (q, k, v, mask) if masked else (q, k, v)

    B, N, M = (torch.export.Dim(name) for name in "BNM")
    shapes = ({0: B, 1: N}, {0: B, 1: M}, {0: B, 1: M}, {0: B, 3: M})[: 4 if masked else 3]
    path = str(tmp_path / "attention.onnx")
    torch.onnx.export(
        Attention(),
        inputs(2, 9, 7),
        path,
        dynamo=True,
        dynamic_shapes=shapes,
        input_names=["q", "k", "v", "mask"][: len(shapes)],
        verbose=False,
    )
    graph = onnx.load(path).graph
    assert not {"Tile", "Expand", "GatherElements"} & {node.op_type for node in graph.node}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for lengths in ((2, 9, 7), (3, 33, 20), (2, 5, 70)):
        args = inputs(*lengths)
        feed = {node.name: x.numpy() for node, x in zip(session.get_inputs(), args, strict=True)}
        (out,) = session.run(None, feed)
        torch.testing.assert_close(torch.from_numpy(out), Attention()(*args), rtol=1e-5, atol=1e-5)


def bad(change):
    """Arguments that fit, with some replaced."""
    q, k, v = (x.detach() for x in make(2, 9, 7, 6, 2, 8, 5))
    return {"q": q, "k": k, "v": v} | change


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.zeros(2, 9, 48)}, r"q: got shape \(2, 9, 48\), expected \(B, N, H, D\)"),
        ({"k": torch.zeros(2, 7, 2, 16)}, r"k: got shape \(2, 7, 2, 16\), expected \(2, M, Hkv, 8\)"),
        ({"k": torch.zeros(1, 7, 2, 8)}, r"k: got shape \(1, 7, 2, 8\), expected \(2, M, Hkv, 8\)"),
        ({"v": torch.zeros(2, 8, 2, 5)}, r"v: got shape \(2, 8, 2, 5\), expected \(2, 7, 2\)"),
        ({"k": torch.zeros(2, 7, 4, 8), "v": torch.zeros(2, 7, 4, 5)}, "k: got 4 heads, expected a divisor of the 6"),
        ({"k": torch.zeros(2, 7, 2, 8, dtype=float16)}, "k: got torch.float16, expected torch.float32 as q"),
        ({"q": torch.zeros(2, 9, 6, 8, dtype=torch.int64)}, "q: got torch.int64, expected one of torch.float16"),
        ({"v": torch.zeros(2, 7, 2, 300)}, "v: got 300 features a head, expected 1 to 256"),
        ({"v": torch.zeros(2, 7, 2, 5, device="meta")}, "v: on meta, expected cpu"),
        ({"mask": torch.ones(2, 9, 7)}, r"mask: got shape \(2, 9, 7\), .* \(2, 6, 9, 7\)"),
        ({"mask": torch.ones(1, 2, 6, 9, 7)}, r"mask: got shape \(1, 2, 6, 9, 7\), .* \(2, 6, 9, 7\)"),
        ({"mask": torch.ones(7, dtype=torch.int64)}, "mask: got torch.int64, expected torch.bool or torch.float32"),
        ({"mask": torch.ones(7, dtype=float16)}, "mask: got torch.float16, expected torch.bool or torch.float32"),
        ({"mask": [True] * 7}, "mask: got list, expected a tensor"),
        ({"mask": torch.ones(7, device="meta")}, "mask: on meta, expected cpu"),
        ({"scale": float("inf")}, "scale: got inf"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        gqa_attention(**bad(change))
