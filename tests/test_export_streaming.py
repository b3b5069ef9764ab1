"""A step of a stream as an ONNX graph: its states go in and out, and a hundred of them are the stream."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffattn import CausalLinearAttention, SoftmaxAttention
from diffattn.export import ExportError, to_onnx

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.onnx


class Sequence(nn.Module):
    """Tokens in a row, two layers."""

    def __init__(self, *cores):
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(8, 24) for _ in cores)
        self.cores = nn.ModuleList(cores)

    def forward(self, x):
        for qkv, core in zip(self.qkv, self.cores, strict=True):
            q, k, v = (t.unflatten(-1, (2, 4)) for t in qkv(x).chunk(3, -1))
            x = x + core(q, k, v).flatten(2)
        return x


def test_a_sequence_model_with_its_states(tmp_path):
    """Decays of a head; batch and tokens of a step change in the comparison that the export makes."""
    from diffattn.export_streaming import _compare, describe
    from diffattn.streaming import streaming

    torch.manual_seed(0)
    model = Sequence(CausalLinearAttention("elu1"), CausalLinearAttention("relu", decay=[-0.1, -1.0]))
    path = to_onnx(
        model, tmp_path / "step.onnx", sample_inputs=dict(x=torch.randn(2, 5, 8)), streaming=True, progress=None
    )
    assert describe(path) == [
        dict(name=f"cores.{i}", input=f"cores.{i}", output=f"next_cores.{i}", shape=["batch", 2, 20], dtype="float32")
        for i in range(2)
    ]
    graph = onnx.load(path).graph
    assert [i.name for i in graph.input] == ["x", "cores.0", "cores.1"]
    assert [o.name for o in graph.output] == ["out", "next_cores.0", "next_cores.1"]
    first = graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in first] == ["batch", "tokens", 8]
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}

    # a file that computes something else is found out
    model.qkv[1].weight.data *= 1.1
    with torch.no_grad(), streaming(model, None) as stream, pytest.raises(ExportError, match="step 1 differs by"):
        inputs = {("x",): torch.randn(2, 5, 8)}
        _compare(path, stream, inputs, {}, {0: "batch", 1: "tokens"}, describe(path), print)


def test_what_has_no_fixed_state_is_refused(tmp_path):
    model = Sequence(SoftmaxAttention())
    samples = dict(x=torch.randn(2, 5, 8))
    with pytest.raises(ValueError, match="window: got None"):
        to_onnx(model, tmp_path / "step.onnx", sample_inputs=samples, streaming=True, progress=None)
    with pytest.raises(TypeError, match="dynamic: got"):
        to_onnx(
            Sequence(CausalLinearAttention()), tmp_path / "step.onnx", sample_inputs=samples, streaming=True,
            dynamic={"x": {1: "tokens"}}, progress=None,
        )  # fmt: skip
    with pytest.raises(ValueError, match="batch is 1 in x"):
        to_onnx(
            Sequence(CausalLinearAttention()), tmp_path / "step.onnx", sample_inputs=dict(x=torch.randn(1, 5, 8)),
            streaming=True, progress=None,
        )  # fmt: skip
    for tokens, opset, message in ((1, None, "tokens is 1 in x"), (5, 10, "opset: got 10")):
        with pytest.raises(ValueError, match=message):
            to_onnx(
                Sequence(CausalLinearAttention()), tmp_path / "step.onnx", opset=opset, streaming=True, progress=None,
                sample_inputs=dict(x=torch.randn(2, tokens, 8)),
            )  # fmt: skip
    assert not (tmp_path / "step.onnx").exists()


class Scaled(Sequence):
    def forward(self, x, scales):
        return super().forward(x * scales[0] + scales[1])


class Prompted(Sequence):
    """Attends to a text as well, of which a mask leaves a part."""

    def forward(self, x, text, mask):
        text = text[:, None]
        x = x[:, None] + F.scaled_dot_product_attention(x[:, None], text, text, attn_mask=mask[:, None, None])
        return super().forward(x[:, 0])


def test_masks_with_the_attention_operator(tmp_path):
    """Translated as without states: ONNX Runtime takes no mask of one query for several."""
    samples = dict(x=torch.randn(2, 5, 8), text=torch.randn(2, 3, 8), mask=torch.tensor([[1, 1, 1], [1, 1, 0]]) > 0)
    path = to_onnx(
        Prompted(CausalLinearAttention("elu1")), tmp_path / "step.onnx", sample_inputs=samples, streaming=True,
        opset=23, progress=None,
    )  # fmt: skip
    assert "Attention" in {node.op_type for node in onnx.load(path).graph.node}


def test_tensors_of_a_tuple_and_modes_of_parts(tmp_path):
    model = Scaled(CausalLinearAttention("elu1")).train()
    model.qkv.eval()
    samples = dict(x=torch.randn(2, 5, 8), scales=(torch.randn(8), torch.randn(8)))
    path = to_onnx(model, tmp_path / "step.onnx", sample_inputs=samples, streaming=True, progress=None)
    assert [i.name for i in onnx.load(path).graph.input] == ["x", "scales_0", "scales_1", "cores.0"]
    assert (model.training, model.cores.training, model.qkv.training) == (True, True, False)


@pytest.mark.slow
def test_the_example_runs_a_hundred_frames(tmp_path):
    """SANA-Video's transformer, its temporal convolution and rotary embedding included."""
    path = Path(__file__).parents[1] / "examples" / "onnx_stream.py"
    spec = importlib.util.spec_from_file_location("onnx_stream", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    assert example.main(frames=100, layers=1, folder=str(tmp_path)) <= 1e-4
