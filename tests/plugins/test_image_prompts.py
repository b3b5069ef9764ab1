"""IP-Adapters of Flux and SD3, and masks of those on UNets, whose loading and unloading test_processor_swaps has."""

import pytest
import torch

import diffattn
from tests.models import BY_NAME
from tests.plugins.common import FLUX, UNET, error, learned, out, processors
from tests.plugins.test_processor_swaps import Loader, ip_adapter, with_image

pytestmark = pytest.mark.filterwarnings("ignore:diffattn. .* another mechanism")

SD3 = BY_NAME["SD3Transformer2DModel"]


def random_weights(module, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(w.shape, generator=generator) / 4 for name, w in module.state_dict().items()}


class FluxLoader:
    """The part of a pipeline that loads and unloads a model's IP-Adapters, and inputs with image prompts."""

    tiny = FLUX
    at_once = 2

    def __init__(self):
        self.transformer = self.tiny.model()

    def adapter(self, seed):
        """Weights in the layout that the loader reads."""
        from diffusers.models.embeddings import ImageProjection
        from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

        config = self.transformer.config
        text = config.joint_attention_dim
        projection = random_weights(ImageProjection(8, text, num_image_text_embeds=4), seed)
        layers = {}
        for i in range(config.num_layers):
            processor = FluxIPAdapterAttnProcessor(self.transformer.inner_dim, text)
            for name, weight in random_weights(processor, seed + i).items():
                layers[f"{i}.{name.replace('.0.', '.')}"] = weight
        return {
            "image_proj": {name.replace("image_embeds", "proj"): w for name, w in projection.items()},
            "ip_adapter": layers,
        }

    def load(self, adapters=1):
        self.transformer._load_ip_adapter_weights([self.adapter(10 * n) for n in range(adapters)])

    def unload(self):
        from diffusers.loaders import FluxIPAdapterMixin

        FluxIPAdapterMixin.unload_ip_adapter(self)

    def run(self, adapters=1, seed=5):
        generator = torch.Generator().manual_seed(seed)
        images = [torch.randn(2, 1, 8, generator=generator) for _ in range(adapters)]
        return out(self.tiny, self.transformer, joint_attention_kwargs={"ip_adapter_image_embeds": images})


class SD3Loader(FluxLoader):
    tiny = SD3

    def adapter(self, seed):
        from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
        from diffusers.models.embeddings import IPAdapterTimeImageProjection

        inner = self.transformer.inner_dim
        projection = IPAdapterTimeImageProjection(8, inner, 64, heads=1, num_queries=4, timestep_in_dim=16)
        layers = {}
        for i in range(len(self.transformer.attn_processors)):
            processor = SD3IPAdapterJointAttnProcessor2_0(
                inner, inner, self.transformer.config.attention_head_dim, timesteps_emb_dim=64
            )
            layers |= {f"{i}.{name}": w for name, w in random_weights(processor, seed + i).items()}
        return {"image_proj": random_weights(projection, seed), "ip_adapter": layers}

    def load(self, adapters=1):
        self.transformer._load_ip_adapter_weights(self.adapter(0))

    def unload(self):
        from diffusers.loaders import SD3IPAdapterMixin

        self.register_modules = self.register_to_config = lambda **modules: None
        SD3IPAdapterMixin.unload_ip_adapter(self)

    def run(self, adapters=1, seed=5):
        image = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(seed))
        return out(self.tiny, self.transformer, joint_attention_kwargs={"ip_adapter_image_embeds": image})


@pytest.mark.parametrize("adapters", [1, 2])
def test_patch_after_loading_an_ip_adapter_of_flux(adapters):
    """The blocks that the adapter serves stay stock, the single-stream blocks are patched."""
    pipe = FluxLoader()
    plain = out(FLUX, pipe.transformer)
    pipe.load(adapters)
    had, stock = processors(pipe.transformer), pipe.run(adapters)
    assert error(pipe.run(adapters, seed=6), stock) > 1e-3  # image prompts act
    handle = diffattn.patch(pipe.transformer, diffattn.SoftmaxAttention())
    assert handle.installed and all(name.startswith("single") for name in handle.installed)
    assert handle.skipped and all("unload the IP-Adapter" in reason for reason in handle.skipped.values())
    assert error(pipe.run(adapters), stock) <= 1e-5
    diffattn.patch(pipe.transformer, learned(16))
    ours = pipe.run(adapters)
    assert error(ours, stock) > 1e-5  # another mechanism
    assert error(pipe.run(adapters, seed=6), ours) > 1e-3
    diffattn.unpatch(pipe.transformer)
    assert torch.equal(pipe.run(adapters), stock) and processors(pipe.transformer) == had
    pipe.unload()
    assert torch.equal(out(FLUX, pipe.transformer), plain)


