"""LinFusion's checkpoints (Liu et al. 2024; Huage001/LinFusion), read onto the UNets that they were made for."""

import json
import warnings

import pytest
import torch
from torch import nn

import diffattn
from diffattn import LinearAttention
from tests.plugins.common import UNET, error, load_lora, out, processors

MID = 12


class Equation(nn.Module):
    """What a module of a LinFusion checkpoint computes, over all (query, key) pairs.

    q = Wq (x + fq(x)),  k = Wk (x + fk(x)),  v = Wv x,  o_n = sum_m w_nm v_m / (mean_m w_nm + 1e-4) / M,
    w_nm = (elu(q_n) + 1).(elu(k_m) + 1),  f(x) = W2 leaky_relu(layer_norm(W1 x + b1)) + b2
    """

    def __init__(self, tensors, heads):
        super().__init__()
        self.t, self.heads = tensors, heads

    def mlp(self, name, x):
        t = self.t
        if f"{name}.0.weight" not in t:  # projection_mid_dim of -1
            return x
        h = x @ t[f"{name}.0.weight"].T + t[f"{name}.0.bias"]
        h = (h - h.mean(-1, keepdim=True)) * (h.var(-1, unbiased=False, keepdim=True) + 1e-5).rsqrt()
        h = h * t[f"{name}.1.weight"] + t[f"{name}.1.bias"]
        return torch.maximum(h, 0.01 * h) @ t[f"{name}.3.weight"].T + t[f"{name}.3.bias"]

    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None):
        x, t = hidden_states, self.t
        q = (x + self.mlp("to_q_", x)) @ t["to_q.weight"].T
        k = (x + self.mlp("to_k_", x)) @ t["to_k.weight"].T
        v = x @ t["to_v.weight"].T
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        q, k = (torch.where(y > 0, y + 1, y.exp()) for y in (q, k))
        w = q @ k.transpose(-1, -2)
        o = w @ v / w.shape[-1] / (w.mean(-1, keepdim=True) + 1e-4)
        return o.transpose(1, 2).flatten(2) @ t["to_out.0.weight"].T + t["to_out.0.bias"]


def layers_of(unet):
    return [name for name, attn in unet.named_modules() if name.endswith("attn1")]


def tensors_of(unet, mids, seed=0):
    """Random weights of each module by its own names: every path counts."""
    generator = torch.Generator().manual_seed(seed)
    modules = []
    for name, mid in zip(layers_of(unet), mids, strict=True):
        width = unet.get_submodule(name).inner_dim
        shapes = {f"to_{r}.weight": (width, width) for r in "qkv"}
        shapes |= {"to_out.0.weight": (width, width), "to_out.0.bias": (width,)}
        if mid != -1:
            m = mid or width
            for f in ("to_q_", "to_k_"):
                shapes |= {
                    f"{f}.0.weight": (m, width),
                    f"{f}.0.bias": (m,),
                    f"{f}.1.weight": (m,),
                    f"{f}.1.bias": (m,),
                }
                shapes |= {f"{f}.3.weight": (width, m), f"{f}.3.bias": (width,)}
        modules.append({n: torch.randn(s, generator=generator) * s[-1] ** -0.5 for n, s in shapes.items()})
    return modules


