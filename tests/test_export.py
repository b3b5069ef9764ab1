"""Exports compute what the models compute, at sizes that were not traced, with ONNX's own operators."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from diffattn import GroupedQueryAttention, LinearAttention
from diffattn.export import ExportError, to_onnx
from diffattn.patch import find_layers, patch, status
from diffattn.processors.lumina import Lumina2AttnProcessor
from tests.models import BY_NAME
from tests.models.base import TinyModel

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.onnx


def tiny(name: str, **changes) -> nn.Module:
    """The tiny model of that name, or a smaller one: tracing takes a second for each layer."""
    return TinyModel(name, BY_NAME[name].config | changes).model()


def run(path, **inputs) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: t.numpy() for name, t in inputs.items()})[0])


def operators(path) -> Counter:
    nodes = onnx.load(path, load_external_data=False).graph.node
    assert {node.domain for node in nodes} <= {"", "ai.onnx"}
    return Counter(node.op_type for node in nodes)


def copies(path, **inputs) -> list[str]:
    """Nodes that could repeat a tensor and make it larger than it was."""
    model = onnx.load(path)
    nodes = [n for n in model.graph.node if n.op_type in ("Expand", "Tile", "Gather", "GatherElements", "GatherND")]
    for node in nodes:
        for name in (node.input[0], node.output[0]):
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    sizes = [t.size for t in session.run(None, {name: t.numpy() for name, t in inputs.items()})[1:]]
    return [n.name for n, before, after in zip(nodes, sizes[::2], sizes[1::2], strict=True) if after > before]


def axes(path) -> dict[str, list]:
    graph = onnx.load(path, load_external_data=False).graph
    return {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in graph.input}


HEIGHT = {"sample": {0: "batch", 2: "height", 3: "width"}}
DREAMLITE = dict(
    down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
    up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
)


class Affine(nn.Module):
    """The smallest thing with the call of a model."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 1, 1))

    def forward(self, sample, return_dict=True):
        return (sample * self.weight,)


class Attend(nn.Module):
    """A core as a model of q, k and v."""

    def __init__(self, core):
        super().__init__()
        self.core = core

    def forward(self, q, k, v, mask=None, return_dict=True):
        return (self.core(q, k, v, mask=mask),)


class GroupedLayer(nn.Module):
    """Lumina 2's attention, with the scale that grows with the sequence."""

    def __init__(self, kv_heads: int):
        super().__init__()
        from diffusers.models.attention_processor import Attention

        processor = Lumina2AttnProcessor(GroupedQueryAttention())
        self.attn = Attention(32, heads=8, kv_heads=kv_heads, dim_head=4, qk_norm="rms_norm", processor=processor)

    def forward(self, hidden_states, return_dict=True):
        return (self.attn(hidden_states, encoder_hidden_states=hidden_states, base_sequence_length=3),)


@pytest.mark.parametrize(
    "name, changes, core",
    [
        ("SanaTransformer2DModel", dict(num_layers=1), None),
        ("Lumina2Transformer2DModel", dict(num_layers=1), None),
        ("DreamLiteUNetModel", dict(block_out_channels=(16, 32), **DREAMLITE), None),
        ("UNet2DConditionModel", dict(mid_block_type=None), "linear"),
        ("StableAudioDiTModel", dict(num_layers=1), None),
        ("AutoencoderDC", {}, None),
    ],
)
@pytest.mark.filterwarnings("ignore:diffattn. .* no distilled weights")
def test_a_model_equals_its_file_at_other_sizes(name, changes, core, tmp_path):
    model, said = tiny(name, **changes), []
    if core is not None:
        patch(model, core)
    before = [layer.attn.processor for layer in find_layers(model)]
    path = to_onnx(model, tmp_path / "model.onnx", progress=said.append)
    assert all(a is b.attn.processor for a, b in zip(before, find_layers(model), strict=True))
    assert sum("differs by" in line for line in said) == 3
    assert operators(path)
    named = axes(path)
    assert named.get("sample", named.get("hidden_states")) == {
        "AutoencoderDC": ["batch", 3, "height", "width"],
        "StableAudioDiTModel": ["batch", 4, "length"],
    }.get(name, ["batch", 4, "height", "width"])
    assert name == "AutoencoderDC" or named["encoder_hidden_states"] == ["batch", "text", 16]
    if name == "StableAudioDiTModel":
        assert named["rotary_embedding_0"] == named["rotary_embedding_1"] == ["length + 1", 8]


