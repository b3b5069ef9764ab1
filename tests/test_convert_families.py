"""Conversion of every family: a core's own projections and input maps in place of the layers', on all models."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import diffattn
from diffattn import GroupedQueryAttention, LinearAttention
from diffattn.layers import find_layers
from diffattn.processors.projections import modules_of
from tests.models import BY_NAME, MODELS, TinyModel
from tests.models.base import Rand, flat
from tests.models.stock import built, copied, is_softmax, layers
from tests.plugins.common import error, out, processors

pytestmark = pytest.mark.filterwarnings("ignore:diffattn. .* another mechanism")

CONVERTED = [m for m in MODELS if m.converts is not None]
every_family = pytest.mark.parametrize("tiny", CONVERTED, ids=str)


def wider(name: str, heads: int = 4) -> TinyModel:
    """With enough heads that more than one group of them can be shared."""
    tiny = BY_NAME[name]
    return replace(tiny, config={**tiny.config, "num_attention_heads": heads, "attention_head_dim": 16})


FLUX = BY_NAME["FluxTransformer2DModel"]
SD3 = BY_NAME["SD3Transformer2DModel-3.5"]
WAN = BY_NAME["WanTransformer3DModel"]
HIDREAM = BY_NAME["HiDreamImageTransformer2DModel"]
KANDINSKY = BY_NAME["Kandinsky5Transformer3DModel"]
Z_IMAGE = BY_NAME["ZImageTransformer2DModel"]
some_families = pytest.mark.parametrize("tiny", [FLUX, SD3, WAN, HIDREAM, KANDINSKY, Z_IMAGE], ids=str)


class OfOutputs(GroupedQueryAttention):
    """Pools the outputs of the layer's projections: whatever acts on them acts."""

    def prepare(self, layer):
        super().prepare(replace(layer, weights={}))


class AfterNorms(GroupedQueryAttention):
    """Pools the keys that it is called with."""

    def prepare(self, layer):
        pass


