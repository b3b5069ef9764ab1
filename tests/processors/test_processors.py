"""What single processors promise beyond what tests/models asks of all."""

import dataclasses
import importlib
import inspect
import pkgutil

import diffusers.models
import pytest
import torch
from packaging.version import Version

import diffattn
from diffattn.patch import find_layers
from diffattn.processors import PROCESSORS
from diffattn.processors.unsupported import BY_REASON, WITHOUT_PROCESSOR
from tests.models import BY_NAME, MODELS

pytestmark = pytest.mark.filterwarnings("ignore:diffattn. .* another mechanism")


#: An older diffusers has not every class that is named here.
OLD = Version(diffusers.__version__) < Version("0.42")


def relative_error(ours, stock) -> float:
    return ((ours - stock).norm() / stock.norm()).item()


@pytest.fixture(scope="module")
def stock_classes():
    """Every class in diffusers.models by its name."""
    found = {}
    for module in pkgutil.walk_packages(diffusers.models.__path__, "diffusers.models."):
        if "flax" not in module.name:
            found |= {k: v for k, v in vars(importlib.import_module(module.name)).items() if isinstance(v, type)}
    return found


@pytest.mark.parametrize("processor", [*PROCESSORS, diffattn.LinearAttnProcessor, diffattn.MQAAttnProcessor])
def test_signature_names_what_stock_names(processor, stock_classes):
    """diffusers drops every keyword argument that is not in the signature of `__call__`."""
    ours = inspect.signature(processor().__call__).parameters
    assert list(ours) == [n for n in inspect.signature(processor.forward).parameters if n != "self"]
    there = {name for name in processor.replaces if name in stock_classes}
    assert there == set(processor.replaces) or OLD
    for name in there:
        stock = stock_classes[name]
        theirs = inspect.signature(stock.forward if processor.is_module else stock.__call__).parameters
        names = [n for n, p in theirs.items() if n != "self" and p.kind is p.POSITIONAL_OR_KEYWORD]
        assert list(ours)[: len(names)] == names


def test_what_is_unsupported_exists(stock_classes):
    missing = {name for name in [*BY_REASON, *WITHOUT_PROCESSOR] if name != "MultiheadAttention"} - set(stock_classes)
    assert not missing or OLD


def test_each_stock_class_has_one_processor():
    names = [name for processor in PROCESSORS for name in processor.replaces]
    assert len(names) == len(set(names))
    assert not set(names) & set(BY_REASON)


FUSABLE = (
    "AuraFlowTransformer2DModel ChromaTransformer2DModel CogVideoXTransformer3DModel Flux2Transformer2DModel "
    "Flux3Transformer2DModel FluxTransformer2DModel HeliosTransformer3DModel HunyuanDiT2DModel "
    "Ideogram4Transformer2DModel Krea2Transformer2DModel LTXVideoTransformer3DModel LongCatImageTransformer2DModel "
    "MiniMaxH3Transformer3DModel MotifVideoTransformer3DModel PixArtTransformer2DModel QwenImage21Transformer2DModel "
    "SD3Transformer2DModel SkyReelsV2Transformer3DModel UNet2DConditionModel WanAnimateTransformer3DModel "
    "WanTransformer3DModel-image"
).split()


@pytest.mark.parametrize("name", FUSABLE)
def test_fused_projections_are_used(name):
    tiny = BY_NAME[name]
    model = tiny.model()
    with torch.no_grad():
        stock = tiny.run(model)
        model.fuse_qkv_projections()
        fused = tiny.run(model)
        diffattn.patch(model, diffattn.SoftmaxAttention())
        assert relative_error(tiny.run(model), fused) <= 1e-6
        diffattn.unpatch(model)
        if hasattr(model, "unfuse_qkv_projections"):
            model.unfuse_qkv_projections()
        assert relative_error(tiny.run(model), stock) <= 1e-6


@pytest.mark.parametrize("core", ["mqa", "elu1", "softmax"])
@pytest.mark.parametrize(
    "name", ["UNet2DConditionModel", "FluxTransformer2DModel", "LTXVideoTransformer3DModel", "MochiTransformer3DModel"]
)
def test_other_mechanisms_run_forward_and_backward(name, core):
    tiny = BY_NAME[name]
    model = tiny.model()
    diffattn.patch(model, core if core == "mqa" else diffattn.LinearAttention(core))
    out = tiny.run(model)
    out.square().mean().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_sana_video_is_nearer_to_float64_than_stock_in_bfloat16():
    attn = BY_NAME["SanaVideoTransformer3DModel"].model().transformer_blocks[0].attn1
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
    from tests.models.unets import build_unet, run_unet

    torch.manual_seed(0)
    model = build_unet(**changes).eval()
    with torch.no_grad():
        stock = run_unet(model, torch.Generator().manual_seed(1))
        diffattn.patch(model, diffattn.SoftmaxAttention())
        assert torch.equal(run_unet(model, torch.Generator().manual_seed(1)), stock)


def test_unscaled_attention_keeps_its_scale():
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"attn1": Attention(16, heads=2, dim_head=8, scale_qk=False)})
    x = torch.randn(2, 5, 16)
    stock = model["attn1"](x)
    diffattn.patch(model, diffattn.SoftmaxAttention())
    assert relative_error(model["attn1"](x), stock) <= 1e-6


def test_nucleus_moe_reads_shared_heads_in_place():
    """Grouped-query attention is an option of its config."""
    tiny = BY_NAME["NucleusMoEImageTransformer2DModel"]
    tiny = dataclasses.replace(tiny, config=tiny.config | dict(num_key_value_heads=1))
    model = tiny.model()
    with torch.no_grad():
        stock = tiny.run(model)
        handle = diffattn.patch(model)
        assert len(handle.installed) == 2
        assert relative_error(tiny.run(model), stock) <= 1e-6