@pytest.mark.parametrize("opset", [None, 23, 24])
def test_key_value_heads_are_not_copied_and_the_scale_follows_the_length(opset, tmp_path):
    graphs = []
    for kv_heads in (4, 1):
        path = to_onnx(
            GroupedLayer(kv_heads),
            tmp_path / f"{kv_heads}.onnx",
            sample_inputs={"hidden_states": torch.randn(2, 6, 32)},
            dynamic={"hidden_states": {0: "batch", 1: "tokens"}},  # compared at 6 and at 12 tokens
            opset=opset,
        )
        graphs.append(operators(path))
        assert not copies(path, hidden_states=torch.randn(2, 6, 32))
    assert graphs[0] == graphs[1]
    assert graphs[0]["Attention"] == (opset is not None)


def test_a_mask_of_keys_reaches_the_attention_operator(tmp_path):
    """ONNX Runtime takes masks with a row for each query alone: the mask grows, keys and values do not."""
    model = Attend(GroupedQueryAttention())
    q, k, v = torch.randn(2, 6, 4, 8), torch.randn(2, 5, 2, 8), torch.randn(2, 5, 2, 8)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])[:, None, None]
    dynamic = dict(q={0: "batch", 1: "queries"}, mask={0: "batch", 3: "keys"})
    dynamic |= {name: {0: "batch", 1: "keys"} for name in "kv"}
    samples = dict(q=q, k=k, v=v, mask=mask)
    path = to_onnx(model, tmp_path / "m.onnx", sample_inputs=samples, dynamic=dynamic, opset=23)
    assert operators(path)["Attention"] == 1
    torch.testing.assert_close(run(path, **samples), model(**samples)[0], rtol=1e-5, atol=1e-6)
    assert len(copies(path, **samples)) == 1  # the mask: neither keys nor values