def with_equal_heads(tiny: TinyModel, names, kv_heads: int = 1) -> nn.Module:
    """A stock model whose heads of one group have the same projections: its attention is what shared heads compute."""
    model = tiny.model()
    for layer in find_layers(model):
        if layer.name not in names:
            continue
        fixed, heads = layer.family.fixes_key_heads, layer.family.heads(layer.attn)[1]
        for role, (_, module) in modules_of(layer.attn, layer.family.hands_over).items():
            if role[-1] != "v" and (role[-1] != "k" or fixed):
                continue
            for parameter in module.parameters():
                grouped = parameter.data.unflatten(0, (kv_heads, heads // kv_heads, -1))
                parameter.data.copy_(grouped.mean(1, keepdim=True).expand_as(grouped).flatten(0, 2))
    return model


def own_modules(handle):
    return {
        (name, role): module
        for name, processor in handle.installed.items()
        for role, module in (processor.core.projections or {}).items()
    }


def watch(modules) -> set:
    """The keys of those that are called from now on."""
    called = set()
    for key, module in modules.items():
        module.register_forward_hook(lambda *_, key=key: called.add(key))
    return called


def test_families_without_projections_of_their_own():
    """Those of one module for all of q, k, v, and nothing else: what `hands_over` leaves out is not called."""
    missing = set()
    for tiny in CONVERTED:
        if tiny.absent():
            continue
        for processor in diffattn.patch(tiny.model(), "mqa").installed.values():
            if processor.core.projections is None and processor.core.pools_outputs:
                missing.add(type(processor).__name__)
    assert missing <= {
        "DifferentialAttnProcessor",
        "Flux2ParallelAttnProcessor",
        "JoyImageAttnProcessor",
        "JoyImageEditPlusAttnProcessor",
    }


@every_family
def test_shared_heads_compute_what_equal_heads_compute(tiny, tmp_path):
    model = tiny.model()
    had, keys = processors(model), list(model.state_dict())
    with tiny.reference():
        stock = out(tiny, model)
        handle = diffattn.patch(model, "mqa")
        own = own_modules(handle)
        called = watch(own)
        ours = out(tiny, model)
        assert own.keys() - called == {(name, role) for name, role in own if name in layers(model, tiny.unused)}
        equal = with_equal_heads(tiny, handle.installed)
        for name, processor in handle.installed.items():
            left = processor.core.projections is None and processor.core.pools_outputs
            if processor.fixes_key_heads or left:
                diffattn.patch(equal, AfterNorms(1) if processor.fixes_key_heads else OfOutputs(1), layers=name)
        assert error(ours, out(tiny, equal)) <= 1e-5

        folder = str(diffattn.save_weights(model, tmp_path))
        diffattn.unpatch(model)
        assert processors(model) == had and list(model.state_dict()) == keys
        assert torch.equal(out(tiny, model), stock)

        diffattn.patch(model, weights=folder)
        before = sum(p.numel() * p.element_size() for p in model.parameters())
        dropped = diffattn.finalize(model)
        assert bool(dropped) == bool(own)
        assert sum(p.numel() * p.element_size() for p in model.parameters()) == before - dropped
        assert torch.equal(out(tiny, model), ours)


@pytest.mark.parametrize("tiny", [m for m in MODELS if m.unreachable != "*"], ids=str)
def test_all_that_is_handed_over_is_called_in_its_place(tiny):
    """Copies of every projection of every layer with a softmax, the layers' own dropped."""
    model = tiny.model()
    names = [layer.name for layer in find_layers(model) if layer.family and is_softmax(layer)]
    if not names:
        return
    handle = diffattn.patch(model, diffattn.SoftmaxAttention(), layers=lambda name, attn: name in names)
    with tiny.reference():
        expected = out(tiny, model)
        for name, processor in handle.installed.items():
            layer = handle._layers[name]
            info = layer.family.layer_info(layer.attn)
            processor.core.own(info, list(info.weights))
        own = own_modules(handle)
        called = watch(own)
        diffattn.finalize(model)
        assert error(out(tiny, model), expected) <= 1e-6
    assert own.keys() - called == {(name, role) for name, role in own if name in layers(model, tiny.unused)}


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "WanTransformer3DModel", "QwenImageTransformer2DModel"])
def test_heads_in_a_row_share(name, kv_heads):
    tiny = wider(name)
    model = tiny.model()
    handle = diffattn.patch(model, GroupedQueryAttention(kv_heads))
    equal = with_equal_heads(tiny, handle.installed, kv_heads)
    if name.startswith("Wan"):
        diffattn.patch(equal, AfterNorms(kv_heads))
    assert error(out(tiny, model), out(tiny, equal)) <= 1e-5


def test_tables_say_what_is_pooled_how():
    assert "of pooled outputs" not in str(diffattn.patch(FLUX.model(), "mqa"))
    assert "precision=None), keys of pooled outputs" in str(diffattn.patch(WAN.model(), "mqa"))
    lines = str(diffattn.patch(BY_NAME["Flux2Transformer2DModel"].model(), "mqa")).splitlines()
    assert all((", of pooled outputs" in line) == ("single" in line) for line in lines if "Grouped" in line)


@some_families
def test_fused_projections_have_their_outputs_pooled(tiny):
    """The numbers are those of pooled weights: before the norms, where pooled weights act."""
    model, fused = tiny.model(), tiny.model()
    diffattn.patch(model, "mqa")
    try:
        fused.fuse_qkv_projections()
    except (AttributeError, ValueError):
        diffattn.patch(fused, OfOutputs(1))
    else:
        diffattn.patch(fused, "mqa")
    assert not own_modules(diffattn.status(fused))
    assert error(out(tiny, fused), out(tiny, model)) <= 1e-5


def add_lora(model, seed=0, name="one"):
    from peft import LoraConfig

    ends = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "to_value")
    ends += ("to_query", "to_key", "out_layer", "to_q_t", "to_k_t", "to_v_t", "to_out_t", "to_out")
    found = [n for n, m in model.named_modules() if type(m) is nn.Linear and n.endswith(ends)]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.add_adapter(LoraConfig(r=2, target_modules=found, init_lora_weights=False), adapter_name=name)


