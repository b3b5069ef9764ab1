"""Where weights are: offloading of whole models, device maps; what a CPU can show of them. And xformers."""

import types

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import diffattn
from tests.plugins.common import FLUX, UNET, error, learned, out, processors
from tests.plugins.test_pipelines import draw, pipeline

pytestmark = pytest.mark.filterwarnings("ignore:diffattn. .* another mechanism")


def weights_of_cores(model):
    return [p for name, p in model.named_parameters() if ".processor.core." in name]


@pytest.mark.parametrize("first", ["patch", "offload"])
def test_models_that_move_take_their_cores_along(first):
    """What enable_model_cpu_offload() does to each model; the device to compute on has no numbers here."""
    from accelerate import cpu_offload_with_hook

    unet = UNET.model()
    if first == "patch":
        diffattn.patch(unet, learned())
    cpu_offload_with_hook(unet, torch.device("meta"))
    if first == "offload":
        diffattn.patch(unet, learned())
    assert weights_of_cores(unet) and {p.device.type for p in unet.parameters()} == {"cpu"}
    unet._hf_hook.pre_forward(unet)  # the first thing in a call
    assert {p.device.type for p in unet.parameters()} == {"meta"}


def test_a_pipeline_with_models_offloaded_in_turn():
    """The order of models and the hooks are those of stock; patched and unpatched in between."""
    from accelerate import cpu_offload_with_hook

    pipe = pipeline()
    had, stock = processors(pipe), draw(pipe)
    cpu = torch.device("cpu")
    _, hook = cpu_offload_with_hook(pipe.unet, cpu)
    cpu_offload_with_hook(pipe.vae, cpu, prev_module_hook=hook)
    diffattn.patch(pipe, diffattn.SoftmaxAttention())
    assert error(draw(pipe), stock) <= 1e-5
    diffattn.patch(pipe, learned())
    ours = draw(pipe)
    diffattn.unpatch(pipe)
    assert processors(pipe) == had and torch.equal(draw(pipe), stock)
    fresh = pipeline()
    diffattn.patch(fresh, learned())
    assert torch.equal(draw(fresh), ours)


@pytest.mark.parametrize("tiny, width", [(UNET, 4), (FLUX, 16)], ids=["unet", "flux"])
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_model_loaded_with_a_device_map(tiny, width, place, tmp_path):
    """accelerate dispatches the parts and loads each for its call; cores patched in are where the parts compute."""
    import diffusers

    tiny.model().save_pretrained(tmp_path / "model")
    stock = out(tiny, tiny.model())
    parts = {name: "cpu" for name, _ in tiny.model().named_children()}
    offloaded = {}
    if place == "disk":
        last = [name for name in parts if "block" in name][-1]
        parts[last] = "disk"
        offloaded = dict(offload_folder=tmp_path / "offload", offload_state_dict=False)
    cls = getattr(diffusers, tiny.cls)
    model = cls.from_pretrained(tmp_path / "model", device_map=parts, **offloaded)
    had = processors(model)
    assert torch.equal(out(tiny, model), stock)
    diffattn.patch(model, diffattn.SoftmaxAttention())
    assert error(out(tiny, model), stock) <= 1e-5
    diffattn.patch(model, learned(width))
    ours = out(tiny, model)
    diffattn.unpatch(model)
    assert processors(model) == had and torch.equal(out(tiny, model), stock)
    plain = tiny.model()
    diffattn.patch(plain, learned(width))
    assert error(ours, out(tiny, plain)) <= 1e-6


def by_group(pipe, **options):
    pipe.to("cuda")
    pipe.unet.to("cpu")
    pipe.unet.enable_group_offload(torch.device("cuda"), torch.device("cpu"), **options)


OFFLOADS = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(),
    "sequential": lambda pipe: pipe.enable_sequential_cpu_offload(),
    "leaves": lambda pipe: by_group(pipe, offload_type="leaf_level"),
    "leaves, streams": lambda pipe: by_group(pipe, offload_type="leaf_level", use_stream=True),
    "blocks, streams": lambda pipe: by_group(
        pipe, offload_type="block_level", num_blocks_per_group=1, use_stream=True
    ),
}