def test_patch_after_loading_an_ip_adapter_of_sd3_is_refused():
    """It serves every layer but those that turn the picture into a prompt, which no conversion takes by default."""
    pipe = SD3Loader()
    plain = out(SD3, pipe.transformer)
    pipe.load()
    had, stock = processors(pipe.transformer), pipe.run()
    assert error(pipe.run(seed=6), stock) > 1e-4  # image prompts act
    with pytest.raises(ValueError, match=r"fits no layer(.|\n)*unload the IP-Adapter to patch(.|\n)*not part of"):
        diffattn.patch(pipe.transformer, "linear")
    assert not diffattn.patch(pipe.transformer).installed
    assert processors(pipe.transformer) == had and torch.equal(pipe.run(), stock)
    pipe.unload()
    assert torch.equal(out(SD3, pipe.transformer), plain)
    assert diffattn.patch(pipe.transformer, "linear").installed


@pytest.mark.parametrize("call", ["load", "unload"])
@pytest.mark.parametrize("core", ["softmax", "learned"])
def test_ip_adapters_of_flux_under_a_patch_name_the_order_that_works(call, core):
    pipe, fresh = FluxLoader(), FluxLoader()
    if call == "unload":
        pipe.load()
    diffattn.patch(pipe.transformer, diffattn.SoftmaxAttention() if core == "softmax" else learned(16))
    getattr(pipe, call)()
    run = pipe.run if call == "load" else lambda: out(FLUX, pipe.transformer)
    if core == "softmax":
        run()
    else:
        with pytest.raises(RuntimeError, match=r"patched with LinearAttention.*ip_adapter.*unpatch.*first"):
            run()
    diffattn.unpatch(pipe.transformer)
    if call == "load":
        fresh.load()
        assert torch.equal(run(), fresh.run())
    else:
        assert torch.equal(run(), out(FLUX, fresh.transformer))
    diffattn.patch(pipe.transformer, learned(16))
    assert run().isfinite().all()


def test_an_ip_adapter_of_sd3_takes_over_from_a_patch():
    """Its processors are on every layer, so nothing of a patch is lost without a word: `status` says so."""
    pipe, fresh = SD3Loader(), SD3Loader()
    fresh.load()
    diffattn.patch(pipe.transformer, "linear")
    pipe.load()
    status = diffattn.status(pipe.transformer)
    assert not status.installed
    assert all("replaced diffattn's" in why for name, why in status.skipped.items() if "image_proj" not in name)
    assert torch.equal(pipe.run(), fresh.run())
    diffattn.unpatch(pipe.transformer)
    pipe.unload()
    assert torch.equal(out(SD3, pipe.transformer), out(SD3, SD3.model()))
    assert diffattn.patch(pipe.transformer, "linear").installed


@pytest.mark.parametrize("core", [diffattn.SoftmaxAttention, learned])
def test_masks_of_ip_adapters_on_a_unet(core):
    """The layers of the adapter read them; the patched ones are handed them and have no use for them."""
    unet = UNET.model()
    Loader(unet).load(ip_adapter(unet))

    def run(left):
        mask = torch.zeros(1, 1, 8, 8)
        mask[..., :4] = left
        mask[..., 4:] = 1 - left
        images = [torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(5))]
        arguments = {"added_cond_kwargs": {"image_embeds": images}}
        return out(UNET, unet, cross_attention_kwargs={"ip_adapter_masks": [mask]}, **arguments)

    stock = run(1.0)
    assert error(run(0.0), stock) > 1e-3 and error(with_image(unet), stock) > 1e-3  # masks act
    diffattn.patch(unet, core())
    ours = run(1.0)
    assert error(ours, stock) <= 1e-5 if core is diffattn.SoftmaxAttention else error(ours, stock) > 1e-5
    assert error(run(0.0), ours) > 1e-3
    diffattn.unpatch(unet)
    assert torch.equal(run(1.0), stock)
