"""What conditions a UNet beside text: T2I-Adapters, GLIGEN's boxes, AnimateDiff's motion modules, FreeNoise."""

import pytest
import torch

import diffattn
from tests.models import BY_NAME, TinyModel
from tests.models.unets import unet_inputs
from tests.plugins.common import UNET, error, learned, out, processors
from tests.plugins.test_pipelines import ABSENT, draw, pipeline

pytestmark = pytest.mark.filterwarnings("ignore:diffattn. .* another mechanism")

CORES = pytest.mark.parametrize("core", [diffattn.SoftmaxAttention, learned])


def as_on_stock(ours, stock, core) -> bool:
    return error(ours, stock) <= 1e-5 if core is diffattn.SoftmaxAttention else error(ours, stock) > 1e-5


@CORES
def test_t2i_adapter_acts(core):
    from diffusers import T2IAdapter

    torch.manual_seed(0)
    adapter = T2IAdapter(in_channels=3, channels=(16, 32), num_res_blocks=1, downscale_factor=2)
    pipe = pipeline("StableDiffusionAdapterPipeline", adapter=adapter.eval())
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    had, stock = processors(pipe), draw(pipe, image=picture)
    diffattn.patch(pipe, core())
    ours, free = draw(pipe, image=picture), draw(pipe, image=picture, adapter_conditioning_scale=0.0)
    assert as_on_stock(ours, stock, core) and error(free, ours) > 1e-3
    diffattn.unpatch(pipe)
    assert processors(pipe) == had and torch.equal(draw(pipe, image=picture), stock)


GLIGEN = TinyModel("UNet2DConditionModel", UNET.config | dict(attention_type="gated"), unet_inputs)


@CORES
def test_gligen_boxes_act(core):
    """Its gated layers attend to the picture and the boxes together, as self-attention of both."""
    unet = GLIGEN.model()
    for name, parameter in unet.named_parameters():
        if "alpha" in name:
            parameter.data.fill_(1.0)
        if "fuser.attn.to_q" in name or "fuser.attn.to_v" in name:
            parameter.data *= 10  # boxes that matter, in a model of random weights

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        boxes = dict(
            boxes=torch.rand(2, 3, 4, generator=generator),
            masks=torch.ones(2, 3),
            positive_embeddings=torch.randn(2, 3, 16, generator=generator),
        )
        return out(GLIGEN, unet, cross_attention_kwargs={"gligen": boxes})

    had, stock = processors(unet), run(1)
    assert error(run(2), stock) > 1e-4  # boxes act
    handle = diffattn.patch(unet, core())
    assert any("fuser.attn" in name for name in handle.installed)
    ours = run(1)
    assert as_on_stock(ours, stock, core) and error(run(2), ours) > 1e-4
    diffattn.unpatch(unet)
    assert processors(unet) == had and torch.equal(run(1), stock)


@pytest.fixture
def animation():
    import diffusers

    adapter = diffusers.MotionAdapter(
        block_out_channels=(16, 32),
        motion_layers_per_block=1,
        motion_norm_num_groups=4,
        motion_num_attention_heads=4,
        motion_max_seq_length=8,
    )
    torch.manual_seed(1)
    for parameter in adapter.parameters():  # the output projections start at 0, and nothing would move
        torch.nn.init.normal_(parameter, 0, 0.3)
    pipe = diffusers.AnimateDiffPipeline(
        unet=UNET.model(),
        motion_adapter=adapter,
        vae=BY_NAME["AutoencoderKL"].model(),
        scheduler=diffusers.DDIMScheduler(num_train_timesteps=10, clip_sample=False, steps_offset=1),
        **dict.fromkeys(ABSENT.keys() - {"safety_checker"}),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def animate(pipe):
    generator = torch.Generator().manual_seed(3)
    text = torch.randn(2, 1, 7, 16, generator=generator)
    return pipe(
        prompt_embeds=text[0],
        negative_prompt_embeds=text[1],
        num_frames=4,
        num_inference_steps=2,
        output_type="latent",
        generator=generator,
        height=16,
        width=16,
    ).frames


@pytest.mark.parametrize("core", [diffattn.SoftmaxAttention, lambda: "linear"], ids=["softmax", "linear"])
def test_animatediff(animation, core):
    """Motion modules attend over frames; a conversion takes them too, unless `layers` says otherwise."""
    had, stock = processors(animation), animate(animation)
    handle = diffattn.patch(animation, core())
    assert any(name.startswith("unet.") and "motion_modules" in name for name in handle.installed)
    ours = animate(animation)
    assert error(ours, stock) <= 1e-5 if core is diffattn.SoftmaxAttention else error(ours, stock) > 1e-4
    diffattn.unpatch(animation)
    assert processors(animation) == had and torch.equal(animate(animation), stock)
    assert "motion_modules" not in str(diffattn.patch(animation, core(), layers="*.attentions.*").installed)


def frames(pipe, number=8):
    """The UNet on a longer video than its motion modules were made for."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        sample = torch.randn(1, 4, number, 8, 8, generator=generator)
        text = torch.randn(number, 7, 16, generator=generator)
        return pipe.unet(sample, torch.tensor([3]), text).sample


def free_noise(pipe):
    pipe.enable_free_noise(context_length=4, context_stride=2)


@pytest.mark.parametrize("core", [diffattn.SoftmaxAttention, lambda: "linear"], ids=["softmax", "linear"])
def test_free_noise_before_the_patch(animation, core):
    plain = frames(animation)
    free_noise(animation)
    had, stock = processors(animation.unet), frames(animation)
    assert error(stock, plain) > 1e-3  # windows over frames
    handle = diffattn.patch(animation, core())
    assert any("motion_modules" in name for name in handle.installed)
    ours = frames(animation)
    assert error(ours, stock) <= 1e-5 if core is diffattn.SoftmaxAttention else error(ours, stock) > 1e-4
    diffattn.unpatch(animation)
    assert processors(animation.unet) == had and torch.equal(frames(animation), stock)
    animation.disable_free_noise()
    assert torch.equal(frames(animation), plain)


def test_free_noise_under_a_patch_makes_the_motion_modules_anew(animation):
    """Blocks with stock processors take their places, and `status()` says so; the other layers stay patched."""
    diffattn.patch(animation, "linear")
    free_noise(animation)
    installed = diffattn.status(animation).installed
    assert installed and not any("motion_modules" in name for name in installed)
    before = frames(animation)
    handle = diffattn.patch(animation, "linear")
    assert any("motion_modules" in name for name in handle.installed)
    assert error(frames(animation), before) > 1e-4
    diffattn.unpatch(animation)
    assert not diffattn.status(animation).installed


def test_free_noise_over_motion_modules_with_weights_of_cores_is_refused(animation):
    """diffusers copies the weights of a block and finds more than it knows: unpatch, enable, patch."""
    layers = "unet.down_blocks.0.motion_modules*attn1"
    assert diffattn.patch(animation, learned(), layers=layers).installed
    with pytest.raises(RuntimeError, match=r"(?s)FreeNoiseTransformerBlock.*attn1\.processor\.core"):
        free_noise(animation)
    diffattn.unpatch(animation)
    free_noise(animation)
    assert diffattn.patch(animation, learned(), layers=layers).installed
    assert frames(animation).isfinite().all()
