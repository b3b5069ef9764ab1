"""Tiny pipelines: guidance that sets processors, ControlNet, caches, files."""

import inspect
import logging
import warnings

import pytest
import torch

import diffattn
from tests.models import BY_NAME
from tests.plugins.common import FLUX, UNET, error, learned, out, processors

pytestmark = pytest.mark.filterwarnings("ignore:diffattn. .* another mechanism")


@pytest.fixture
def log(caplog):
    """What diffusers logs; its loggers need not propagate to pytest's."""
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


#: What the tests give as tensors instead.
ABSENT = dict.fromkeys(["text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder"])


def pipeline(cls="StableDiffusionPipeline", **options):
    import diffusers

    vae = BY_NAME["AutoencoderKL"].model()
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=10, clip_sample=False, steps_offset=1)
    cls = getattr(diffusers, cls)
    options |= ABSENT | dict(requires_safety_checker=False)
    known = {name: options[name] for name in inspect.signature(cls).parameters.keys() & options.keys()}
    pipe = cls(unet=UNET.model(), vae=vae, scheduler=scheduler, **known)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, **arguments):
    generator = torch.Generator().manual_seed(3)
    text = torch.randn(2, 1, 7, 16, generator=generator)
    return pipe(
        prompt_embeds=text[0],
        negative_prompt_embeds=text[1],
        num_inference_steps=3,
        output_type="latent",
        generator=generator,
        height=16,
        width=16,
        **arguments,
    ).images


@pytest.mark.parametrize("core", [diffattn.SoftmaxAttention, learned])
def test_perturbed_attention_guidance_keeps_its_layers(core):
    """PAG assigns plain processors, which nn.Module refuses over a module: its layers stay stock."""
    pipe = pipeline("StableDiffusionPAGPipeline", pag_applied_layers=["mid"])
    had, stock, unguided = processors(pipe), draw(pipe, pag_scale=3.0), draw(pipe, pag_scale=0.0)
    assert error(unguided, stock) > 1e-5  # it guides
    handle = diffattn.patch(pipe, core())
    assert handle.installed and not any("mid_block" in name for name in handle.installed if "unet" in name)
    patched = processors(pipe)
    ours = draw(pipe, pag_scale=3.0)
    assert processors(pipe) == patched
    if core is learned:
        assert error(ours, stock) > 1e-5
    else:
        assert error(ours, stock) <= 1e-5
    diffattn.unpatch(pipe)
    assert processors(pipe) == had and torch.equal(draw(pipe, pag_scale=3.0), stock)


def test_perturbed_attention_guidance_of_a_patched_model_is_refused_with_what_works():
    """A model knows nothing of its pipeline; in the order of its layers, some of which could take PAG's processors."""
    pipe = pipeline("StableDiffusionPAGPipeline", pag_applied_layers=["mid"])
    stock = draw(pipe, pag_scale=3.0)
    diffattn.patch(pipe.unet, diffattn.SoftmaxAttention(), layers="*.attn1")
    patched, unguided = processors(pipe), draw(pipe, pag_scale=0.0)
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1"
    with pytest.raises(RuntimeError, match=rf"{layer}: StableDiffusionPAG.*unpatch.*diffattn\.patch\(pipe\)"):
        draw(pipe, pag_scale=3.0)
    assert processors(pipe) == patched and torch.equal(draw(pipe, pag_scale=0.0), unguided)
    # The pipeline was patched, and took other layers since; those of the first pattern are stock.
    diffattn.unpatch(pipe.unet)
    diffattn.patch(pipe, diffattn.SoftmaxAttention())
    assert error(draw(pipe, pag_scale=3.0), stock) <= 1e-5
    patched = processors(pipe)
    pipe.set_pag_applied_layers(["mid", "up"])
    with pytest.raises(RuntimeError, match=r"up_blocks.*: StableDiffusionPAG.*layers \['mid', 'up'\]"):
        draw(pipe, pag_scale=3.0)
    assert processors(pipe) == patched


