"""torch.compile of patched models: one graph, the numbers of eager, no more graphs than stock, never a stale one."""

import functools

import pytest
import torch
import torch._dynamo.testing
from diffusers.models.attention_processor import Attention
from torch._dynamo.testing import CompileCounterWithBackend

import diffattn
from diffattn.processors.lumina import Lumina2AttnProcessor
from diffattn.traceable import traceable
from tests.graphs.cases import FAMILIES, FAMILY, Family
from tests.models.stock import relative_error

pytestmark = pytest.mark.filterwarnings("ignore:diffattn. .* another mechanism")

# aot_eager runs Dynamo, functionalization and the split into forward and backward, all that attention has a part in,
# without the minute that inductor takes to build kernels. `eager` is Dynamo alone.


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradient(model) -> torch.Tensor:
    """Of all parameters; a compiled graph gives zeros where eager gives None."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])


def forward_and_backward(call, model, inputs):
    model.zero_grad()
    out = first(call(**inputs))
    out.square().mean().backward()
    return out.detach(), gradient(model)


def first(out) -> torch.Tensor:
    return out if isinstance(out, torch.Tensor) else out[0]


# One for each file of processors; docs/make_graphs.py compiles all.
SLOWER = ("UNet2DConditionModel", "DreamLiteUNetModel", "SanaVideoTransformer3DModel", "LuminaNextDiT2DModel")


@pytest.mark.parametrize("family", [f for f in FAMILIES if str(f) not in SLOWER], ids=str)
def test_forward_and_backward_are_one_graph_each(family):
    model = family.patched()
    call = family.traceable(model)
    inputs = family.inputs()
    expected = forward_and_backward(model, model, inputs)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(forward_and_backward(compiled, model, inputs), expected, strict=True):
        assert relative_error(ours, eager) <= 1e-5


@pytest.mark.parametrize("name", ["SanaTransformer2DModel", "FluxTransformer2DModel", "Lumina2Transformer2DModel"])
def test_no_graph_breaks(name):
    """`explain` compiles with breaks where there are any, and counts them."""
    family = FAMILY[name]
    with torch.no_grad():
        found = torch._dynamo.explain(family.traceable(family.patched()))(**family.inputs())
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


def graphs(family: Family, model) -> list[int]:
    """Graphs after each of: three resolutions, two other batches, 20 steps of denoising."""
    model, counts = family.traceable(model), []
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    calls = [family.inputs(resolution) for resolution in (0, 1, 2)]
    calls += [family.inputs(2, batch) for batch in (3, 4)]
    calls += [calls[-1] | dict(timestep=torch.full_like(calls[-1]["timestep"], 1 - step / 20)) for step in range(20)]
    with torch.no_grad():
        for inputs in calls:
            out = first(compiled(**inputs))
            counts.append(counter.frame_count)
            if len(counts) <= 5:
                assert relative_error(out, first(model(**inputs))) <= 1e-5
    return counts


@pytest.mark.parametrize("name", ["SanaTransformer2DModel", "SD3Transformer2DModel"])  # the second by parts
def test_sizes_that_change_make_no_more_graphs_than_stock(name):
    family = FAMILY[name]
    ours = graphs(family, family.patched())
    torch._dynamo.reset()
    assert all(a <= b for a, b in zip(ours, graphs(family, family.model()), strict=True))
    check(ours)


def test_sizes_that_change_where_stock_is_no_graph():
    family = FAMILY["Lumina2Transformer2DModel"]
    check(graphs(family, family.patched()))


def check(counts):
    assert counts[0] == 1
    assert counts[2] <= 2  # of three resolutions
    assert counts[4] - counts[2] <= 1  # of two more batches
    assert counts[5:] == [counts[4]] * 20  # a timestep is data


def test_a_scale_that_follows_the_length_makes_no_graph_for_each():
    """Lumina's: a logarithm of the number of tokens, which Python would take while tracing."""
    processor = Lumina2AttnProcessor(diffattn.GroupedQueryAttention())
    layer = Attention(32, heads=8, kv_heads=2, dim_head=4, qk_norm="rms_norm", processor=processor)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for length in (6, 9, 17, 40):
        x = torch.randn(2, length, 32)
        arguments = dict(encoder_hidden_states=x, base_sequence_length=3)
        assert relative_error(compiled(x, **arguments), layer(x, **arguments)) <= 1e-5
    assert counter.frame_count == 2


FLUX = FAMILY["FluxTransformer2DModel"]
WAYS = {
    "in place": lambda model: model.compile(fullgraph=True, backend="eager") or model,
    "wrapped": functools.partial(torch.compile, fullgraph=True, backend="eager"),
    "repeated blocks": lambda model: model.compile_repeated_blocks(fullgraph=True, backend="eager") or model,
}


