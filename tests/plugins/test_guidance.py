"""Guidance that skips or perturbs layers by hooks: layer skip, SD3's `skip_layers`, diffusers' guiders."""

import pytest
import torch

import diffattn
from tests.models import BY_NAME
from tests.plugins.common import UNET, error, learned, out, processors

pytestmark = pytest.mark.filterwarnings("ignore:diffattn. .* another mechanism")

COGVIDEO = BY_NAME["CogVideoXTransformer3DModel"]
SD3 = BY_NAME["SD3Transformer2DModel"]
MID = "mid_block.attentions.0.transformer_blocks"
#: Layer skip that reaches into the attention of the UNet's middle block, and the layers that it hooks.
INTO_ATTENTION = {
    "attention": dict(skip_ff=False),
    "scores": dict(skip_attention=False, skip_attention_scores=True, skip_ff=False),
}


class Pipeline:
    """What patch looks at in a modular pipeline: a guider is a component."""

    def __init__(self, **components):
        self.components = components


def skip(model, **options):
    from diffusers.hooks import LayerSkipConfig, apply_layer_skip

    apply_layer_skip(model, LayerSkipConfig(indices=[0], **options))


@pytest.mark.parametrize("core", [diffattn.SoftmaxAttention, lambda: "linear"], ids=["softmax", "linear"])
@pytest.mark.parametrize("first", ["patch", "skip"])
def test_whole_blocks_are_skipped(core, first):
    model, stock = COGVIDEO.model(), COGVIDEO.model()
    skip(stock, fqn="transformer_blocks")
    expected, plain = out(COGVIDEO, stock), out(COGVIDEO, model)
    assert error(expected, plain) > 1e-3
    if first == "skip":
        skip(model, fqn="transformer_blocks")
    diffattn.patch(model, core())
    if first == "patch":
        skip(model, fqn="transformer_blocks")
    ours = out(COGVIDEO, model)
    assert error(ours, expected) <= 1e-5 if core is diffattn.SoftmaxAttention else error(ours, expected) > 1e-5
    diffattn.unpatch(model)
    assert torch.equal(out(COGVIDEO, model), expected)


def test_skip_layers_of_sd3():
    model = SD3.model()
    stock, plain = out(SD3, model, skip_layers=[0]), out(SD3, model)
    assert error(stock, plain) > 1e-3
    diffattn.patch(model, diffattn.SoftmaxAttention())
    assert error(out(SD3, model, skip_layers=[0]), stock) <= 1e-5
    diffattn.unpatch(model)
    assert torch.equal(out(SD3, model, skip_layers=[0]), stock)


@pytest.mark.parametrize("how", INTO_ATTENTION)
def test_layers_whose_attention_is_skipped_stay_stock(how):
    """The hooks know stock's processors alone, and take torch's attention for the identity."""
    unet = UNET.model()
    plain = out(UNET, unet)
    skip(unet, fqn=MID, **INTO_ATTENTION[how])
    had, stock = processors(unet), out(UNET, unet)
    assert error(stock, plain) > 1e-4
    handle = diffattn.patch(unet, diffattn.SoftmaxAttention())
    assert {name for name in handle.skipped if "guidance perturbs" in handle.skipped[name]} == {f"{MID}.0.attn1"}
    assert len(handle.installed) == 7
    assert error(out(UNET, unet), stock) <= 1e-5
    diffattn.unpatch(unet)
    assert torch.equal(out(UNET, unet), stock) and processors(unet) == had


@pytest.mark.parametrize("how", INTO_ATTENTION)
def test_skipping_attention_under_a_patch_is_refused_by_diffusers(how):
    """It names the processor; nothing is hooked, so unpatch, skip, patch works."""
    unet = UNET.model()
    diffattn.patch(unet, learned())
    patched = out(UNET, unet)
    with pytest.raises(ValueError, match=r"diffattn\.processors.* not registered"):
        skip(unet, fqn=MID, **INTO_ATTENTION[how])
    assert torch.equal(out(UNET, unet), patched)
    diffattn.unpatch(unet)
    skip(unet, fqn=MID, **INTO_ATTENTION[how])
    assert diffattn.patch(unet, learned()).installed


