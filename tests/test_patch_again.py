"""A model that is patched is patched again: what the second patch keeps, what it says, what it leaves behind."""

import functools

import pytest
import torch
from torch import nn

import diffattn
from tests.plugins.common import UNET, out, processors

pytestmark = pytest.mark.filterwarnings("ignore:diffattn. .* another mechanism")


@pytest.fixture
def unet():
    return UNET.model()


@pytest.mark.parametrize("inner", ["mqa", "linear", None])
def test_a_block_leaves_the_patch_before_it(unet, inner):
    diffattn.patch(unet, "linear", layers="mid*attn1")
    had, result = processors(unet), out(UNET, unet)
    with diffattn.patched(unet, inner) as handle:
        assert bool(handle.installed) == (inner is not None)
        with diffattn.patched(unet, "hedgehog", layers="*attn1"):
            pass
    assert processors(unet) == had
    assert torch.equal(out(UNET, unet), result)
    assert list(diffattn.status(unet).installed) == ["mid_block.attentions.0.transformer_blocks.0.attn1"]
    diffattn.unpatch(unet)
    assert torch.equal(out(UNET, unet), out(UNET, UNET.model()))


def test_a_block_leaves_what_was_compiled_before_it(unet, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    with diffattn.patched(unet, "mqa", compile="full"):
        assert unet._compiled_call_impl is not None
    assert unet._compiled_call_impl is None
    diffattn.patch(unet, "linear", compile="full")
    with diffattn.patched(unet, "mqa", compile="full"):
        pass
    assert unet._compiled_call_impl is not None
    diffattn.unpatch(unet)
    assert unet._compiled_call_impl is None


def test_a_block_with_a_finalized_model_ends(unet):
    diffattn.patch(unet, "mqa")
    diffattn.finalize(unet)
    had = processors(unet)
    with diffattn.patched(unet, "mqa") as handle:
        assert handle.installed
    assert processors(unet) == had


def test_the_table_names_what_an_earlier_patch_left(unet):
    diffattn.patch(unet, "linear")
    for handle, left in ((diffattn.patch(unet), 4), (diffattn.patch(unet, "mqa", layers="mid*attn1"), 3)):
        lines = [line for line in str(handle).splitlines() if "keeps LinearAttention(feature_map='relu'" in line]
        assert len(lines) == left
        assert all(line.split()[1] == "PlainAttnProcessor" for line in lines)


class Power(nn.Module):
    def __init__(self, exponent):
        super().__init__()
        self.exponent = exponent

    def forward(self, x):
        return x.relu() ** self.exponent


def widened(function):
    return nn.Sequential(nn.Linear(4, 4), function)


MAPS = {
    "a number": (lambda: Power(2), lambda: Power(3)),
    "a module within": (lambda: widened(nn.ReLU()), lambda: widened(nn.Softplus())),
    "its setting": (lambda: nn.Softplus(1), lambda: nn.Softplus(4)),
}


@pytest.mark.parametrize("one, other", MAPS.values(), ids=MAPS)
def test_another_feature_map_of_the_same_class_is_another(unet, one, other):
    diffattn.patch(unet, diffattn.LinearAttention(one()))
    had = processors(unet)
    diffattn.patch(unet, diffattn.LinearAttention(one()))
    assert processors(unet) == had  # with their weights
    fresh = UNET.model()
    for model in (unet, fresh):
        torch.manual_seed(1)
        diffattn.patch(model, diffattn.LinearAttention(other()))
    assert torch.equal(out(UNET, unet), out(UNET, fresh))


@pytest.mark.parametrize("order", ["unpatch first", "unfuse first"])
@pytest.mark.parametrize("core", ["linear", "mqa"])
def test_a_patch_over_fused_projections_replaces_the_one_before_them(unet, core, order):
    """fuse_qkv_projections puts the first patch aside; what unfusing brings back has to be stock's."""
    had, stock = processors(unet), out(UNET, unet)
    diffattn.patch(unet, "linear")
    unet.fuse_qkv_projections()
    diffattn.patch(unet, core, layers="mid*attn1")
    calls = [lambda: diffattn.unpatch(unet), unet.unfuse_qkv_projections]
    for call in calls if order == "unpatch first" else reversed(calls):
        call()
    diffattn.unpatch(unet)
    assert processors(unet) == had
    assert torch.equal(out(UNET, unet), stock)


def test_a_failed_patch_over_fused_projections_leaves_the_one_before_them(unet, monkeypatch):
    diffattn.patch(unet, "mqa")
    had = processors(unet)
    unet.fuse_qkv_projections()
    monkeypatch.setattr(unet, "compile_repeated_blocks", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        diffattn.patch(unet, "mqa", compile="regional")
    unet.unfuse_qkv_projections()
    assert processors(unet) == had
    assert len(diffattn.status(unet).installed) == 4


def test_a_processor_over_a_finalized_core_is_named(unet):
    from diffusers.models.attention_processor import AttnProcessor2_0

    diffattn.patch(unet, "mqa")
    diffattn.finalize(unet)
    unet.set_attn_processor(AttnProcessor2_0())
    handle = diffattn.patch(unet)
    reason = "finalized, then AttnProcessor2_0 was set, which cannot run it: load the model anew"
    assert list(handle.skipped.values()).count(reason) == 4
    with pytest.raises(ValueError, match=rf"fits no layer(.|\n)*{reason}"):
        diffattn.patch(unet, "mqa")


def test_processors_set_by_hand_say_what_to_do(unet):
    from diffusers.models.attention_processor import AttnProcessor2_0

    unet.set_attn_processor(diffattn.LinearAttnProcessor("elu1"))
    with pytest.raises(
        ValueError, match=r"no processor for LinearAttnProcessor: diffattn's own.*set one of diffusers"
    ):
        diffattn.patch(unet, "linear")
    unet.set_attn_processor(AttnProcessor2_0())
    assert len(diffattn.patch(unet, "linear").installed) == 4


def own(unet, roles):
    for layer in diffattn.status(unet)._layers.values():
        layer.processor.core.own(layer.family.layer_info(layer.attn), roles)


def test_weights_without_projections_after_weights_with_some(unet, tmp_path):
    """The second folder says which weights the cores have: projections that the first brought go."""
    diffattn.patch(unet, "linear")
    result = out(UNET, unet)
    diffattn.save_weights(unet, tmp_path / "plain")
    own(unet, ["q", "k"])
    diffattn.save_weights(unet, tmp_path / "projections")
    diffattn.patch(unet, weights=tmp_path / "projections")
    had = processors(unet)
    diffattn.patch(unet, weights=tmp_path / "projections")
    assert processors(unet) == had
    diffattn.patch(unet, weights=tmp_path / "plain")
    assert not any("projections" in name for name in unet.state_dict())
    assert torch.equal(out(UNET, unet), result)


@pytest.mark.parametrize("core", ["mqa", "hedgehog", "linfusion", "sparse"])
def test_weights_made_under_inference_mode_can_be_trained_and_loaded(unet, core, tmp_path):
    diffattn.patch(unet, core)
    own(unet, ["out"])
    diffattn.save_weights(unet, tmp_path)
    diffattn.unpatch(unet)
    with torch.inference_mode():
        diffattn.patch(unet, core)
        diffattn.load_weights(unet, tmp_path)
    diffattn.load_weights(unet, tmp_path)
    UNET.run(unet).sum().backward()
    assert all(p.requires_grad for q in diffattn.status(unet).installed.values() for p in q.parameters())