def test_perturbed_attention_guidance_beside_the_chosen_layers_of_a_model():
    """Cross-attention of the same block too, which PAG leaves alone."""
    pipe = pipeline("StableDiffusionPAGPipeline", pag_applied_layers=["mid"])
    had, stock = processors(pipe), draw(pipe, pag_scale=3.0)
    others = ["down*", "up*", "*.attn2"]
    assert len(diffattn.patch(pipe.unet, diffattn.SoftmaxAttention(), layers=others).installed) == 7
    assert error(draw(pipe, pag_scale=3.0), stock) <= 1e-5
    diffattn.unpatch(pipe.unet)
    assert processors(pipe) == had


def test_self_attention_guidance_keeps_its_layer():
    pipe = pipeline("StableDiffusionSAGPipeline")
    pipe.unet.register_to_config(attention_head_dim=[4, 8])  # the pipeline takes a list or a number
    had, stock, unguided = processors(pipe), draw(pipe, sag_scale=1.0), draw(pipe, sag_scale=0.0)
    assert error(unguided, stock) > 1e-4  # it guides
    handle = diffattn.patch(pipe, diffattn.SoftmaxAttention())
    kept = [name for name, reason in handle.skipped.items() if "guidance perturbs" in reason]
    assert kept == ["unet.mid_block.attentions.0.transformer_blocks.0.attn1"]
    assert error(draw(pipe, sag_scale=1.0), stock) <= 1e-5
    handle.undo()
    assert processors(pipe) == had and torch.equal(draw(pipe, sag_scale=1.0), stock)


@pytest.mark.parametrize("core", [diffattn.SoftmaxAttention, learned])
def test_controlnet_acts(core):
    from diffusers import ControlNetModel

    torch.manual_seed(0)
    control = ControlNetModel.from_unet(
        UNET.model(), conditioning_channels=3, conditioning_embedding_out_channels=(4, 4)
    )
    for parameter in control.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, 0, 0.3)
    pipe = pipeline("StableDiffusionControlNetPipeline", controlnet=control.eval())
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    had, stock = processors(pipe), draw(pipe, image=picture)
    handle = diffattn.patch(pipe, core())
    ours, free = draw(pipe, image=picture), draw(pipe, image=picture, controlnet_conditioning_scale=0.0)
    assert error(free, ours) > 1e-3  # the picture acts
    if core is learned:
        assert not any(name.startswith("controlnet") for name in handle.installed)
    else:
        assert any(name.startswith("controlnet") for name in handle.installed)
        assert error(ours, stock) <= 1e-5
    diffattn.unpatch(pipe)
    assert processors(pipe) == had and torch.equal(draw(pipe, image=picture), stock)


#: The timestep that the caches are told; FasterCache fills itself in the first two of four.
clock = [0]


def config_of(name, **options):
    import diffusers

    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    return getattr(diffusers, name)(**options)


def first_block():
    return config_of("FirstBlockCacheConfig", threshold=1e9)


def pyramid():
    return config_of(
        "PyramidAttentionBroadcastConfig",
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        spatial_attention_block_identifiers=("transformer_blocks",),
        current_timestep_callback=lambda: 500,
    )


def faster():
    return config_of(
        "FasterCacheConfig",
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 600),
        spatial_attention_block_identifiers=("transformer_blocks",),
        is_guidance_distilled=True,
        tensor_format="BCHW",
        current_timestep_callback=lambda: clock[0],
        attention_weight_callback=lambda module: 0.3,
    )


def magnitude():
    options = dict(threshold=1e9, num_inference_steps=4, retention_ratio=0.25, mag_ratios=[1.0] * 4)
    return config_of("MagCacheConfig", **options)


def taylor_seer():
    options = dict(cache_interval=2, disable_cache_before_step=1, taylor_factors_dtype=torch.float32)
    return config_of("TaylorSeerCacheConfig", **options)