def test_a_row_without_features_gives_zeros(tmp_path):
    q, k, v = (torch.randn(2, 6, 2, 4) for _ in range(3))
    dynamic = {name: {0: "batch", 1: "tokens"} for name in "qkv"}
    model = Attend(LinearAttention("relu", eps=1e-15))
    path = to_onnx(model, tmp_path / "m.onnx", sample_inputs=dict(q=q, k=k, v=v), dynamic=dynamic)
    q[:, ::2] = -1.0
    out = run(path, q=q, k=k, v=v)
    assert not out[:, ::2].any()
    torch.testing.assert_close(out, model(q, k, v)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_emoji_pipeline_draws_the_same_picture_in_onnx_runtime(tmp_path, monkeypatch):
    """Text to picture with every denoising step in ONNX Runtime: the last bit of a colour may differ."""
    import numpy
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(Path(__file__).parents[1] / "examples" / "emoji" / "model")
    pipe.set_progress_bar_config(disable=True)

    def draw():
        generator = torch.Generator().manual_seed(0)
        return numpy.asarray(pipe("rocket", num_inference_steps=4, generator=generator).images[0]).astype(int)

    eager = draw()
    path = to_onnx(pipe, tmp_path / "unet.onnx", check=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def forward(sample, timestep, encoder_hidden_states, **_):
        times = timestep.float().expand(sample.shape[0])
        given = dict(sample=sample, timestep=times, encoder_hidden_states=encoder_hidden_states)
        return (torch.from_numpy(session.run(None, {name: t.numpy() for name, t in given.items()})[0]),)

    monkeypatch.setattr(pipe.unet, "forward", forward)
    difference = abs(draw() - eager)
    assert eager.std() > 10  # a picture, not a colour
    assert difference.max() <= 1


def test_a_file_that_differs_is_kept_and_the_error_says_where(tmp_path, monkeypatch):
    model, save = Affine(), torch.onnx.ONNXProgram.save

    def save_then_train(*args, **options):
        save(*args, **options)
        model.weight.data.add_(1)

    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", save_then_train)
    with pytest.raises(ExportError, match=r"(?s)the file is kept.*batch 1, height 8, width 8: differs by"):
        to_onnx(model, tmp_path / "m.onnx", sample_inputs={"sample": torch.randn(2, 4, 4, 8)}, dynamic=HEIGHT)
    assert (tmp_path / "m.onnx").exists()


def test_large_weights_lie_beside_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr("diffattn.export.EXTERNAL_BYTES", 8)
    path = to_onnx(Affine(), tmp_path / "m.onnx", sample_inputs={"sample": torch.randn(2, 4, 4, 6)})
    assert (tmp_path / "m.onnx.data").exists()
    assert axes(path) == {"sample": ["batch", 4, "height", "width"]}


def test_nothing_is_dynamic_unless_asked(tmp_path):
    path = to_onnx(Affine(), tmp_path / "m.onnx", sample_inputs={"sample": torch.randn(2, 4, 4, 6)}, dynamic=False)
    assert axes(path) == {"sample": [2, 4, 4, 6]}


SAMPLE = torch.randn(2, 4, 4, 6)


@pytest.mark.parametrize(
    "model, path, options, error, match",
    [
        (Affine(), "m.onnx", {}, ValueError, "sample_inputs: Affine is a class that they are not known for"),
        (Affine(), "m.pt", {}, ValueError, "path: got m.pt"),
        (Affine(), "no/m.onnx", {}, ValueError, "path: there is no folder"),
        (Affine(), "m.onnx", dict(sample_inputs=dict(x=SAMPLE)), ValueError, "sample_inputs: Affine takes no x"),
        (Affine(), "m.onnx", dict(sample_inputs=[SAMPLE]), TypeError, "sample_inputs: got list"),
        (Affine(), "m.onnx", dict(sample_inputs=dict(sample=SAMPLE[:1])), ValueError, "batch is 1 in sample"),
        (Affine(), "m.onnx", dict(sample_inputs=dict(sample=SAMPLE), dynamic={"q": {}}), ValueError, "dynamic: q"),
        (Affine(), "m.onnx", dict(sample_inputs=dict(sample=SAMPLE), opset=9), ValueError, "opset: got 9"),
        (
            Affine(),
            "m.onnx",
            dict(sample_inputs=dict(sample=SAMPLE), dynamic={"sample": {2: "rows", 3: "rows + 1"}}),
            ValueError,
            "rows . 1 is 6, expected 5",
        ),
        (
            Affine(),
            "m.onnx",
            dict(sample_inputs=dict(sample=SAMPLE), dynamic={"sample": {3: "rows + 1"}}),
            ValueError,
            "dynamic: got the axis 'rows . 1'",
        ),
        (Affine(), "m.onnx", dict(sample_inputs=dict(sample=SAMPLE), dynamic=1), TypeError, "dynamic: got 1"),
        (Affine().half(), "m.onnx", dict(sample_inputs=dict(sample=SAMPLE)), ValueError, "check: .* float32"),
        (object(), "m.onnx", {}, TypeError, "model_or_pipe: got object"),
    ],
)
def test_what_does_not_fit_is_an_error_before_anything_is_written(model, path, options, error, match, tmp_path):
    with pytest.raises(error, match=match):
        to_onnx(model, tmp_path / path, **options)
    assert not list(tmp_path.iterdir())


def command(*arguments) -> int:
    from diffattn import cli

    result = CliRunner().invoke(cli.app, ["export", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code


def test_the_command_says_by_its_exit_code_what_happened(tmp_path, monkeypatch):
    from diffusers import SanaTransformer2DModel

    config = BY_NAME["SanaTransformer2DModel"].config
    SanaTransformer2DModel(**config | dict(num_layers=1)).save_pretrained(tmp_path / "model")
    out = tmp_path / "m.onnx"
    assert command(tmp_path / "nothing", "--out", out) == 2
    assert command(tmp_path / "model", "--out", tmp_path / "no" / "m.onnx") == 2
    assert command(tmp_path / "model", "--weights", "w", "--out", out) == 2
    assert command(tmp_path / "model", "--core", "linaer", "--out", out) == 2
    assert not out.exists()
    assert command(tmp_path / "model", "--static", "--out", out) == 0
    monkeypatch.setattr("diffattn.export.TOLERANCE", -1.0)
    assert command(tmp_path / "model", "--static", "--out", out) == 1
    assert out.exists()


def test_the_command_takes_every_core_that_patch_takes(tmp_path, monkeypatch):
    from diffusers import FluxTransformer2DModel

    FluxTransformer2DModel(**BY_NAME["FluxTransformer2DModel"].config).save_pretrained(tmp_path / "model")
    exported = []
    monkeypatch.setattr("diffattn.export.to_onnx", lambda model, path, **options: exported.append(model))
    with pytest.warns(UserWarning, match="another mechanism"):
        assert command(tmp_path / "model", "--core", "hedgehog", "--out", tmp_path / "m.onnx") == 0
    assert {p.core.config()["feature_map"] for p in status(exported[0]).installed.values()} == {"hedgehog"}
