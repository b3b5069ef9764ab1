"""Cores with weights of their own in one graph: torch.compile without a break, ONNX files that compute the same."""

import pytest
import torch

import diffattn
from tests.models.base import TinyModel
from tests.models.unets import UNET, unet_inputs
from tests.plugins.common import error, load_lora, out

pytestmark = pytest.mark.filterwarnings("ignore:diffattn. .* another mechanism")

#: All in one model, of as few layers as that takes: each takes a second to trace.
CORES = {"down*attn1": "linfusion", "mid*attn1": "mqa", "*attn2": "hedgehog"}
SMALL = TinyModel("UNet2DConditionModel", UNET | dict(up_block_types=("UpBlock2D", "UpBlock2D")), unet_inputs)


def converted(lora=False):
    """All weights of the cores are random, so that each counts, and the projections are their own too."""
    unet = SMALL.model()
    for layers, core in CORES.items():
        handle = diffattn.patch(unet, core, layers=layers)
        assert handle.installed
        for name, processor in handle.installed.items():
            layer = handle._layers[name]
            processor.core.own(layer.family.layer_info(layer.attn), ["q", "k", "v", "out"])
    generator = torch.Generator().manual_seed(0)
    for processor in diffattn.status(unet).installed.values():
        for parameter in processor.parameters():
            parameter.data += torch.randn(parameter.shape, generator=generator) / 8
    if lora:
        load_lora(unet, SMALL)
    return unet


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
def test_one_graph(lora):
    unet = converted(lora)
    expected = out(SMALL, unet)
    torch._dynamo.reset()
    unet.compile(backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert error(out(SMALL, unet), expected) <= 1e-5
        assert error(out(SMALL, unet), expected) <= 1e-5


@pytest.mark.onnx
def test_onnx(tmp_path):
    """`to_onnx` compares with the model in ONNX Runtime, at sizes that were not traced; finalized models too."""
    for module in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(module)
    from diffattn.export import to_onnx

    unet = converted()
    diffattn.finalize(unet)
    assert to_onnx(unet, tmp_path / "unet.onnx", progress=None).stat().st_size > 0


def test_context_parallelism_is_refused():
    processor = next(iter(diffattn.status(converted()).installed.values()))
    with pytest.raises(NotImplementedError, match="unpatch"):
        processor._parallel_config = object()


@pytest.mark.onnx
def test_export_takes_distilled_weights_by_themselves(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    import diffattn.export
    from diffattn.cli import app

    unet, seen = converted(), {}
    expected = out(SMALL, unet)
    folder = str(diffattn.save_weights(unet, tmp_path / "weights"))
    SMALL.model().save_pretrained(tmp_path / "unet")
    monkeypatch.setattr(diffattn.export, "to_onnx", lambda target, path, **options: seen.update(target=target))
    result = CliRunner().invoke(app, ["export", str(tmp_path / "unet"), "--weights", folder])
    assert result.exit_code == 0, result.output
    assert torch.equal(out(SMALL, seen["target"]), expected)