@pytest.mark.parametrize("first", ["patch", "cache"])
@pytest.mark.parametrize("cache", [first_block, pyramid, faster, magnitude, taylor_seer])
def test_caches_skip_as_on_stock(cache, first):
    """Four steps on drifting latents: the same steps come from the cache."""

    def steps(model):
        calls, results = [], []
        hooks = [
            layer.register_forward_hook(lambda *_, name=name: calls.append(name))
            for name, layer in model.named_modules()
            if name.endswith("to_q")
        ]
        for drift in range(4):
            counted, clock[0] = len(calls), 900 - 200 * drift
            with model.cache_context("cond"):
                results.append(out(FLUX, model, hidden_states=lambda x, drift=drift: x + 0.1 * drift))
            results.append(torch.tensor([float(len(calls) - counted + 1)]))
        for hook in hooks:
            hook.remove()
        return results

    stock, model = FLUX.model(), FLUX.model()
    plain = steps(stock)
    stock.enable_cache(cache())
    expected = steps(stock)
    assert any(not torch.equal(a, b) for a, b in zip(plain[1::2], expected[1::2], strict=True))  # it skips
    had = processors(model)
    if first == "cache":
        model.enable_cache(cache())
    diffattn.patch(model, diffattn.SoftmaxAttention())
    if first == "patch":
        model.enable_cache(cache())
    for ours, theirs in zip(steps(model), expected, strict=True):
        assert error(ours, theirs) <= 1e-5
    diffattn.unpatch(model)
    model.disable_cache()
    assert processors(model) == had
    assert all(torch.equal(a, b) for a, b in zip(steps(model), plain, strict=True))


@pytest.mark.parametrize("core", [diffattn.SoftmaxAttention, learned])
@pytest.mark.parametrize("first", ["patch", "cache"])
def test_a_cache_that_replaces_forwards(core, first):
    """As DeepCache does it: a block's `forward` becomes a function that returns what it had the step before."""

    def cache(model):
        for block in model.up_blocks:
            forward, kept = block.forward, []

            def cached(*args, forward=forward, kept=kept, **kwargs):
                if len(kept) % 2 == 0:
                    kept.append(forward(*args, **kwargs))
                else:
                    kept.append(kept[-1])
                return kept[-1]

            block.forward = cached

    def steps(model):
        return [out(UNET, model, sample=lambda x, i=i: x + 0.1 * i) for i in range(4)]

    stock, model = UNET.model(), UNET.model()
    plain = steps(stock)
    cache(stock)
    expected = steps(stock)
    assert error(expected[1], plain[1]) > 1e-4
    if first == "cache":
        cache(model)
    diffattn.patch(model, core())
    if first == "patch":
        cache(model)
    ours = steps(model)
    for a, b in zip(ours, expected, strict=True):
        assert error(a, b) <= 1e-5 if core is diffattn.SoftmaxAttention else error(a, b) > 1e-5
    diffattn.unpatch(model)
    assert all(torch.equal(a, b) for a, b in zip(steps(model), expected, strict=True))


def test_a_patched_model_saves_stock_weights_and_a_folder_of_its_own(tmp_path, log):
    """Cores with weights are taken out for saving and come back from `weights=`."""
    from diffusers import UNet2DConditionModel

    unet = UNET.model()
    stock = out(UNET, unet)
    diffattn.patch(unet, learned())
    for processor in diffattn.status(unet).installed.values():
        torch.nn.init.normal_(processor.core.feature_map.proj.weight)
    patched = out(UNET, unet)
    unet.save_pretrained(tmp_path / "patched")
    assert torch.equal(out(UNET, UNet2DConditionModel.from_pretrained(tmp_path / "patched")), stock)
    assert [r for r in log.records if "processor.core" in r.getMessage() and "not used" in r.getMessage()]
    diffattn.save_weights(unet, tmp_path / "diffattn")
    diffattn.unpatch(unet)
    unet.save_pretrained(tmp_path / "unet")
    log.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
        assert torch.equal(out(UNET, loaded), stock) and not diffattn.status(loaded).installed
        diffattn.patch(loaded, learned(), weights=tmp_path / "diffattn")
    assert not log.records
    assert torch.equal(out(UNET, loaded), patched)


@pytest.mark.parametrize("core", [diffattn.SoftmaxAttention, lambda: "linear"])
def test_cores_without_weights_add_nothing_to_a_saved_pipeline(core, tmp_path, log):
    from diffusers import StableDiffusionPipeline

    pipe = pipeline()
    stock = draw(pipe)
    diffattn.patch(pipe, core())
    pipe.save_pretrained(tmp_path)
    log.clear()
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path, **ABSENT)
    loaded.set_progress_bar_config(disable=True)
    assert not [r for r in log.records if "not used" in r.getMessage()]
    assert torch.equal(draw(loaded), stock)