def write(folder, unet, modules, mids, change=lambda config, tensors: None):
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    names = layers_of(unet)
    listed = [
        dict(module_name=n, dim_n=unet.get_submodule(n).inner_dim, heads=unet.get_submodule(n).heads)
        | dict(projection_mid_dim=mid)
        for n, mid in zip(names, mids, strict=True)
    ]
    config = {"_class_name": "LinFusion", "_diffusers_version": "0.28.0", "modules_list": listed}
    tensors = {f"{i}.{n}": t for i, module in enumerate(modules) for n, t in module.items()}
    change(config, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    return str(folder)


@pytest.fixture
def unet():
    return UNET.model()


@pytest.fixture
def mids(unet):
    return [None, MID, -1, *[None] * (len(layers_of(unet)) - 3)]


@pytest.fixture
def modules(unet, mids):
    return tensors_of(unet, mids)


@pytest.fixture
def folder(unet, modules, mids, tmp_path):
    return write(tmp_path / "linfusion", unet, modules, mids)


def mounted(modules, model=None):
    """The UNet with LinFusion's modules in place of its own."""
    model = model or UNET.model()
    for name, tensors in zip(layers_of(model), modules, strict=True):
        model.set_submodule(name, Equation(tensors, model.get_submodule(name).heads))
    return model


@pytest.mark.parametrize("how", ["weights alone", "with the core", "by name", "load_weights"])
def test_output_is_that_of_linfusions_module(unet, modules, folder, how):
    stock, had = out(UNET, unet), processors(unet)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if how != "load_weights" else "ignore")  # no talk of missing weights
        if how == "load_weights":
            for name, mid in zip(layers_of(unet), (None, MID, -1, None), strict=False):
                diffattn.patch(unet, LinearAttention.linfusion(mid), layers=name)
            diffattn.load_weights(unet, folder)
        else:
            core = {"with the core": LinearAttention.linfusion(), "by name": "linfusion"}.get(how)
            handle = diffattn.patch(unet, core, weights=folder)
            assert list(handle.installed) == layers_of(unet)
    expected = out(UNET, mounted(modules))
    assert error(expected, stock) > 0.01
    assert error(out(UNET, unet), expected) <= 1e-5
    diffattn.unpatch(unet)
    assert torch.equal(out(UNET, unet), stock) and processors(unet) == had


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_and_models(unet, modules, mids, tmp_path, dtype):
    halves = [{name: tensor.to(dtype) for name, tensor in module.items()} for module in modules]
    folder = write(tmp_path, unet, halves, mids)
    diffattn.patch(unet, weights=folder)
    expected = out(UNET, mounted([{n: t.float() for n, t in module.items()} for module in halves]))
    assert error(out(UNET, unet), expected) <= 1e-5
    unet.to(dtype)
    assert all(p.dtype == dtype for p in unet.parameters())


def test_saved_again_and_loaded(unet, folder, tmp_path):
    diffattn.patch(unet, weights=folder)
    expected = out(UNET, unet)
    ours = diffattn.save_weights(unet, tmp_path / "ours")
    other = UNET.model()
    diffattn.patch(other, weights=str(ours))
    assert torch.equal(out(UNET, other), expected)
    diffattn.patch(other, "linfusion", layers="mid*attn1")  # again: keeps what was loaded
    assert torch.equal(out(UNET, other), expected)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
def test_lora_acts_as_on_linfusions_projections(unet, modules, folder, when, fused):
    def plug(model):
        load_lora(model, UNET)
        if fused:
            model.fuse_lora()

    if when == "before":
        plug(unet)
    diffattn.patch(unet, weights=folder)
    if when == "after":
        plug(unet)
    oracle = UNET.model()
    load_lora(oracle, UNET)
    for name, tensors in zip(layers_of(oracle), modules, strict=True):  # the same LoRA, added to LinFusion's weights
        attn = oracle.get_submodule(name)
        for role, module in (
            ("to_q", attn.to_q),
            ("to_k", attn.to_k),
            ("to_v", attn.to_v),
            ("to_out.0", attn.to_out[0]),
        ):
            tensors[f"{role}.weight"] += module.get_delta_weight("one")
        oracle.set_submodule(name, Equation(tensors, attn.heads))
    assert error(out(UNET, unet), out(UNET, oracle)) <= 1e-5
    diffattn.unpatch(unet)
    stock = UNET.model()
    plug(stock)
    assert torch.equal(out(UNET, unet), out(UNET, stock))


def test_image_prompts_act(unet, modules, folder):
    """An IP-Adapter's cross-attention stays its own, the linear layers are LinFusion's."""
    from tests.plugins.test_processor_swaps import Loader, ip_adapter, with_image

    oracle, adapter = UNET.model(), ip_adapter(unet)
    for model in (unet, oracle):
        Loader(model).load(adapter)
    handle = diffattn.patch(unet, weights=folder)
    assert list(handle.installed) == layers_of(unet)
    oracle = mounted(modules, oracle)
    assert error(with_image(unet), with_image(oracle)) <= 1e-5
    assert error(with_image(unet), out(UNET, mounted(modules))) > 1e-3
