"""Calls of diffusers that replace processors: the patch survives, or steps aside, or says which order works."""

import copy
import pickle

import pytest
import torch

import diffattn
from tests.plugins.common import FLUX, SANA, UNET, error, learned, load_lora, lora, out, processors

pytestmark = pytest.mark.filterwarnings("ignore:diffattn. .* another mechanism")

TOKENS, WIDTH = 4, 16


@pytest.fixture
def unet():
    return UNET.model()


def ip_adapter(model, seed=1):
    """Weights of an IP-Adapter for the tiny UNet or Flux, in the layout that its loader reads."""
    generator = torch.Generator().manual_seed(seed)
    layers, key = {}, 1
    for name in model.attn_processors:
        attn = model.get_submodule(name.removesuffix(".processor"))
        if attn.is_cross_attention:
            for part in ("k", "v"):
                layers[f"{key}.to_{part}_ip.weight"] = torch.randn(attn.inner_dim, WIDTH, generator=generator) / 4
            key += 2
    projection = {
        "proj.weight": torch.randn(TOKENS * WIDTH, 8, generator=generator),
        "proj.bias": torch.zeros(TOKENS * WIDTH),
        "norm.weight": torch.ones(WIDTH),
        "norm.bias": torch.zeros(WIDTH),
    }
    return {"image_proj": projection, "ip_adapter": layers}


class Loader:
    """The part of a pipeline that loads and unloads IP-Adapters."""

    def __init__(self, unet):
        self.unet = unet

    def load(self, *adapters):
        self.unet._load_ip_adapter_weights(list(adapters))

    def unload(self):
        from diffusers.loaders import IPAdapterMixin

        IPAdapterMixin.unload_ip_adapter(self)


def with_image(model, adapters=1):
    generator = torch.Generator().manual_seed(5)
    images = [torch.randn(2, 1, 8, generator=generator) for _ in range(adapters)]
    return out(UNET, model, added_cond_kwargs={"image_embeds": images})


@pytest.mark.parametrize("adapters", [1, 2])
def test_patch_after_loading_an_ip_adapter(unet, adapters):
    plain, files = out(UNET, unet), [ip_adapter(unet, seed) for seed in range(adapters)]
    Loader(unet).load(*files)
    had, stock = processors(unet), with_image(unet, adapters)
    assert error(stock, plain) > 1e-3  # image prompts act
    handle = diffattn.patch(unet, diffattn.SoftmaxAttention())
    assert len(handle.installed) == 4 and all("IP-Adapter" in reason for reason in handle.skipped.values())
    assert error(with_image(unet, adapters), stock) <= 1e-5
    diffattn.patch(unet, learned())
    assert error(with_image(unet, adapters), stock) > 1e-5  # another mechanism
    diffattn.unpatch(unet)
    assert torch.equal(with_image(unet, adapters), stock) and processors(unet) == had
    Loader(unet).unload()
    assert torch.equal(out(UNET, unet), plain)


@pytest.mark.parametrize("call", ["load_ip_adapter", "unload_ip_adapter"])
@pytest.mark.parametrize("core", [learned, diffattn.SoftmaxAttention])
def test_ip_adapters_under_a_patch_name_the_order_that_works(unet, call, core):
    """diffusers makes new processors with `type(p)()`: a core other than softmax would be lost without a word."""
    adapter = ip_adapter(unet)
    if call == "unload_ip_adapter":
        Loader(unet).load(adapter)
    diffattn.patch(unet, core())
    if call == "unload_ip_adapter":
        Loader(unet).unload()
        run = lambda: out(UNET, unet)  # noqa: E731
    else:
        Loader(unet).load(adapter)
        run = lambda: with_image(unet)  # noqa: E731
    if core is learned:
        with pytest.raises(RuntimeError, match=r"patched with LinearAttention.*ip_adapter.*unpatch.*first"):
            run()
    else:
        run()  # softmax attention has no settings to lose
    diffattn.unpatch(unet)
    fresh = UNET.model()
    if call == "load_ip_adapter":
        Loader(fresh).load(adapter)
        assert torch.equal(with_image(unet), with_image(fresh))
    else:
        assert torch.equal(out(UNET, unet), out(UNET, fresh))
    diffattn.patch(unet, core())
    assert run().isfinite().all()


def test_a_processor_set_over_an_ip_adapter_says_what_came(unet):
    Loader(unet).load(ip_adapter(unet))
    unet.set_attn_processor(diffattn.LinearAttnProcessor())
    with pytest.raises(TypeError, match=r"tuple.*IP-Adapter.*diffattn.patch"):
        with_image(unet)


@pytest.mark.parametrize("core", [diffattn.SoftmaxAttention, learned])
def test_fused_projections_of_a_unet(unet, core):
    """fuse_qkv_projections sets processors of its own; unfusing brings back what was there."""
    had, stock = processors(unet), out(UNET, unet)
    diffattn.patch(unet, core())
    patched = out(UNET, unet)
    unet.fuse_qkv_projections()
    assert error(out(UNET, unet), stock) <= 1e-5
    assert set(diffattn.status(unet).skipped.values()) >= {"FusedAttnProcessor2_0, which replaced diffattn's"}
    unet.unfuse_qkv_projections()
    assert torch.equal(out(UNET, unet), patched)
    diffattn.unpatch(unet)
    assert torch.equal(out(UNET, unet), stock) and processors(unet) == had

    unet.fuse_qkv_projections()
    fused = processors(unet)
    diffattn.patch(unet, core())
    assert error(out(UNET, unet), patched) <= 1e-5
    diffattn.unpatch(unet)
    assert processors(unet) == fused
    unet.unfuse_qkv_projections()
    assert torch.equal(out(UNET, unet), stock)


