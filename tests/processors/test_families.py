"""Each calling convention on its real diffusers class: exact is exact, undo leaves no trace."""

import fnmatch
import inspect

import pytest
import torch

import diffattn
from diffattn.patch import find_layers
from diffattn.processors import PROCESSORS
from tests.families import FAMILIES, Family

FUSED = [f for f in FAMILIES if f.fused]
CONVERTS = [f for f in FAMILIES if f.converts]


def output(family: Family, model) -> torch.Tensor:
    return family.run(model, torch.Generator().manual_seed(1))


def output_and_gradient(family: Family, model):
    model.zero_grad()
    out = output(family, model)
    out.square().mean().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return out.detach(), gradient


def relative_error(ours, stock) -> float:
    return ((ours - stock).norm() / stock.norm()).item()


@pytest.mark.parametrize("family", FUSED, ids=str)
def test_exact_patch_computes_what_stock_computes(family):
    model = family.model()
    stock = output_and_gradient(family, model)
    handle = diffattn.patch(model)
    assert handle.installed.keys() == {
        layer.name for layer in find_layers(model) if fnmatch.fnmatch(layer.name, family.fused)
    }
    for ours, theirs in zip(output_and_gradient(family, model), stock, strict=True):
        assert relative_error(ours, theirs) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("family", FUSED, ids=str)
def test_exact_patch_runs_its_kernels_on_a_gpu(family):
    """The same bar with the Triton kernels in place of the reference; convolutions without TF32 on both sides."""
    with torch.device("cuda"), torch.backends.cudnn.flags(allow_tf32=False):
        model = family.model().cuda()

        def run():
            model.zero_grad()
            out = family.run(model, torch.Generator("cuda").manual_seed(1))
            out.square().mean().backward()
            return out.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

        stock = run()
        diffattn.patch(model)
        for ours, theirs in zip(run(), stock, strict=True):
            assert relative_error(ours, theirs) <= 1e-5


@pytest.mark.parametrize("family", [f for f in FAMILIES if not f.fused], ids=str)
def test_exact_patch_leaves_the_fast_path_alone(family):
    handle = diffattn.patch(family.model())
    assert not handle.installed
    assert all("fast path" in reason for reason in handle.skipped.values())


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_softmax_core_computes_what_stock_softmax_computes(family):
    model = family.model()
    stock = output_and_gradient(family, model)
    try:
        handle = diffattn.patch(model, diffattn.SoftmaxAttention())
    except ValueError as error:
        assert "stock is linear attention already" in str(error)
        assert family.name.startswith("dc-ae")
        return
    assert all("linear attention already" in reason for reason in handle.skipped.values())
    ours = output_and_gradient(family, model)
    for x, y in zip(ours, stock, strict=True):
        assert relative_error(x, y) <= 1e-5
    if family.name in ("unet", "pixart", "autoencoder-kl", "vq-spatial-norm"):
        assert torch.equal(ours[0], stock[0])  # the very same calls


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_unpatch_leaves_no_trace(family):
    model = family.model()
    before = {layer.name: layer.attn.processor for layer in find_layers(model)}
    keys, attributes = list(model.state_dict()), {n: set(vars(m)) for n, m in model.named_modules()}
    stock = output(family, model)
    diffattn.patch(model, layers="*") if family.fused else diffattn.patch(model, diffattn.SoftmaxAttention())
    assert list(model.state_dict()) == keys  # cores without weights add none
    diffattn.unpatch(model)
    assert {layer.name: layer.attn.processor for layer in find_layers(model)} == before
    assert list(model.state_dict()) == keys
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    assert torch.equal(output(family, model), stock)


@pytest.mark.parametrize(
    "core",
    ["linear", "mqa", diffattn.LinearAttention("elu1"), diffattn.LinearAttention("softmax")],
    ids=["relu", "mqa", "elu1", "softmax"],
)
@pytest.mark.parametrize("family", CONVERTS, ids=str)
@pytest.mark.filterwarnings("ignore:diffattn. .* another mechanism")
def test_converted_self_attention_runs_forward_and_backward(family, core):
    model = family.model()
    handle = diffattn.patch(model, core)
    converted = {name for name, p in handle.installed.items() if not _is_exact(model, name, p)}
    expected = {layer.name for layer in find_layers(model) if fnmatch.fnmatch(layer.name, family.converts)}
    if core == "mqa" and family.name == "dreamlite":
        assert not converted  # one key/value head is what it has
        return
    assert converted >= expected
    assert not any(name.endswith("attn2") for name in converted)
    out, gradient = output_and_gradient(family, model)
    assert out.isfinite().all() and gradient.isfinite().all()


def _is_exact(model, name, processor) -> bool:
    attn = model.get_submodule(name)
    heads = processor.heads(attn)
    return processor.core.formula(*heads) == processor.exact_core(attn).formula(*heads)