@some_families
@pytest.mark.parametrize("how", ["before", "after", "fused"])
def test_lora_acts_on_replaced_projections(tiny, how):
    def converted(core):
        model = tiny.model()
        if how != "after":
            add_lora(model)
        if how == "fused":
            model.fuse_lora(lora_scale=0.7)
        diffattn.patch(model, core)
        if how == "after":
            add_lora(model)
        return model

    model, oracle = converted("mqa"), converted(OfOutputs(1))
    assert own_modules(diffattn.status(model)) and not own_modules(diffattn.status(oracle))
    ours = out(tiny, model)
    assert error(ours, out(tiny, oracle)) <= 1e-5
    plain = tiny.model()
    diffattn.patch(plain, "mqa")
    assert error(ours, out(tiny, plain)) > 1e-3
    with pytest.raises(ValueError, match="has adapters"):
        diffattn.finalize(model)


def test_other_adapters_on_text_projections_are_refused():
    from peft import LoHaConfig

    model = FLUX.model()
    diffattn.patch(model, "mqa")
    model.add_adapter(LoHaConfig(r=2, target_modules=["add_v_proj"]))
    with pytest.raises(RuntimeError, match=r"only plain LoRA can act. Call diffattn.unpatch"):
        out(FLUX, model)


@some_families
@pytest.mark.parametrize("feature_map", ["elu1", "hedgehog"])
def test_input_maps_act_before_the_projections(tiny, feature_map, tmp_path):
    """As a hook on the layer's own does, which changes what it is given."""
    model, oracle = tiny.model(), tiny.model()
    handle = diffattn.patch(model, LinearAttention(feature_map, input_map="mlp", mid_dim=5))
    twin = diffattn.patch(oracle, LinearAttention(feature_map))
    assert handle.installed.keys() == twin.installed.keys()
    expected = out(tiny, oracle)
    assert error(out(tiny, model), expected) <= 1e-6  # the maps begin as x
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for name, processor in handle.installed.items():
            for parameter in processor.core.input_maps.parameters():
                nn.init.normal_(parameter, 0, 0.3)
            attn = oracle.get_submodule(name)
            found = modules_of(attn, processor.hands_over)
            assert processor.core.input_maps.keys() == {role for role in found if role[-1] in "qk"}
            for role, mapped in processor.core.input_maps.items():
                mapped = copy.deepcopy(mapped)
                found[role][1].register_forward_pre_hook(lambda _, args, f=mapped: (f(args[0]),))
    changed = out(tiny, model)
    assert error(changed, expected) > 1e-3
    assert error(changed, out(tiny, oracle)) <= 1e-5
    other = tiny.model()
    diffattn.patch(other, weights=str(diffattn.save_weights(model, tmp_path)))
    assert torch.equal(out(tiny, other), changed)


def test_input_maps_need_a_module_for_each_role():
    with pytest.raises(ValueError, match=r"input_map: 'mlp' maps hidden states before the projections, which this"):
        diffattn.patch(BY_NAME["JoyImageEditTransformer3DModel"].model(), "linfusion")


@some_families
def test_compiles_to_one_graph(tiny):
    model = tiny.model()
    name = next(iter(diffattn.patch(model, "mqa").installed))
    args, kwargs, _ = built(tiny).calls[name]
    attn = model.get_submodule(name)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = flat(attn(*copied(args), **copied(kwargs)))
        ours = torch.compile(attn, fullgraph=True, backend="eager")(*copied(args), **copied(kwargs))
    assert error(flat(ours), expected) <= 1e-5


