"""Models that stock alone does not export, and the parts and operators that stand in for theirs."""

import pytest
import torch
from torch import nn

import diffattn
from diffattn.layers import find_layers
from diffattn.traceable import traceable
from diffattn.traceable_parts import RealTables
from tests.graphs.cases import FAMILY, patch_all
from tests.models import BY_NAME
from tests.models.base import Rand
from tests.models.stock import relative_error


def inputs_of(name: str) -> dict:
    return BY_NAME[name].inputs(Rand(torch.Generator().manual_seed(1)))


@pytest.fixture
def to_onnx():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from diffattn.export import to_onnx

    return to_onnx


@pytest.mark.onnx
@pytest.mark.parametrize(
    "name",
    [
        "QwenImageTransformer2DModel",  # complex tables, cut and joined
        "MochiTransformer3DModel",  # a loop over the batch, a stable sort
        "ChromaTransformer2DModel",  # queries with every key masked
    ],
)
def test_exports_without_a_patch_and_leaves_the_model_as_it_was(name, to_onnx, tmp_path):
    model = BY_NAME[name].model()
    before = {layer.name: getattr(layer.attn, "processor", None) for layer in find_layers(model)}
    # Compares with the stock model, on other numbers.
    to_onnx(model, tmp_path / "model.onnx", sample_inputs=inputs_of(name), dynamic=False, progress=None)
    after = {layer.name: getattr(layer.attn, "processor", None) for layer in find_layers(model)}
    assert before.keys() == after.keys() and all(after[key] is before[key] for key in before)


@pytest.mark.parametrize(
    "name, part",
    [
        ("PixArtTransformer2DModel", "pos_embed"),
        ("SD3Transformer2DModel", "pos_embed"),
        ("MochiTransformer3DModel", "rope"),
        ("QwenImageTransformer2DModel", "pos_embed"),
        ("NucleusMoEImageTransformer2DModel", "pos_embed"),
        ("ZImageTransformer2DModel", "rope_embedder"),
        ("OmniGenTransformer2DModel", "rope"),
    ],
)
def test_parts_compute_what_stock_computes(name, part):
    model = patch_all(BY_NAME[name].model())
    stock = getattr(model, part)
    call = traceable(model)
    assert getattr(call, part) is not stock and getattr(model, part) is stock
    # Of pictures that are not square, too, and not of the size in the config.
    sizes = FAMILY[name].other_inputs() if name in FAMILY else []
    for inputs in (inputs_of(name), *sizes):
        inputs = inputs | dict(return_dict=False)
        with torch.no_grad():
            ours, expected = call(**inputs)[0], model(**inputs)[0]
        for one, other in zip(ours, expected, strict=True):  # a tensor, or Z-Image's list of them
            assert relative_error(one, other) <= 1e-5


@pytest.mark.filterwarnings("ignore:diffattn. .* another mechanism")
def test_tables_of_real_numbers_are_for_our_processors():
    model = BY_NAME["QwenImageTransformer2DModel"].model()
    assert traceable(model) is model
    diffattn.patch(model, "linear")
    assert isinstance(traceable(model).pos_embed, RealTables)
    diffattn.unpatch(model)
    assert traceable(model) is model


@pytest.mark.parametrize("name", ["QwenImageTransformer2DModel", "ZImageTransformer2DModel"])
def test_a_copy_with_tables_of_real_numbers_refuses_a_model_unpatched_since(name):
    """They would reach processors that take complex ones."""
    model, inputs = patch_all(BY_NAME[name].model()), inputs_of(name)
    call = traceable(model)
    for compiled in (call, torch.compile(call, backend="eager")):
        patch_all(model)
        with torch.no_grad():
            compiled(**inputs)
            diffattn.unpatch(model)
            with pytest.raises(Exception, match=r"diffattn.patch\(model\) first"):
                compiled(**inputs)


