"""RMS norm and rotary embedding as an operator: registered, compiled, exported; and what it says of bad input."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffattn.kernels import qk_norm_rope
from tests.kernels.accuracy import relative_error
from tests.kernels.test_qk_norm_rope import exact, float16, float32, make, tables


@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("dtype", [float32, float16])
def test_operator_passes_opcheck(dtype, across, device, triton_backend):
    operator = torch.ops.diffattn.qk_norm_rope.default
    a = make(2, 5, 7, 4, 2, 8, 4, across=across, dtype=dtype, device=device)
    (q_weight, eps), (k_weight, _) = a["norms"]
    (q_cos, q_sin, _), (k_cos, k_sin, _) = a["rotate"]
    tensors = q_cos, q_sin, k_cos, k_sin
    torch.library.opcheck(operator, (a["q"], a["k"], q_weight, k_weight, eps, eps, *tensors, True, False, across))
    q = a["q"].transpose(1, 2).contiguous().transpose(1, 2)
    torch.library.opcheck(operator, (q, None, None, None, eps, None, *(None,) * 4, False, False, across))


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("across", [True, False])
def test_compiles_to_one_graph_of_plain_torch_for_every_length(across, interleaved, device, any_backend):
    torch.compiler.reset()
    targets = set()

    def backend(graph, _):
        targets.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def compiled(arguments):
        return qk_norm_rope(**arguments)

    with torch._dynamo.config.patch(error_on_recompile=True):
        for N, M in ((9, 7), (20, 33), (5, 64)):
            arguments = make(2, N, M, 4, 2, 8, 4, interleaved=interleaved, across=across, device=device)
            for out, expected in zip(compiled(arguments), exact(**arguments), strict=True):
                assert relative_error(out, expected) <= 1e-5
    assert targets and not any("qk_norm_rope" in target for target in targets)


def test_exports_to_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")

    class Heads(torch.nn.Module):
        def __init__(self, norms, rotate):
            super().__init__()
            self.norms, self.rotate = norms, rotate

        def forward(self, q, k):
            return qk_norm_rope(q, k, norms=self.norms, rotate=self.rotate)

    arguments = make(2, 9, 7, 4, 2, 8, 4)
    module = Heads(arguments["norms"], arguments["rotate"])
    path = str(tmp_path / "heads.onnx")
    inputs = arguments["q"], arguments["k"]
    torch.onnx.export(module, inputs, path, dynamo=True, input_names=["q", "k"], verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outs = session.run(None, {"q": inputs[0].numpy(), "k": inputs[1].numpy()})
    for out, expected in zip(outs, exact(**arguments), strict=True):
        assert relative_error(torch.from_numpy(out), expected) <= 1e-5


ROTARY = tables(9, 8)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": None}, r"q: got NoneType, expected a tensor \(B, N, H, D\)"),
        ({"q": torch.zeros(2, 9, 32)}, r"q: got shape \(2, 9, 32\), expected \(B, N, H, D\)"),
        ({"q": torch.zeros(2, 9, 0, 8)}, r"q: got shape \(2, 9, 0, 8\), .* at least one head"),
        ({"q": torch.zeros(2, 9, 4, 8, dtype=torch.int32)}, "q: got torch.int32, expected one of torch.float16"),
        ({"k": torch.zeros(2, 7, 2, 8, dtype=float16)}, "k: got torch.float16, expected torch.float32 as q"),
        ({"k": torch.zeros(1, 7, 2, 8)}, r"k: got shape \(1, 7, 2, 8\), expected \(2, M, Hkv, 8\)"),
        ({"k": torch.zeros(2, 7, 2, 8, device="meta")}, "k: on meta, expected cpu"),
        ({"k": None}, "k: got None, expected a tensor: norms or rotate has an entry for it"),
        ({"norms": 1e-5}, "norms: got float, expected a pair"),
        ({"norms": (1e-5, None)}, r"norms: q has float, expected a pair \(weight, eps\)"),
        ({"norms": ((torch.ones(8), "1e-5"), None)}, "norms: eps of q is str, expected a number"),
        ({"norms": (None, (None, -1.0))}, "norms: eps of k is -1.0, expected a finite number, 0 or more"),
        ({"norms": ((torch.ones(32), 0.1), None)}, r"norms: weight of q has shape \(32,\), expected \(8,\)"),
        ({"norms": ((torch.ones(8, dtype=torch.int64), 0.1), None)}, "norms: weight of q is torch.int64"),
        ({"norms": (None, ([1.0] * 8, 0.1))}, "norms: weight of k is list, expected a tensor or None"),
        ({"norms": (None, (torch.ones(8, device="meta"), 0.1))}, "norms: weight of k is on meta, expected cpu as k"),
        ({"across_heads": True}, r"norms: weight of q has shape \(8,\), expected \(32,\)"),
        ({"rotate": ROTARY}, "rotate: got Rotary, expected a pair"),
        ({"rotate": (ROTARY[:2], None)}, r"rotate: q has tuple, expected \(cos, sin, interleaved\)"),
        ({"rotate": (ROTARY, ROTARY)}, r"rotate: cos of k has shape \(9, 4\), expected \(7, R/2\) or \(2, 7, R/2\)"),
        ({"rotate": (tables(9, 10), None)}, r"rotate: cos of q has shape \(9, 5\), .* with R of 2 to 8"),
        ({"rotate": (tables(9, 8, batch=(3,)), None)}, r"rotate: cos of q has shape \(3, 9, 4\)"),
        ({"rotate": (ROTARY._replace(sin=ROTARY.sin.half()), None)}, "rotate: cos of q is torch.float32 .* alike"),
        ({"rotate": (ROTARY._replace(sin=1.0), None)}, "rotate: sin of q is float, expected a tensor"),
        ({"rotate": (ROTARY._replace(cos=torch.ones(9, 4).cfloat()), None)}, "rotate: cos of q is torch.complex64"),
        ({"rotate": (ROTARY._replace(cos=torch.ones(9, 4, device="meta")), None)}, "rotate: cos of q is on meta"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        qk_norm_rope(**make(2, 9, 7, 4, 2, 8, 4) | change)


@st.composite
def calls(draw):
    """Arguments that fit each other, often with something changed."""
    sizes = [draw(st.integers(1, 3)) for _ in range(5)] + [draw(st.integers(1, 6))]
    arguments = make(*sizes, sizes[-1] // 2 * 2, interleaved=draw(st.booleans()), across=draw(st.booleans()))
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(["q", "k", "norms", "rotate", "across_heads"]))
        if name in ("q", "k"):
            shape = draw(st.lists(st.integers(0, 4), min_size=3, max_size=5))
            dtype = draw(st.sampled_from([float32, float16, torch.float64, torch.int64]))
            arguments[name] = draw(st.sampled_from([None, torch.ones(shape, dtype=dtype)]))
        elif name == "across_heads":
            arguments[name] = not arguments[name]
        else:
            other = make(*(draw(st.integers(1, 3)) for _ in range(5)), 4, draw(st.sampled_from([2, 4])))[name]
            arguments[name] = draw(st.sampled_from([None, (None, None), (None, other[1]), other]))
    return arguments


@settings(max_examples=200, deadline=None)
@given(calls())
def test_returns_what_it_promises_or_names_the_argument(arguments):
    q, k = arguments["q"], arguments["k"]
    try:
        outs = qk_norm_rope(**arguments)
    except (ValueError, TypeError) as error:
        assert re.match(r"(q|k|norms|rotate)\b.*:", str(error)), error
    else:
        for out, x in zip((outs, None) if k is None else outs, (q, k), strict=True):
            assert x is None or (out.shape == x.shape and out.dtype == x.dtype and out.isfinite().all())