@some_families
@pytest.mark.parametrize("train", ["projections", "lora"])
def test_distillation_trains_every_projection(tiny, train):
    from diffattn.distill.settings import Settings
    from diffattn.distill.trainable import check_trainable, make_trainable, merge

    model, settings = tiny.model(), Settings(train=train, rank=2)
    handle = diffattn.patch(model, "mqa")
    expected = out(tiny, model)
    check_trainable(handle, GroupedQueryAttention(1), settings)
    model.requires_grad_(False)
    make_trainable(handle, settings)
    for name, processor in handle.installed.items():
        found = modules_of(model.get_submodule(name), processor.hands_over)
        assert processor.core.projections.keys() == found.keys()
    assert error(out(tiny, model), expected) <= 1e-6  # updates begin at 0
    tiny.run(model).square().sum().backward()
    learns = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if train == "lora":  # the first of the two matrices waits for the second
        learns = {name: p for name, p in learns.items() if "lora_B" in name}

    def roles(parameters):
        return {name.split("projections.")[1].split(".")[0] for name in parameters}

    # In some block: the last one has no use for its text.
    assert roles(name for name, p in learns.items() if p.grad is not None and p.grad.any()) == roles(learns) != set()
    if train == "lora":
        for parameter in learns.values():
            nn.init.normal_(parameter, 0, 0.1)
        changed = out(tiny, model)
        merge(handle)
        assert error(out(tiny, model), changed) <= 1e-5 < error(changed, expected)


@some_families
@pytest.mark.parametrize("core", ["mqa", "linfusion"])
def test_both_stages_of_distillation_lower_their_loss(tiny, core):
    from diffattn.distill.pair import Pair
    from diffattn.distill.settings import Settings
    from diffattn.distill.trainable import make_trainable

    model = tiny.model().requires_grad_(False)
    handle = diffattn.patch(model, core)
    make_trainable(handle, Settings(train="projections"))
    pair, inputs = Pair(model, handle), tiny.inputs(Rand(torch.Generator().manual_seed(1)))
    stages = [lambda: pair.layer_losses(inputs).mean(), lambda: sum(part.mean() for part in pair.model_losses(inputs))]
    learns = [p for p in model.parameters() if p.requires_grad]
    for loss in stages:
        optimizer = torch.optim.Adam(learns, lr=1e-4)  # small: each step has to go down
        losses = []
        for _ in range(6):
            optimizer.zero_grad()
            step = loss()
            step.backward()
            losses.append(step.item())
            optimizer.step()
        assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


@pytest.mark.onnx
@pytest.mark.parametrize("tiny", [FLUX, WAN], ids=str)
def test_converted_models_export(tiny, tmp_path):
    """Their own projections in place of the dropped ones."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    from diffattn.export import to_onnx

    model = tiny.model()
    diffattn.patch(model, "mqa")
    diffattn.finalize(model)
    inputs = tiny.inputs(Rand(torch.Generator().manual_seed(1)))
    path = to_onnx(model, tmp_path / "model.onnx", sample_inputs=inputs, dynamic=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {name: value.numpy() for name, value in inputs.items() if name in {i.name for i in session.get_inputs()}}
    (ours,) = session.run(None, feeds)
    assert error(torch.from_numpy(ours).flatten(), out(tiny, model)) <= 1e-5


def test_spatio_temporal_guidance_takes_shared_values():
    """A perturbed head of LTX-2 returns the values that it shares."""
    tiny = BY_NAME["LTX2VideoTransformer3DModel"]
    model = tiny.model()
    from diffusers.models.transformers.transformer_ltx2 import LTX2PerturbedAttnProcessor

    name = "transformer_blocks.0.attn1"
    attn = model.get_submodule(name)
    attn.set_processor(LTX2PerturbedAttnProcessor())
    x = torch.randn(2, 6, attn.to_q.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = with_equal_heads(tiny, [name]).get_submodule(name)
        expected.set_processor(LTX2PerturbedAttnProcessor())
        expected = expected(x, all_perturbed=True)
        diffattn.patch(model, "mqa", layers=name)
        assert error(attn(x, all_perturbed=True), expected) <= 1e-5
        diffattn.finalize(model)
        assert error(attn(x, all_perturbed=True), expected) <= 1e-5
