"""patch, unpatch, patched, status and the handle."""

import copy
import functools
import warnings

import pytest
import torch
from torch import nn

import diffattn
from diffattn.patch import find_layers
from tests.models import BY_NAME
from tests.models.unets import build_unet, run_unet

pytestmark = pytest.mark.filterwarnings("ignore:diffattn. .* another mechanism")


class Pipeline:
    """What patch looks at in a DiffusionPipeline."""

    def __init__(self, **components):
        self.components = components


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return build_unet().eval()


@pytest.fixture
def pipe(unet):
    vae = BY_NAME["AutoencoderKL"].model()
    return Pipeline(unet=unet, vae=vae, tokenizer=object(), safety_checker=None)


def run(model):
    with torch.no_grad():
        return run_unet(model, torch.Generator().manual_seed(1))


def processors(target):
    return {layer.name: layer.attn.processor for layer in find_layers(target)}


def test_core_is_copied_per_layer(unet):
    core = diffattn.LinearAttention("elu1")
    handle = diffattn.patch(unet, core)
    cores = [p.core for p in handle.installed.values()]
    assert len({id(c) for c in cores} | {id(core)}) == len(cores) + 1


def test_conversion_takes_self_attention_of_the_denoiser(pipe):
    handle = diffattn.patch(pipe, "linear")
    assert handle.installed and all(name.startswith("unet.") and name.endswith("attn1") for name in handle.installed)
    assert set(handle.skipped.values()) == {"attends to text", "not part of the denoiser"}


def test_conversion_without_weights_says_so(unet):
    with pytest.warns(UserWarning, match="no distilled weights"):
        diffattn.patch(unet, "mqa")


def test_exact_cores_warn_of_nothing(unet):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diffattn.patch(unet, diffattn.SoftmaxAttention())


@pytest.mark.parametrize(
    "layers",
    [
        "mid_block*attn1",
        "unet.mid_block*attn1",
        ["no such layer", "mid*attn1"],
        lambda name, attn: name.startswith("unet.mid") and not attn.is_cross_attention,
    ],
    ids=["glob", "glob with component", "globs", "function"],
)
def test_layers_chooses(pipe, layers):
    handle = diffattn.patch(pipe, "linear", layers=layers)
    assert list(handle.installed) == ["unet.mid_block.attentions.0.transformer_blocks.0.attn1"]


def test_chosen_cross_attention_is_converted(unet):
    handle = diffattn.patch(unet, "linear", layers="mid_block*attn2")
    assert list(handle.installed) == ["mid_block.attentions.0.transformer_blocks.0.attn2"]
    assert run(unet).isfinite().all()


def test_patching_twice_equals_patching_once(unet):
    before = processors(unet)
    diffattn.patch(unet, "linear")
    once, out = processors(unet), run(unet)
    handle = diffattn.patch(unet, "linear")
    assert processors(unet) == once  # the same objects: loaded weights stay
    assert torch.equal(run(unet), out)
    handle.undo()
    assert processors(unet) == before


def test_another_core_replaces_the_first(unet):
    before = processors(unet)
    first = diffattn.patch(unet, "linear")
    diffattn.patch(unet, "mqa")
    first.undo()  # none of its processors is there any more
    assert all(isinstance(p.core, diffattn.GroupedQueryAttention) for p in diffattn.status(unet).installed.values())
    diffattn.unpatch(unet)
    assert processors(unet) == before


def test_patched_undoes_on_error(unet):
    before, out = processors(unet), run(unet)
    with pytest.raises(KeyError), diffattn.patched(unet, "linear") as handle:
        assert handle.installed
        raise KeyError
    assert processors(unet) == before
    assert torch.equal(run(unet), out)


def test_undo_keeps_what_the_user_installed_later(unet):
    from diffusers.models.attention_processor import AttnProcessor

    handle = diffattn.patch(unet, "linear")
    mine = AttnProcessor()
    unet.set_attn_processor(mine)
    handle.undo()
    diffattn.unpatch(unet)
    assert all(p is mine for p in processors(unet).values())