@pytest.mark.parametrize("mode", ["write", "read", "skip"])
def test_glm_image_goes_through_its_cache(mode):
    tiny = BY_NAME["GlmImageTransformer2DModel"]
    model = tiny.model()
    from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

    def run():
        caches = GlmImageKVCache(num_layers=2)
        caches.set_mode("write")
        first = tiny.run(model, kv_caches=caches, attention_mask=None)
        caches.set_mode(mode)
        return torch.cat((first, tiny.run(model, kv_caches=caches, attention_mask=None)))

    with torch.no_grad():
        stock = run()
        with diffattn.patched(model, diffattn.SoftmaxAttention()):
            assert relative_error(run(), stock) <= 1e-6
        diffattn.patch(model, "linear")
        with pytest.raises(ValueError, match="kv_cache: keys are cached after their rotation"):
            run()


def test_qwen_image_21_goes_through_its_cache():
    tiny = BY_NAME["QwenImage21Transformer2DModel"]
    model = tiny.model()
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

    def run():
        cache = QwenImage21KVCache(2)
        outs = [tiny.run(model, kv_cache=cache, kv_cache_mode=mode) for mode in ("extract", "cached")]
        return torch.cat(outs)

    with torch.no_grad():
        stock = run()
        diffattn.patch(model, diffattn.SoftmaxAttention())
        assert relative_error(run(), stock) <= 1e-6


def test_mochi_takes_masks_with_holes():
    """Stock moves the kept tokens of the text to the front."""
    tiny = BY_NAME["MochiTransformer3DModel"]
    model = tiny.model()
    mask = torch.tensor([[1, 0, 1, 1, 0, 0, 1], [0, 0, 1, 1, 1, 1, 1]], dtype=torch.bool)
    with torch.no_grad():
        stock = tiny.run(model, encoder_attention_mask=mask)
        diffattn.patch(model, diffattn.SoftmaxAttention())
        assert relative_error(tiny.run(model, encoder_attention_mask=mask), stock) <= 1e-6


@pytest.mark.parametrize("masks", ["some", "all", "none"])
def test_ltx2_perturbed(masks):
    ltx2 = pytest.importorskip("diffusers.models.transformers.transformer_ltx2", reason="this diffusers has no LTX 2")
    torch.manual_seed(0)
    attn = ltx2.LTX2Attention(16, heads=2, kv_heads=2, dim_head=8, apply_gated_attention=True)
    attn.set_processor(ltx2.LTX2PerturbedAttnProcessor())
    x = torch.randn(2, 5, 16)
    mask = {"some": torch.tensor([1.0, 0.0])[:, None, None], "all": torch.zeros(2, 1, 1), "none": None}[masks]
    with torch.no_grad():
        stock = attn(x, perturbation_mask=mask)
        diffattn.patch(torch.nn.ModuleDict({"attn1": attn}), diffattn.SoftmaxAttention())
        assert relative_error(attn(x, perturbation_mask=mask), stock) <= 1e-6


@pytest.mark.parametrize(
    "name, layer, arguments, match",
    [
        ("SanaTransformer2DModel", "transformer_blocks.0.attn1", dict(attention_mask=torch.ones(2, 1, 4)), "mask"),
        ("SD3Transformer2DModel", "transformer_blocks.0.attn", dict(attention_mask=torch.ones(2, 4)), "mask"),
        (
            "Kandinsky5Transformer3DModel",
            "visual_transformer_blocks.0.self_attention",
            dict(sparse_params={}),
            "NABLA",
        ),
    ],
    ids=["Sana", "SD3", "Kandinsky5"],
)
def test_arguments_that_stock_would_drop_are_refused(name, layer, arguments, match):
    model = BY_NAME[name].model()
    diffattn.patch(model, None if name.startswith("Sana") else diffattn.SoftmaxAttention())
    with pytest.raises(ValueError, match=match):
        model.get_submodule(layer)(torch.randn(2, 4, 32), **arguments)


def test_context_parallelism_is_refused():
    with pytest.raises(NotImplementedError, match="unpatch"):
        diffattn.LinearAttnProcessor()._parallel_config = object()


def test_a_backend_is_refused_where_the_model_reads_it():
    model = BY_NAME["AceStepTransformer1DModel"].model()
    diffattn.patch(model)
    processor = find_layers(model)[0].attn.processor
    assert processor._attention_backend is None
    with pytest.raises(NotImplementedError, match="unpatch"):
        processor._attention_backend = "flash"


#: Those with a patch that is exact, but for one whose stock model does not run under autocast.
EXACT = [m for m in MODELS if m.fused and not m.run_model and m.cls != "Cosmos3OmniTransformer"]


@pytest.mark.parametrize("everywhere", [False, True], ids=["norms of a CPU", "norms of a GPU"])
@pytest.mark.parametrize("tiny", EXACT, ids=str)
def test_training_under_autocast(tiny, everywhere):
    """Projections in bfloat16, norms of queries and keys in float32: output and gradients err no more than stock's.

    Under autocast torch's own norms return float32 on a GPU, on a CPU those of diffusers alone.
    """
    model = tiny.model()
    for layer in find_layers(model) if everywhere else []:
        for name in ("norm_q", "norm_k"):
            if getattr(layer.attn, name, None) is not None:
                getattr(layer.attn, name).register_forward_hook(lambda norm, given, out: out.float())

    def results(**autocast):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, **autocast):
            out = tiny.run(model)
        out.square().mean().backward()
        return out.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    exact, theirs = results(enabled=False), results()
    assert diffattn.patch(model).installed
    for ours, stock, expected in zip(results(), theirs, exact, strict=True):
        assert relative_error(ours, expected) <= 2 * relative_error(stock, expected)