@pytest.mark.filterwarnings("ignore:diffattn. .* another mechanism")
@pytest.mark.parametrize("name", ["sana", "lumina2"])
def test_padded_text_does_not_reach_the_image(name):
    """Text behind the mask may be anything, in the exact patch and in a linear one alike."""
    family = next(f for f in FAMILIES if f.name == name)
    model = family.model()
    diffattn.patch(model, "linear" if name == "lumina2" else None)

    def run(fill):
        generator = torch.Generator().manual_seed(1)
        latents, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, 16, generator=generator)
        mask = torch.ones(2, 7, dtype=torch.long)
        mask[1, 4:] = 0
        text[1, 4:] = fill
        time = torch.tensor([0.3, 0.9])
        if name == "lumina2":
            return model(latents, time, text, mask).sample
        return model(latents, text, time, encoder_attention_mask=mask).sample

    with torch.no_grad():
        assert relative_error(run(5.0), run(-1.0)) <= 1e-6


def test_sana_video_is_nearer_to_float64_than_stock_in_bfloat16():
    family = next(f for f in FAMILIES if f.name == "sana-video")
    attn = family.model().transformer_blocks[0].attn1
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 300, 32, generator=generator)
    angles = torch.rand(1, 300, 1, 8, generator=generator).mul(6.3).repeat_interleave(2, dim=-1)
    rotary = (angles.cos(), angles.sin())

    def run(dtype):
        module = attn.to(dtype)
        return module(x.to(dtype), rotary_emb=tuple(t.to(torch.promote_types(dtype, torch.float32)) for t in rotary))

    with torch.no_grad():
        stock = run(torch.bfloat16)
        # The same rounded weights, so that only the arithmetic differs.
        rounded = {n: p.clone() for n, p in attn.state_dict().items()}
        x = x.bfloat16().float()
        exact = run(torch.float64)
        attn.to(torch.bfloat16).load_state_dict(rounded)
        diffattn.patch(torch.nn.ModuleDict({"attn1": attn}))
        ours = run(torch.bfloat16)
    assert relative_error(ours.double(), exact) <= relative_error(stock.double(), exact)


@pytest.mark.parametrize("changes", [{"attention_head_dim": 2}, {"upcast_attention": True}], ids=str)
def test_unet_variants_equal_stock_bit_for_bit(changes):
    from tests.families import build_unet, run_unet

    torch.manual_seed(0)
    model = build_unet(**changes).eval()
    with torch.no_grad():
        stock = run_unet(model, torch.Generator().manual_seed(1))
        diffattn.patch(model, diffattn.SoftmaxAttention())
        assert torch.equal(run_unet(model, torch.Generator().manual_seed(1)), stock)


def test_fused_projections_are_used():
    family = FAMILIES[0]
    model = family.model()
    with torch.no_grad():
        stock = output(family, model)
        model.fuse_qkv_projections()
        fused = output(family, model)
        diffattn.patch(model, diffattn.SoftmaxAttention())
        assert torch.equal(output(family, model), fused)
        diffattn.unpatch(model)
        model.unfuse_qkv_projections()
        assert torch.equal(output(family, model), stock)


def test_unscaled_attention_keeps_its_scale():
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"attn1": Attention(16, heads=2, dim_head=8, scale_qk=False)})
    x = torch.randn(2, 5, 16)
    stock = model["attn1"](x)
    diffattn.patch(model, diffattn.SoftmaxAttention())
    assert relative_error(model["attn1"](x), stock) <= 1e-6


@pytest.mark.parametrize("processor", [*PROCESSORS, diffattn.LinearAttnProcessor, diffattn.MQAAttnProcessor])
def test_signature_names_what_stock_names(processor):
    """diffusers drops every keyword argument that is not in the signature of `__call__`."""
    ours = inspect.signature(processor().__call__).parameters
    assert list(ours) == [n for n in inspect.signature(processor.forward).parameters if n != "self"]
    for name in processor.replaces:
        theirs = inspect.signature(_stock_class(name).__call__).parameters
        names = [n for n, p in theirs.items() if n != "self" and p.kind is p.POSITIONAL_OR_KEYWORD]
        assert list(ours)[: len(names)] == names


def _stock_class(name):
    from diffusers.models import attention_processor
    from diffusers.models.transformers import sana_transformer, transformer_lumina2, transformer_sana_video
    from diffusers.models.unets import unet_dreamlite

    modules = (attention_processor, sana_transformer, transformer_lumina2, transformer_sana_video, unet_dreamlite)
    return next(getattr(m, name) for m in modules if hasattr(m, name))


def test_sana_refuses_a_mask_that_stock_would_drop():
    model = FAMILIES[5].model()
    diffattn.patch(model)
    with pytest.raises(ValueError, match="attention_mask"):
        model.transformer_blocks[0].attn1(torch.randn(2, 4, 32), attention_mask=torch.ones(2, 1, 4))


def test_context_parallelism_is_refused():
    with pytest.raises(NotImplementedError, match="unpatch"):
        diffattn.LinearAttnProcessor()._parallel_config = object()