@pytest.mark.parametrize("way", WAYS)
def test_patch_after_compile_is_never_a_stale_graph(way):
    """Stock compiled, then patched, patched over, and unpatched: each time what eager computes."""
    inputs, eager = FLUX.inputs(), FLUX.model()
    model = FLUX.model()
    compiled = WAYS[way](model)

    def both():
        with torch.no_grad():
            return compiled(**inputs)[0], eager(**inputs)[0]

    results = []
    for core in (None, "linear", "mqa", None, "linear"):
        for target in (compiled, eager):
            diffattn.unpatch(target)
            if core is not None:
                assert all(name.startswith("transf") or name.startswith("single") for name in (
                    diffattn.patch(target, core).installed
                ))  # fmt: skip
        ours, expected = both()
        assert relative_error(ours, expected) <= 1e-5
        results.append(ours)
    assert torch.equal(results[0], results[3]) and torch.equal(results[1], results[4])
    assert not any(torch.equal(results[i], results[j]) for i, j in ((0, 1), (1, 2), (0, 2)))


@pytest.mark.parametrize("mode", ["regional", "full"])
def test_patching_a_compiled_model_again(mode, monkeypatch):
    """patch(compile=...) twice with another core; unpatch then leaves no compiled call behind."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    inputs, model, eager = FLUX.inputs(), FLUX.model(), FLUX.model()
    with torch.no_grad():
        stock = eager(**inputs)[0]
        for core in ("linear", "mqa"):
            diffattn.patch(model, core, compile=mode)
            diffattn.patch(eager, core)
            assert relative_error(model(**inputs)[0], eager(**inputs)[0]) <= 1e-5
        diffattn.unpatch(model)
        assert all(m._compiled_call_impl is None for m in model.modules())
        assert torch.equal(model(**inputs)[0], stock)


@pytest.mark.skipif(torch.__version__.startswith("2.6"), reason="torch 2.6 does not trace it")
def test_lumina_2_compiles_where_stock_does_not(monkeypatch):
    """The forward of the model itself, in a pipeline too: patch(compile="full") takes one that a graph can hold."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    family = FAMILY["Lumina2Transformer2DModel"]
    model, inputs = family.model(), family.inputs()
    with torch.no_grad():
        stock = model(**inputs)[0]
        diffattn.patch(model, compile="full")
        assert relative_error(model(**inputs)[0], stock) <= 1e-5
        assert relative_error(model(**inputs | dict(return_dict=True)).sample, stock) <= 1e-5
        with pytest.raises(Exception, match="attention_kwargs: got scale"):
            model(**inputs, attention_kwargs={"scale": 0.5})
        diffattn.unpatch(model)
        assert torch.equal(model(**inputs)[0], stock)
        with pytest.raises(ValueError, match=r"diffattn.patch\(model\) first"):
            diffattn.patch(model, diffattn.SoftmaxAttention(), layers="layers.0.attn", compile="full")
        assert torch.equal(model(**inputs)[0], stock)


@pytest.mark.skipif(torch.__version__.startswith("2.6"), reason="torch 2.6 has other words for it")
def test_a_one_graph_forward_of_an_unpatched_model_is_refused():
    family = FAMILY["LuminaNextDiT2DModel"]
    model, inputs = family.patched(), family.inputs()
    call = traceable(model)
    for compiled in (call, torch.compile(call, fullgraph=True, backend="eager")):
        diffattn.patch(model)
        with torch.no_grad():
            compiled(**inputs)
            diffattn.unpatch(model)
            with pytest.raises(Exception, match=r"diffattn.patch\(model\) first"):
                compiled(**inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("name", ["SanaTransformer2DModel", "Lumina2Transformer2DModel", "DreamLiteUNetModel"])
def test_cuda_graphs_and_autotuning(name, mode):
    """Kernels in a replayed CUDA graph read the inputs of this call, and a second resolution gets its own."""
    family = FAMILY[name]
    with torch.backends.cudnn.flags(allow_tf32=False), torch.no_grad():
        model = family.patched().cuda()
        call = family.traceable(model)
        compiled = torch.compile(call, fullgraph=True, mode=mode)
        for resolution in (0, 0, 0, 1, 0) if mode == "reduce-overhead" else (0, 0):
            inputs = {n: t.cuda() if isinstance(t, torch.Tensor) else t for n, t in family.inputs(resolution).items()}
            picture = next(iter(inputs))
            inputs[picture] = torch.randn_like(inputs[picture])
            torch.compiler.cudagraph_mark_step_begin()
            assert relative_error(compiled(**inputs)[0].clone(), call(**inputs)[0]) <= 1e-5