def test_a_picture_beyond_the_table_is_refused():
    family = FAMILY["SD3Transformer2DModel"]
    call, inputs = traceable(family.patched()), family.inputs()
    size = 2 * call.pos_embed.pos_embed_max_size + 2
    with pytest.raises(
        RuntimeError, match=r"hidden_states: more rows or columns of patches than .* pos_embed_max_size"
    ):
        call(**inputs | dict(hidden_states=torch.zeros(*inputs["hidden_states"].shape[:3], size)))


class Operators(nn.Module):
    """What stands in `diffattn.export_operators`, of x (batch, 5) and its mask."""

    def forward(self, x, mask, return_dict=True):
        steps = (x * 2).round()
        parts = [x.unsqueeze(1).squeeze(1), x.squeeze(1), (mask & (x > 0)).masked_fill(mask, True)]
        for values in (steps, steps.int(), steps > 0, steps.to(torch.int8), steps.half()):
            for descending in (True, False):
                parts += torch.sort(values, dim=1, stable=True, descending=descending)
        parts += torch.sort(steps, dim=0, stable=True)
        return (torch.cat([part.float() for part in parts], dim=1),)


@pytest.mark.onnx
def test_operators(to_onnx, tmp_path):
    inputs = dict(x=torch.randn(4, 5), mask=torch.tensor([[True, False, True, False, True]] * 4))
    free = {key: {0: "batch"} for key in inputs}
    to_onnx(Operators(), tmp_path / "model.onnx", sample_inputs=inputs, dynamic=free, progress=None)


class Attend(nn.Module):
    """Attention whose first query has no key."""

    def __init__(self):
        super().__init__()
        self.core = diffattn.SoftmaxAttention()

    def forward(self, q, additive, return_dict=True):
        first = torch.arange(q.shape[1])[:, None] == 0
        mask = additive.masked_fill(first, float("-inf"))
        return (torch.cat([self.core(q, q, q, mask=m) for m in (mask, mask > float("-inf"))]),)


@pytest.mark.onnx
@pytest.mark.parametrize("opset", [None, 23])
def test_a_query_without_a_key_gets_zeros(opset, to_onnx, tmp_path):
    inputs = dict(q=torch.randn(2, 5, 3, 8), additive=torch.randn(1, 1, 5, 5))
    assert not Attend()(**inputs)[0][:, 0].any()
    options = dict(sample_inputs=inputs, dynamic=False, opset=opset, progress=None)
    to_onnx(Attend(), tmp_path / "model.onnx", **options)


class Fails(nn.Module):
    def forward(self, x):
        if not torch.compiler.is_exporting() and x.shape[0] == 1:
            raise ValueError("a batch of one")
        return x * 2


@pytest.mark.onnx
def test_errors_of_the_check(to_onnx, tmp_path, monkeypatch):
    from diffattn.export import ExportError

    path, options = tmp_path / "model.onnx", dict(sample_inputs=dict(x=torch.ones(2, 3)), progress=None)
    with pytest.raises(ExportError, match=r"Fails itself fails at batch 1: a batch of one\. Pass dynamic="):
        to_onnx(Fails(), path, **options)
    import onnxruntime

    def refuse(*args, **kwargs):
        raise RuntimeError("[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(
        ExportError, match=r"ONNX Runtime cannot load .*model\.onnx \(the file is kept\): .*NOT_IMPLEMENTED"
    ):
        to_onnx(Fails(), path, **options)
    assert path.exists()


@pytest.mark.parametrize(("keep", "hide"), [(1.0, 0.0), (0.0, -1e4)])
def test_masks_of_other_sizes_hold_the_same_two_numbers(keep, hide):
    """Random numbers near those of an additive mask would overflow where linear attention takes their exponential."""
    from diffattn.export_inputs import resized

    key = ("encoder_attention_mask",)
    mask = torch.full((2, 1, 7), keep)
    mask[1, :, -3:] = hide
    fresh = resized({key: mask}, {key: {0: "batch", 2: "text"}}, {"batch": 3, "text": 9}, seed=0)[key]
    assert fresh.shape == (3, 1, 9)
    assert (fresh[:2] == keep).all()
    assert fresh[2, 0].tolist() == [keep] * 6 + [hide] * 3
