"""Conversion to shared key/value heads: pooled projections, what acts on them, and the end of the originals."""

import copy
import pickle

import pytest
import torch

import diffattn
from diffattn import GroupedQueryAttention
from tests.plugins.common import UNET, error, load_lora, out, processors

pytestmark = pytest.mark.filterwarnings("ignore:diffattn. .* another mechanism")

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1"


def mqa(kv_heads=1):
    return GroupedQueryAttention(kv_heads=kv_heads)


class OfOutputs(GroupedQueryAttention):
    """Pools the outputs of the layer's projections: the oracle, on which whatever acts on them acts."""

    def prepare(self, layer):
        pass


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_weights_of_each_group_are_pooled(kv_heads):
    unet = UNET.model()
    attn = unet.get_submodule(LAYER)
    handle = diffattn.patch(unet, mqa(kv_heads))
    own = handle.installed[LAYER].core.projections
    assert "pooled outputs" not in str(handle)
    for role, layer in (("k", attn.to_k), ("v", attn.to_v)):
        groups = layer.weight.view(kv_heads, attn.heads // kv_heads, -1, layer.in_features)
        torch.testing.assert_close(own[role].weight, groups.mean(1).flatten(0, 1))
    pooled = out(UNET, unet)
    diffattn.unpatch(unet)
    diffattn.patch(unet, OfOutputs(kv_heads))
    assert error(pooled, out(UNET, unet)) <= 1e-5


def test_smaller_matmuls_run():
    unet = UNET.model()
    diffattn.patch(unet, mqa())
    attn, called = unet.get_submodule(LAYER), []
    for module in (attn.to_q, attn.to_k, attn.to_v, *attn.processor.core.projections.values()):
        module.register_forward_hook(lambda module, _, out: called.append((module, out.shape[-1])))
    out(UNET, unet)
    own = attn.processor.core.projections
    width = attn.inner_dim // attn.heads
    assert called == [(attn.to_q, attn.inner_dim), (own["k"], width), (own["v"], width)]


@pytest.mark.parametrize("what", ["fused", "quantized"])
def test_outputs_are_pooled_where_weights_cannot_be(what):
    unet = UNET.model()
    if what == "fused":
        unet.fuse_qkv_projections()
    else:
        for name, module in list(unet.named_modules()):
            if name.endswith("attn1.to_k"):
                unet.set_submodule(name, torch.ao.nn.quantized.dynamic.Linear.from_float(_observed(module)))
    oracle = copy.deepcopy(unet)
    handle = diffattn.patch(unet, mqa())
    own = {role for processor in handle.installed.values() for role in processor.core.projections or ()}
    assert own == (set() if what == "fused" else {"v"})
    which = "of" if what == "fused" else "keys of"
    assert str(handle).count(f"GroupedQueryAttention(kv_heads=1, precision=None), {which} pooled outputs") == 4
    diffattn.patch(oracle, OfOutputs(1))
    assert error(out(UNET, unet), out(UNET, oracle)) <= 1e-5


def _observed(module):
    module.qconfig = torch.ao.quantization.default_dynamic_qconfig
    return module


def test_copies_and_pickles():
    unet = UNET.model()
    diffattn.patch(unet, mqa())
    expected = out(UNET, unet)
    for twin in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        assert torch.equal(out(UNET, twin), expected)
        assert twin.get_submodule(LAYER).processor.core.projections["k"].weight is not (
            unet.get_submodule(LAYER).processor.core.projections["k"].weight
        )
        diffattn.unpatch(twin)
        assert torch.equal(out(UNET, twin), out(UNET, UNET.model()))


def test_unpatch_leaves_no_trace():
    unet = UNET.model()
    stock, keys, had = out(UNET, unet), list(unet.state_dict()), processors(unet)
    diffattn.patch(unet, mqa())
    assert {k for k in unet.state_dict() if k not in keys} == {
        f"{name}.processor.core.projections.{role}.weight"
        for name in diffattn.status(unet).installed
        for role in ("k", "v")
    }
    diffattn.unpatch(unet)
    assert list(unet.state_dict()) == keys and processors(unet) == had
    assert torch.equal(out(UNET, unet), stock)


def finalized(core=None):
    unet = UNET.model()
    diffattn.patch(unet, core or mqa())
    return unet, out(UNET, unet), diffattn.finalize(unet)


def test_finalize_drops_the_originals_and_their_memory():
    unet, converted, dropped = finalized()
    stock = UNET.model()
    kept = sum(p.numel() * p.element_size() for p in unet.parameters())
    own = sum(p.numel() * p.element_size() for n, p in unet.named_parameters() if ".processor." in n)
    assert kept == sum(p.numel() * p.element_size() for p in stock.parameters()) - dropped + own
    assert dropped == sum(
        p.numel() * 4 for n, p in stock.named_parameters() if n.endswith(("attn1.to_k.weight", "attn1.to_v.weight"))
    )
    assert not any(name.endswith(("attn1.to_k.weight", "attn1.to_v.weight")) for name in unet.state_dict())
    assert torch.equal(out(UNET, unet), converted)
    assert diffattn.finalize(unet) == 0  # again
    assert torch.equal(out(UNET, unet), converted)
    lines = str(diffattn.status(unet)).splitlines()
    assert sum("GroupedQueryAttention(kv_heads=1, precision=None), finalized" in line for line in lines) == 4


def test_a_finalized_model_cannot_be_unpatched():
    unet = UNET.model()
    handle = diffattn.patch(unet, mqa())
    expected = out(UNET, unet)
    diffattn.finalize(unet)
    had = processors(unet)
    for undo in (handle.undo, lambda: diffattn.unpatch(unet)):
        with pytest.raises(RuntimeError, match=r"attn1 and 3 more: finalized: .*dropped.* Load the model anew"):
            undo()
    diffattn.patch(unet, mqa())  # what it is already
    with pytest.raises(ValueError, match=r"fits no layer(.|\n)*finalized: it keeps GroupedQueryAttention"):
        diffattn.patch(unet, mqa(2), layers="*attn1")
    assert processors(unet) == had and torch.equal(out(UNET, unet), expected)


def test_layers_that_lost_nothing_can_be_patched_after_finalize():
    unet, expected, _ = finalized()
    handle = diffattn.patch(unet, diffattn.SoftmaxAttention(), layers="*attn2")
    assert error(out(UNET, unet), expected) <= 1e-5
    handle.undo()
    assert torch.equal(out(UNET, unet), expected)
    other = UNET.model()
    diffattn.patch(other, "linear")  # a core without projections of its own
    assert diffattn.finalize(other) == 0
    diffattn.unpatch(other)
    assert torch.equal(out(UNET, other), out(UNET, UNET.model()))


def test_a_finalized_model_is_saved_as_weights_and_restored(tmp_path):
    unet, expected, _ = finalized()
    folder = diffattn.save_weights(unet, tmp_path)
    other = UNET.model()
    diffattn.patch(other, weights=str(folder))
    assert torch.equal(out(UNET, other), expected)
    diffattn.finalize(other)
    diffattn.load_weights(other, folder)
    assert torch.equal(out(UNET, other), expected)
    for twin in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        assert torch.equal(out(UNET, twin), expected)


def test_what_needs_a_dropped_projection_is_told():
    unet, _, _ = finalized()
    attn = unet.get_submodule(LAYER)
    with pytest.raises(RuntimeError, match=rf"{LAYER}.to_k was dropped by diffattn.finalize"):
        attn.to_k(torch.zeros(1))
    with pytest.raises(AttributeError, match=r"weight: .* was dropped"):
        attn.fuse_projections()


def test_finalize_refuses_adapters_offloading_and_stock_models():
    from accelerate import cpu_offload

    def refused(model, match):
        expected, keys = out(UNET, model), list(model.state_dict())
        with pytest.raises(ValueError, match=match):
            diffattn.finalize(model)
        assert list(model.state_dict()) == keys and torch.equal(out(UNET, model), expected)

    refused(UNET.model(), "no diffattn processor installed: nothing to finalize")
    unet = UNET.model()
    diffattn.patch(unet, mqa())
    load_lora(unet, UNET)
    refused(unet, r"attn1.to_k has adapters \(one\)")
    unet.unload_lora()
    cpu_offload(unet, execution_device=torch.device("cpu"))
    refused(unet, "is offloaded: finalize the model first")
