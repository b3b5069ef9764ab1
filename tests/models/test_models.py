"""Every model class of diffusers with attention: exact is exact, conversion runs, undo leaves no trace."""

import pytest
import torch

import diffattn
from diffattn.patch import find_layers, find_unreachable
from diffattn.processors import BY_STOCK_NAME
from tests.models import MODELS, TinyModel
from tests.models.stock import built, is_linear, is_softmax, layers, relative_error, run

pytestmark = pytest.mark.filterwarnings("ignore:diffattn. .* another mechanism")

PATCHABLE = [m for m in MODELS if m.unreachable != "*"]
every_model = pytest.mark.parametrize("tiny", MODELS, ids=str)
patchable = pytest.mark.parametrize("tiny", PATCHABLE, ids=str)


def test_every_class_of_the_survey_is_here():
    """75 transformers, 27 autoencoders, 12 ControlNets and 12 UNets, and Anima's text conditioner."""
    assert len({m.cls for m in MODELS}) == 127


@every_model
def test_each_layer_has_a_processor_or_a_reason(tiny):
    model = built(tiny).model
    found = find_layers(model)
    without = {layer.name for layer in found if type(layer.stock).__name__ not in BY_STOCK_NAME}
    assert without == layers(model, tiny.unreachable)
    if tiny.unreachable != "*":
        return
    before = [layer.processor for layer in found]
    with pytest.raises(ValueError, match="no attention layer of") as error:
        diffattn.patch(model)
    for name in [layer.name for layer in found] + list(find_unreachable(model)):
        assert f"\n  {name}: " in str(error.value)
    assert [layer.processor for layer in found] == before


@patchable
def test_softmax_core_computes_what_stock_softmax_computes(tiny):
    stock = built(tiny)
    model = stock.model
    softmax = {layer.name for layer in find_layers(model) if layer.family and is_softmax(layer)}
    if not softmax:
        with pytest.raises(ValueError, match="linear attention already"):
            diffattn.patch(model, diffattn.SoftmaxAttention())
        return
    with diffattn.patched(model, diffattn.SoftmaxAttention()) as handle:
        assert handle.installed.keys() == softmax
        for ours, theirs in zip(run(tiny, model), stock.results, strict=True):
            assert relative_error(ours, theirs) <= 1e-5


@patchable
def test_exact_patch_computes_what_stock_computes(tiny):
    stock = built(tiny)
    model = stock.model
    with diffattn.patched(model) as handle:
        assert handle.installed.keys() == layers(model, tiny.fused)
        if not handle.installed:
            assert any("fast path" in reason for reason in handle.skipped.values())
            return
        for ours, theirs in zip(run(tiny, model), stock.results, strict=True):
            assert relative_error(ours, theirs) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("tiny", [m for m in MODELS if m.fused], ids=str)
def test_exact_patch_runs_its_kernels_on_a_gpu(tiny):
    """The same bar with the Triton kernels in place of the reference; convolutions without TF32 on both sides."""
    with torch.device("cuda"), torch.backends.cudnn.flags(allow_tf32=False):
        model = tiny.model().cuda()

        def both():
            model.zero_grad()
            out = tiny.run(model, torch.Generator("cuda").manual_seed(1))
            out.square().mean().backward()
            return out.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

        stock = both()
        diffattn.patch(model)
        for ours, theirs in zip(both(), stock, strict=True):
            assert relative_error(ours, theirs) <= 1e-5


@patchable
def test_a_converted_core_takes_what_attends_to_itself(tiny):
    stock = built(tiny)
    model = stock.model
    exact = {layer.name for layer in find_layers(model) if layer.family and is_linear(layer)}
    expected = layers(model, tiny.converts)
    if not expected | exact:
        with pytest.raises(ValueError, match="fits no layer"):
            diffattn.patch(model, "linear")
        return
    before = {layer.name: layer.processor for layer in find_layers(model)}
    with diffattn.patched(model, "linear") as handle:
        assert handle.installed.keys() == expected | exact
        for layer in find_layers(model):
            assert layer.patched or layer.processor is before[layer.name]
        changes = {}
        if tiny.pair_mask != ():
            with pytest.raises(ValueError, match="linear attention can mask keys"):
                tiny.run(model)
            if tiny.pair_mask is None:
                return
            changes = dict.fromkeys(tiny.pair_mask)
        results = run(tiny, model, **changes)
        assert all(t.isfinite().all() for t in results)
        if expected & stock.calls.keys():
            assert not torch.equal(results[0], stock.results[0])  # another mechanism
    if expected:
        with diffattn.patched(model, "mqa"):
            assert all(t.isfinite().all() for t in run(tiny, model))


@patchable
def test_unpatch_leaves_no_trace(tiny):
    stock = built(tiny)
    model = stock.model
    before = {layer.name: layer.processor for layer in find_layers(model)}
    keys, attributes = list(model.state_dict()), {n: set(vars(m)) for n, m in model.named_modules()}
    linear_only = all(is_linear(layer) for layer in find_layers(model) if layer.family)
    diffattn.patch(model, None if linear_only else diffattn.SoftmaxAttention())
    assert list(model.state_dict()) == keys  # cores without weights add none
    diffattn.unpatch(model)
    assert {layer.name: layer.processor for layer in find_layers(model)} == before
    assert list(model.state_dict()) == keys
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    with torch.no_grad(), tiny.reference():
        assert torch.equal(tiny.run(model), stock.inference)


PADDED = [(m, "softmax") for m in MODELS if m.padded]
# Where a linear core is exact or chosen, and takes the mask.
PADDED += [(m, "linear") for m, _ in PADDED if m.pair_mask == () and (m.converts or m.cls.startswith("Sana"))]


@pytest.mark.parametrize("tiny, core", PADDED, ids=str)
def test_padded_text_does_not_reach_the_image(tiny, core):
    """Text behind the mask may be anything."""
    model = built(tiny).model
    text, mask = tiny.padded

    def filled(fill):
        def inputs(rand):
            arguments = tiny.inputs(rand)
            hidden = ~arguments[mask].reshape(2, -1).bool()
            arguments[text] = arguments[text].clone()
            arguments[text][hidden] = fill
            return arguments

        with torch.no_grad():
            return TinyModel(tiny.cls, inputs=inputs).run(model)

    with diffattn.patched(model, diffattn.SoftmaxAttention() if core == "softmax" else "linear"):
        assert relative_error(filled(5.0), filled(-1.0)) <= 1e-6