def test_stock_processors_with_weights_come_back(unet):
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(2, 2)

        def forward(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
            return hidden_states

    Weighted.__name__ = "AttnProcessor2_0"  # a subclass-like stand-in with parameters
    attn = find_layers(unet)[0].attn
    attn.set_processor(Weighted())
    keys, stock = set(unet.state_dict()), attn.processor
    assert any(".processor." in key for key in keys)
    handle = diffattn.patch(unet, diffattn.SoftmaxAttention())
    assert not any(".processor." in key for key in unet.state_dict())
    handle.undo()
    assert attn.processor is stock and set(unet.state_dict()) == keys


def test_deepcopy_of_a_patched_model_is_patched_and_can_be_undone(unet):
    stock = run(unet)
    diffattn.patch(unet, "linear")
    twin = copy.deepcopy(unet)
    assert torch.equal(run(twin), run(unet))
    diffattn.unpatch(twin)
    assert torch.equal(run(twin), stock)
    assert diffattn.status(unet).installed


def test_status_and_handle_print_a_table(unet):
    assert "0 of 8" in str(diffattn.status(unet))
    handle = diffattn.patch(unet, diffattn.LinearAttention("elu1"))
    lines = str(handle).splitlines()
    assert lines[0] == "diffattn: 4 of 8 attention layers patched"
    assert len(lines) == 9
    assert sum("LinearAttention(feature_map='elu1'" in line for line in lines) == 4
    assert sum("attends to text" in line for line in lines) == 4
    assert [line.split()[0] for line in lines[1:]] == list(processors(unet))  # in the model's order


def test_failure_half_way_changes_nothing(unet, tmp_path):
    diffattn.patch(unet, "mqa", layers="mid*attn1")
    before, out = processors(unet), run(unet)
    with pytest.raises(FileNotFoundError, match="weights"):
        diffattn.patch(unet, "linear", weights=str(tmp_path / "no weights"))
    assert processors(unet) == before
    assert torch.equal(run(unet), out)
    with pytest.raises(ValueError, match="compile"):
        diffattn.patch(unet, "linear", compile="fast")
    assert processors(unet) == before


@pytest.mark.parametrize(
    "error, match, arguments",
    [
        (ValueError, r"layers: 'attn3' matches none(.|\n)*mid_block", dict(layers="attn3")),
        (ValueError, "core: got 'linaer', expected one of linear, mqa", dict(core="linaer")),
        (TypeError, "core: got Linear", dict(core=nn.Linear(1, 1))),
        (ValueError, "attn1: kv_heads: got 3", dict(core=diffattn.GroupedQueryAttention(kv_heads=3))),
    ],
)
def test_wrong_arguments_are_named(unet, error, match, arguments):
    before = processors(unet)
    with pytest.raises(error, match=match):
        diffattn.patch(unet, **arguments)
    assert processors(unet) == before


def test_a_core_that_fits_no_layer_is_refused(unet):
    cross = nn.ModuleDict({"attn2": find_layers(unet)[1].attn})
    with pytest.raises(ValueError, match=r"fits no layer(.|\n)*attends to text"):
        diffattn.patch(cross, "linear")


def test_targets_without_known_attention_are_refused():
    with pytest.raises(TypeError, match="target: got str"):
        diffattn.patch("sd-turbo")
    with pytest.raises(ValueError, match="can be patched; found none"):
        diffattn.patch(nn.Linear(2, 2))


def test_unknown_processors_are_named(unet):
    class MyProcessor:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
            return hidden_states

    unet.set_attn_processor(MyProcessor())
    with pytest.raises(ValueError, match=r"mid_block.*attn1: no processor for MyProcessor"):
        diffattn.patch(unet)
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(_stock())
    handle = diffattn.patch(unet, "linear")
    assert len(handle.installed) == 1
    assert "no processor for MyProcessor" in handle.skipped.values()


def test_attention_without_a_processor_is_listed():
    """Such modules have no processor to swap; the table says so."""
    tiny = BY_NAME["SanaWMTransformer3DModel-softmax"]
    handle = diffattn.patch(tiny.model(), diffattn.SoftmaxAttention())
    assert list(handle.installed) == ["blocks.0.cross_attn", "blocks.1.cross_attn"]
    assert "gives it no processor" in handle.skipped["blocks.0.attn.attn"]
    lines = str(handle).splitlines()
    assert lines[1].startswith("blocks.0.attn.attn ") and lines[-1].startswith("blocks.1.cross_attn ")


def test_set_attn_processor_by_hand(unet):
    stock = run(unet)
    for processor in (diffattn.LinearAttnProcessor("elu1"), diffattn.MQAAttnProcessor()):
        unet.set_attn_processor(processor)
        by_hand = run(unet)
        unet.set_attn_processor(_stock())
        assert torch.equal(run(unet), stock)
        with diffattn.patched(unet, processor.core):
            # Cross-attention stayed softmax. `patch` pools weights, one processor for all layers their outputs.
            assert (run(unet) - by_hand).norm() <= 1e-5 * by_hand.norm()
    with pytest.raises(TypeError, match="feature_map"):
        diffattn.LinearAttnProcessor(nn.ReLU())


def _stock():
    from diffusers.models.attention_processor import AttnProcessor2_0

    return AttnProcessor2_0()


def test_compile_is_off_unless_asked_for(unet):
    diffattn.patch(unet, "linear")
    assert all(m._compiled_call_impl is None for m in unet.modules())


@pytest.mark.parametrize("mode, modules", [("regional", 4), ("full", 1)])
def test_compile_and_undo(unet, mode, modules, monkeypatch):
    """Compiled in place by the model's own methods; undo brings the eager model back."""
    # The graph is what is tested here, not the minute that inductor takes to build it.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    stock = run(unet)
    monkeypatch.setattr(diffattn.config, "compile", mode)
    handle = diffattn.patch(unet, diffattn.SoftmaxAttention())
    assert sum(m._compiled_call_impl is not None for m in unet.modules()) == modules
    assert (run(unet) - stock).norm() / stock.norm() <= 1e-5
    handle.undo()
    assert all(m._compiled_call_impl is None for m in unet.modules())
    assert torch.equal(run(unet), stock)


def test_a_failure_after_compiling_leaves_an_eager_model(unet, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    with pytest.raises(FileNotFoundError):
        diffattn.patch(unet, "linear", compile="regional", weights=str(tmp_path / "no weights"))
    assert all(m._compiled_call_impl is None for m in unet.modules())
    assert not diffattn.status(unet).installed


def test_a_model_that_names_no_repeated_blocks_is_left_as_it_was():
    sana = BY_NAME["SanaTransformer2DModel"].model()
    before = processors(sana)
    with pytest.raises(ValueError, match=r"compile: got .regional.*SanaTransformer2DModel; expected .full."):
        diffattn.patch(sana, compile="regional")
    assert processors(sana) == before