def guided(guider, unet):
    """One step: what the model predicts for each of the guider's conditions."""
    guider.set_state(step=2, num_inference_steps=10, timestep=torch.tensor(500))
    predictions = []
    for _ in range(guider.num_conditions):
        guider.prepare_models(unet)
        predictions.append(out(UNET, unet))
        guider.cleanup_models(unet)
    return predictions


@pytest.mark.parametrize("core", [diffattn.SoftmaxAttention, learned])
def test_perturbed_attention_guidance_of_modular_pipelines(core):
    """The layers that the guider names stay stock."""
    from diffusers.guiders import PerturbedAttentionGuidance
    from diffusers.hooks import LayerSkipConfig

    config = LayerSkipConfig(indices=[0], fqn=MID, **INTO_ATTENTION["scores"])
    unet = UNET.model()
    guider = PerturbedAttentionGuidance(perturbed_guidance_config=config, perturbed_guidance_stop=1)
    had, stock = processors(unet), guided(guider, unet)
    assert len(stock) == 3 and error(stock[2], stock[0]) > 1e-4  # it guides
    handle = diffattn.patch(Pipeline(unet=unet, guider=guider), core())
    kept = [name for name, reason in handle.skipped.items() if "guidance perturbs" in reason]
    assert kept == [f"unet.{MID}.0.attn1", f"unet.{MID}.0.attn2"]
    ours = guided(guider, unet)
    assert error(ours[2], ours[0]) > 1e-4
    for a, b in zip(ours, stock, strict=True):
        assert error(a, b) <= 1e-5 if core is diffattn.SoftmaxAttention else error(a, b) > 1e-5
    handle.undo()
    assert processors(unet) == had
    assert all(torch.equal(a, b) for a, b in zip(guided(guider, unet), stock, strict=True))


@pytest.mark.parametrize("first", ["patch", "guidance"])
@pytest.mark.parametrize("core", [diffattn.SoftmaxAttention, learned])
def test_smoothed_energy_guidance_blurs_queries(core, first):
    """Its hook is on `to_q`, whoever calls that."""
    from diffusers.hooks.smoothed_energy_guidance_utils import (
        SmoothedEnergyGuidanceConfig,
        _apply_smoothed_energy_guidance_hook,
    )

    def guide(model):
        _apply_smoothed_energy_guidance_hook(model, SmoothedEnergyGuidanceConfig(indices=[0], fqn=MID), 1.0)

    unet, stock = UNET.model(), UNET.model()
    for model in (unet, stock):  # sharp attention, which notices
        model.get_submodule(MID)[0].attn1.to_q.weight.data *= 50
    plain = out(UNET, stock)
    guide(stock)
    expected = out(UNET, stock)
    assert error(expected, plain) > 1e-4
    if first == "guidance":
        guide(unet)
    diffattn.patch(unet, core())
    unguided = out(UNET, unet)
    if first == "patch":
        guide(unet)
        assert error(out(UNET, unet), unguided) > 1e-5
    ours = out(UNET, unet)
    assert error(ours, expected) <= 1e-5 if core is diffattn.SoftmaxAttention else error(ours, expected) > 1e-5
    diffattn.unpatch(unet)
    assert torch.equal(out(UNET, unet), expected)


@pytest.mark.parametrize("layers", [1, [1]])
def test_a_guider_that_names_no_stack_keeps_layers_of_that_number_stock(layers):
    """diffusers finds the stack in the call; a pattern of ours has to match whatever it may find."""
    from diffusers.guiders import PerturbedAttentionGuidance

    model = SD3.model()
    pipe = Pipeline(transformer=model, guider=PerturbedAttentionGuidance(perturbed_guidance_layers=layers))
    assert list(diffattn.patch(pipe, "linear").installed) == ["transformer.transformer_blocks.0.attn"]