@pytest.mark.gpu
@pytest.mark.parametrize("how", OFFLOADS)
@pytest.mark.parametrize(
    "core", [diffattn.SoftmaxAttention, learned, lambda: "mqa"], ids=["softmax", "learned", "mqa"]
)
def test_offloading_between_a_gpu_and_a_cpu(how, core):
    resident = pipeline().to("cuda")
    diffattn.patch(resident, core())
    expected = draw(resident)
    pipe = pipeline()
    diffattn.patch(pipe, core())
    OFFLOADS[how](pipe)
    for _ in range(2):  # the second time from where the first left everything
        assert error(draw(pipe), expected) <= 1e-4


@pytest.mark.gpu
def test_a_patch_of_what_is_offloaded_to_a_cpu():
    resident = pipeline().to("cuda")
    stock = draw(resident)
    diffattn.patch(resident, learned())
    pipe = pipeline()
    pipe.enable_model_cpu_offload()
    assert error(draw(pipe), stock) <= 1e-4
    diffattn.patch(pipe, learned())
    assert error(draw(pipe), draw(resident)) <= 1e-4
    diffattn.unpatch(pipe)
    assert error(draw(pipe), stock) <= 1e-4


def test_xformers_that_is_not_installed():
    """diffusers says so, on a patched model as on stock, and the patch stays."""
    unet = UNET.model()
    diffattn.patch(unet, "linear")
    has, patched = processors(unet), out(UNET, unet)
    with pytest.raises(ModuleNotFoundError, match="xformers"):
        unet.enable_xformers_memory_efficient_attention()
    assert processors(unet) == has and torch.equal(out(UNET, unet), patched)


class CudaIsTheCPU(TorchFunctionMode):
    """diffusers tries xformers on a small tensor of the GPU before it sets the processors."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


@pytest.fixture
def xformers(monkeypatch):
    """A stand-in: its one function that diffusers calls, with torch's own attention behind it."""
    from diffusers.models import attention_processor

    def memory_efficient_attention(query, key, value, attn_bias=None, op=None, scale=None):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_bias, scale=scale)

    ops = types.SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
    monkeypatch.setattr(attention_processor, "xformers", types.SimpleNamespace(ops=ops))
    monkeypatch.setattr(attention_processor, "is_xformers_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.parametrize("core", ["linear", "mqa", diffattn.SoftmaxAttention()], ids=["linear", "mqa", "softmax"])
def test_xformers_that_is_installed(xformers, core):
    """Enabled on a patched model it takes over, as on stock; disabled, it leaves stock's processors."""
    unet, stock = UNET.model(), out(UNET, UNET.model())
    installed = diffattn.patch(unet, core).installed
    with CudaIsTheCPU():
        unet.enable_xformers_memory_efficient_attention()
    assert {type(p).__name__ for p in processors(unet).values()} == {"XFormersAttnProcessor"}
    assert error(out(UNET, unet), stock) <= 1e-5
    status = diffattn.status(unet)
    assert not status.installed
    assert sum("which replaced diffattn's" in reason for reason in status.skipped.values()) == len(installed)
    diffattn.unpatch(unet)
    assert {type(p).__name__ for p in processors(unet).values()} == {"XFormersAttnProcessor"}
    unet.disable_xformers_memory_efficient_attention()
    assert torch.equal(out(UNET, unet), stock)
    assert diffattn.patch(unet, core).installed.keys() == installed.keys()


def test_layers_that_call_xformers_stay_as_they_are():
    from diffusers.models.attention_processor import XFormersAttnProcessor

    unet = UNET.model()
    had = processors(unet)
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(XFormersAttnProcessor())
    handle = diffattn.patch(unet, "linear")
    reason = handle.skipped["mid_block.attentions.0.transformer_blocks.0.attn1"]
    assert "calls xformers: call disable_xformers_memory_efficient_attention()" in reason
    unet.disable_xformers_memory_efficient_attention()  # sets stock's processors everywhere
    assert diffattn.patch(unet, "linear").installed.keys() > handle.installed.keys()
    assert processors(unet).keys() == had.keys()
