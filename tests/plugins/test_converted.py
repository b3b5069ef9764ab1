"""Adapters on projections that a converted layer's core has replaced: they act on the core's own, or are refused."""

import pytest
import torch

import diffattn
from diffattn import GroupedQueryAttention
from diffattn.cores.base import samples
from diffattn.processors import replaced
from tests.plugins.common import UNET, error, load_lora, out

pytestmark = pytest.mark.filterwarnings("ignore:diffattn. .* another mechanism")


class OfOutputs(GroupedQueryAttention):
    """Pools the outputs of the layer's projections: the oracle, on which whatever acts on them acts."""

    def prepare(self, layer):
        pass


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["load", "fuse", "two", "disable"])
def test_lora_on_replaced_projections_acts(when, how):
    """As it acts on pooled outputs of the layer's own projections, loaded before the conversion or after it."""

    def plug(model):
        load_lora(model, UNET, 1, "one")
        if how == "fuse":
            model.fuse_lora(lora_scale=0.7)
        if how == "two":
            load_lora(model, UNET, 2, "two")
            model.set_adapters(["one", "two"], weights=[0.5, -1.0])
        if how == "disable":
            model.disable_lora()

    def converted(core):
        model = UNET.model()
        if when == "before":
            plug(model)
        diffattn.patch(model, core)
        if when == "after":
            plug(model)
        return model

    model, oracle = converted("mqa"), converted(OfOutputs(1))
    assert error(out(UNET, model), out(UNET, oracle)) <= 1e-5
    plain = UNET.model()
    diffattn.patch(plain, "mqa")
    assert (error(out(UNET, model), out(UNET, plain)) > 1e-3) == (how != "disable")
    if how == "fuse":
        model.unfuse_lora()
    model.unload_lora()
    assert error(out(UNET, model), out(UNET, plain)) <= 1e-5
    diffattn.unpatch(model)
    assert error(out(UNET, model), out(UNET, UNET.model())) <= (1e-5 if how == "fuse" else 0)


def test_adapters_other_than_lora_are_refused_in_the_call():
    from peft import LoHaConfig, LoraConfig

    for config in (LoraConfig(r=2, target_modules=["to_k"], use_dora=True), LoHaConfig(r=2, target_modules=["to_v"])):
        unet = UNET.model()
        diffattn.patch(unet, "mqa")
        unet.add_adapter(config)
        with pytest.raises(RuntimeError, match=r"only plain LoRA can act. Call diffattn.unpatch"):
            out(UNET, unet)


def test_lora_training_reaches_the_adapters_and_leaves_the_core():
    """`add_adapter` by names like to_k takes the layer's projections alone, and gradients flow to it."""
    from peft import LoraConfig

    unet = UNET.model()
    diffattn.patch(unet, "mqa")
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    assert not any("lora" in name and "processor" in name for name, _ in unet.named_parameters())
    UNET.run(unet).square().sum().backward()
    lora = {name: p.grad for name, p in unet.named_parameters() if "lora" in name and "attn1" in name}
    assert lora and all(g is not None and g.abs().sum() > 0 for g in lora.values())


@pytest.mark.parametrize("used", [False, True])
def test_a_lora_that_was_fused_and_unloaded_is_not_dropped_in_silence(used, monkeypatch):
    """It changed weights that are not called any more, in no time if it was used before."""
    unet = UNET.model()
    diffattn.patch(unet, "mqa")
    if used:
        monkeypatch.setattr(replaced.time, "monotonic", lambda: 100.0)
        for _ in range(2):  # one that is taken off again
            load_lora(unet, UNET)
            out(UNET, unet)
            unet.unload_lora()
            out(UNET, unet)
    load_lora(unet, UNET)
    if used:
        out(UNET, unet)
    unet.fuse_lora()
    unet.unload_lora()
    with pytest.raises(RuntimeError, match=r"projection 'k': the layer's weight has changed .* Keep the LoRA loaded"):
        out(UNET, unet)
    diffattn.unpatch(unet)
    diffattn.patch(unet, "mqa")  # pools the fused weights
    fused = UNET.model()
    load_lora(fused, UNET)
    fused.fuse_lora()
    diffattn.patch(fused, OfOutputs(1))
    assert error(out(UNET, unet), out(UNET, fused)) <= 1e-5


@pytest.mark.parametrize(("step", "pause"), [(0.12, 0.3), (0.6, 1.3), (1.5, 2.1)])
def test_a_look_at_the_weights_waits_for_a_pause_between_steps(step, pause, monkeypatch):
    """Each look waits for the GPU: in a run of steps there is one at the start, and one every ten seconds."""
    now = [100.0]
    monkeypatch.setattr(replaced.time, "monotonic", lambda: now[0])
    looked = []
    monkeypatch.setattr(replaced, "samples", lambda weights: looked.append(now[0]) or samples(weights))
    unet = UNET.model()
    diffattn.patch(unet, "mqa")
    out(UNET, unet)
    now[0] += step
    out(UNET, unet)  # which tells how long a step takes
    last = looked[-1]
    looked.clear()
    while now[0] + step < last + 10:
        now[0] += step
        out(UNET, unet)
    assert not looked
    now[0] += step
    out(UNET, unet)
    layers = sum(name.endswith("attn1") for name, _ in unet.named_modules())
    assert looked == [now[0]] * layers  # one wait for all projections of a layer

    load_lora(unet, UNET)
    unet.fuse_lora()
    unet.unload_lora()
    now[0] += step
    out(UNET, unet)
    now[0] += pause
    for _ in range(2):  # raised once, it is raised again
        with pytest.raises(RuntimeError, match="the layer's weight has changed"):
            out(UNET, unet)
        now[0] += step


@pytest.mark.parametrize("role", ["q", "k", "v", "out"])
def test_a_change_of_any_replaced_projection_is_noticed(role):
    unet = UNET.model()
    diffattn.patch(unet, "mqa-svd")
    attn = next(module for name, module in unet.named_modules() if name.endswith("attn1"))
    projection = attn.to_out[0] if role == "out" else getattr(attn, f"to_{role}")
    with torch.no_grad():
        projection.weight.mul_(1.1)
    with pytest.raises(RuntimeError, match=f"projection {role!r}: the layer's weight has changed"):
        out(UNET, unet)


def test_casting_back_and_forth_changes_no_weight_that_matters():
    unet = UNET.model()
    diffattn.patch(unet, "mqa")
    unet.to(torch.bfloat16).to(torch.float32)
    assert out(UNET, unet).isfinite().all()


@pytest.mark.parametrize("when", ["before", "after"])
def test_adapters_are_refused_where_heads_were_turned(when):
    unet = UNET.model()
    if when == "before":
        load_lora(unet, UNET)
    diffattn.patch(unet, "mqa-svd")
    if when == "after":
        load_lora(unet, UNET)
    with pytest.raises(RuntimeError, match=r"adapter: pooling='svd' turned the heads into another basis.*fuse_lora"):
        out(UNET, unet)
    unet.disable_lora()
    assert out(UNET, unet).isfinite().all()


def test_lora_on_a_dropped_projection_is_refused():
    unet = UNET.model()
    diffattn.patch(unet, "mqa")
    diffattn.finalize(unet)
    expected = out(UNET, unet)
    with pytest.raises(ValueError, match=r"Dropped\(\S*attn1.to_k, by diffattn.finalize\(\)\) is not supported"):
        load_lora(unet, UNET)
    assert torch.equal(out(UNET, unet), expected)