@pytest.mark.parametrize("undo", ["unpatch", "handle"])
def test_unfusing_after_unpatching_brings_back_stock(unet, undo):
    had, stock = processors(unet), out(UNET, unet)
    handle = diffattn.patch(unet, "linear")
    unet.fuse_qkv_projections()
    handle.undo() if undo == "handle" else diffattn.unpatch(unet)
    unet.unfuse_qkv_projections()
    assert processors(unet) == had and torch.equal(out(UNET, unet), stock)


@pytest.mark.parametrize("tiny", [UNET, FLUX], ids=str)
def test_projections_left_behind_by_unfusing_are_not_used(tiny):
    """A UNet keeps `to_qkv` when it unfuses, and a LoRA does not reach it."""
    model = tiny.model()
    model.fuse_qkv_projections()
    model.unfuse_qkv_projections()
    load_lora(model, tiny)
    stock = out(tiny, model)
    diffattn.patch(model, diffattn.SoftmaxAttention())
    assert error(out(tiny, model), stock) <= 1e-5


def test_fused_projections_of_flux():
    """Models with attention classes of their own keep their processors."""
    model = FLUX.model()
    stock = out(FLUX, model)
    diffattn.patch(model, learned(16))
    patched = out(FLUX, model)
    model.fuse_qkv_projections()
    assert error(out(FLUX, model), patched) <= 1e-5 and diffattn.status(model).installed
    model.unfuse_qkv_projections()
    assert torch.equal(out(FLUX, model), patched)
    diffattn.unpatch(model)
    assert torch.equal(out(FLUX, model), stock)


@pytest.mark.parametrize("call", ["set_attention_slice", "disable_xformers_memory_efficient_attention"])
def test_calls_that_set_their_own_processors_win(unet, call):
    stock = UNET.model()
    arguments = ("auto",) if call == "set_attention_slice" else ()
    diffattn.patch(unet, "linear")
    for model in (unet, stock):
        getattr(model, call)(*arguments)
    assert torch.equal(out(UNET, unet), out(UNET, stock))
    assert sum("which replaced diffattn's" in reason for reason in diffattn.status(unet).skipped.values()) == 4
    diffattn.unpatch(unet)
    assert torch.equal(out(UNET, unet), out(UNET, stock))
    unet.set_attention_slice(None)
    assert torch.equal(out(UNET, unet), out(UNET, UNET.model()))
    assert diffattn.patch(unet, "linear").installed


def test_set_default_attn_processor_is_refused_under_a_patch(unet):
    had = processors(unet)
    diffattn.patch(unet, "linear")
    patched = processors(unet)
    with pytest.raises(ValueError, match="set_default_attn_processor"):
        unet.set_default_attn_processor()
    assert processors(unet) == patched
    diffattn.unpatch(unet)
    assert processors(unet) == had
    unet.set_default_attn_processor()
    diffattn.patch(unet, "linear")


def test_set_attention_backend_keeps_the_patch():
    model = FLUX.model()
    diffattn.patch(model, "linear")
    patched = out(FLUX, model)
    model.set_attention_backend("native")
    assert torch.equal(out(FLUX, model), patched)
    model.reset_attention_backend()
    assert torch.equal(out(FLUX, model), patched)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_is_patched_and_can_be_undone(unet, way):
    stock = out(UNET, unet)
    diffattn.patch(unet, learned())
    twin = copy.deepcopy(unet) if way == "deepcopy" else pickle.loads(pickle.dumps(unet))
    assert torch.equal(out(UNET, twin), out(UNET, unet))
    diffattn.unpatch(twin)
    assert torch.equal(out(UNET, twin), stock) and diffattn.status(unet).installed


def test_lora_weights_are_those_of_stock(unet):
    """A LoRA saved from a patched model holds nothing of diffattn."""
    diffattn.patch(unet, "linear")
    load_lora(unet, UNET)
    from peft.utils import get_peft_model_state_dict

    assert get_peft_model_state_dict(unet, adapter_name="one").keys() == lora(UNET, 1).keys()


@pytest.mark.parametrize(
    "tiny, argument",
    [(UNET, "cross_attention_kwargs"), (FLUX, "joint_attention_kwargs"), (SANA, "attention_kwargs")],
    ids=["unet", "flux", "sana"],
)
def test_the_scale_of_a_lora_in_the_call(tiny, argument):
    stock, model = tiny.model(), tiny.model()
    core = None if tiny is SANA else diffattn.SoftmaxAttention()
    diffattn.patch(model, core)
    for each in (stock, model):
        load_lora(each, tiny)
    scales = [0.0, 0.3, 1.0]
    expected = [out(tiny, stock, **{argument: {"scale": scale}}) for scale in scales]
    assert error(expected[0], expected[1]) > 1e-4 and error(expected[1], expected[2]) > 1e-4
    for scale, theirs in zip(scales, expected, strict=True):
        assert error(out(tiny, model, **{argument: {"scale": scale}}), theirs) <= 1e-5
