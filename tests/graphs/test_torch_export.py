"""torch.export, AOTInductor and torch.jit.trace of patched models: the numbers of eager, at sizes not traced."""

import pytest
import torch
import torch._inductor
from torch import nn

import diffattn
from tests.graphs.cases import FAMILY, exported
from tests.models.stock import relative_error


@pytest.mark.parametrize(
    "name",
    [
        "UNet2DConditionModel",
        "SanaTransformer2DModel",
        "DreamLiteUNetModel",
        "Lumina2Transformer2DModel",
        "PixArtTransformer2DModel",
        "SD3Transformer2DModel",
        "MochiTransformer3DModel",
    ],
)
def test_exports_with_dynamic_batch_height_width_and_text(name):
    family = FAMILY[name]
    model = family.patched()
    call = family.traceable(model)
    program = exported(family, call).module()
    with torch.no_grad():
        for resolution, batch in ((1, 3), (2, 1)):
            inputs = family.inputs(resolution, batch)
            assert relative_error(program(**inputs)[0], call(**inputs)[0]) <= 1e-5


class Attend(nn.Module):
    """Two cores on the same q, k and v, the second with shared heads."""

    def __init__(self):
        super().__init__()
        self.linear, self.grouped = diffattn.LinearAttention("elu1"), diffattn.GroupedQueryAttention()

    def forward(self, q, k, v):
        return self.linear(q, k, v), self.grouped(q, k, v)


def qkv(batch: int, tokens: int):
    return tuple(torch.randn(batch, tokens, heads, 8) for heads in (4, 2, 2))


@pytest.fixture
def attend():
    named = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    return torch.export.export(Attend(), qkv(2, 6), dynamic_shapes=(named, named, named))


def test_an_export_reads_shared_heads_in_place(attend):
    """torch's own attention with shared heads, and no node that holds keys of as many heads as queries."""
    calls = [node for node in attend.graph.nodes if "scaled_dot_product_attention" in str(node.target)]
    assert [node.kwargs.get("enable_gqa") for node in calls] == [True]
    assert not any("repeat" in str(node.target) for node in attend.graph.nodes)
    q, k, v = qkv(3, 10)
    for ours, eager in zip(attend.module()(q, k, v), Attend()(q, k, v), strict=True):
        assert relative_error(ours, eager) <= 1e-5


def test_compiled_ahead_of_time_packaged_and_loaded(attend, tmp_path):
    path = torch._inductor.aoti_compile_and_package(attend, package_path=str(tmp_path / "attend.pt2"))
    loaded = torch._inductor.aoti_load_package(path)
    for batch, tokens in ((3, 10), (2, 33)):
        q, k, v = qkv(batch, tokens)
        for ours, eager in zip(loaded(q, k, v), Attend()(q, k, v), strict=True):
            assert relative_error(ours, eager) <= 1e-5


class Trace(nn.Module):
    """torch.jit.trace takes tensors in a row and returns tensors."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, sample, timestep, encoder_hidden_states):
        return self.model(sample, timestep, encoder_hidden_states, return_dict=False)[0]


@pytest.mark.parametrize("core", ["linear", "mqa", None])
@pytest.mark.filterwarnings("ignore:diffattn. .* another mechanism", "ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning")
def test_a_traced_unet_computes_what_eager_computes(core):
    family = FAMILY["UNet2DConditionModel"]
    model = family.patched() if core is None else family.model()
    if core is not None:
        diffattn.patch(model, core)
    names = ("sample", "timestep", "encoder_hidden_states")
    call = Trace(model)
    with torch.no_grad():
        traced = torch.jit.trace(call, tuple(family.inputs()[name] for name in names), check_trace=False)
        for batch in (2, 3):
            fresh = [family.inputs(batch=batch)[name] + (name == "sample") for name in names]
            assert relative_error(traced(*fresh), call(*fresh)) <= 1e-5
