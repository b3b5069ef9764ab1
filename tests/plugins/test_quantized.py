"""Quantized projections: called as modules, never read as weights, in the dtype that they return."""

import functools

import diffusers
import pytest
import torch
from packaging.version import Version
from torch import nn

import diffattn
from tests.plugins.common import PATCHES, error, out, processors

pytestmark = pytest.mark.filterwarnings("ignore:diffattn. .* another mechanism")


class Packed(nn.Module):
    """Eight bits a weight and a scale a row; what it returns is in `dtype`, whatever comes in. It has no `weight`."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("packed", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("offset", None if linear.bias is None else linear.bias.detach())
        self.dtype = dtype

    def forward(self, x):
        weight = (self.packed * self.scale).to(self.dtype)
        return nn.functional.linear(
            x.to(self.dtype), weight, None if self.offset is None else self.offset.to(self.dtype)
        )


PROJECTIONS = ("to_q", "to_k", "to_v", "to_out", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


def quantize(model, make):
    """Replace every projection of the attention layers."""
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name.removesuffix(".0").split(".")[-1] in PROJECTIONS:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, make(linear))
    return model


def acts_as_on_stock(tiny, make, core, exact, bar=1e-5):
    """Patched before and after; `make` quantizes a fresh model."""
    model = make(tiny.model())
    had, stock = processors(model), out(tiny, model)
    assert 0 < error(stock, out(tiny, tiny.model())) < 0.5  # it rounds
    handle = diffattn.patch(model, core())
    assert handle.installed
    ours = out(tiny, model)
    assert ours.isfinite().all()
    assert error(ours, stock) <= bar if exact else error(ours, stock) > 1e-5
    before = tiny.model()
    diffattn.patch(before, core())
    assert error(out(tiny, make(before)), ours) <= 1e-6
    for patched in (model, before):
        diffattn.unpatch(patched)
        assert torch.equal(out(tiny, patched), stock)
    assert processors(model) == had


#: Cores that own projections pool or copy the weights that are there when they are made: tests of conversions.
CALLED = [name for name in PATCHES if not name.endswith(("-mqa", "-linfusion"))]


@pytest.mark.parametrize("patch", CALLED)
def test_projections_are_called(patch):
    tiny, core, exact = PATCHES[patch]
    acts_as_on_stock(tiny, lambda model: quantize(model, lambda linear: Packed(linear, torch.float32)), core, exact)


@pytest.mark.parametrize("patch", ["unet-softmax", "unet-linear", "flux-softmax"])
def test_the_dtype_of_projections_is_followed(patch):
    """A float32 model whose projections compute in bfloat16, and return it."""
    if patch == "flux-softmax" and Version(diffusers.__version__) < Version("0.36"):
        pytest.skip("Flux of diffusers 0.35 cannot mix dtypes")
    tiny, core, exact = PATCHES[patch]
    make = functools.partial(quantize, make=lambda linear: Packed(linear, torch.bfloat16))
    acts_as_on_stock(tiny, make, core, exact, bar=2.5e-3)


@pytest.mark.parametrize("patch", ["flux-softmax", "flux-learned", "sana-exact"])
def test_gguf(patch):
    """diffusers' own linear for GGUF files, with blocks of 32 weights as the `gguf` package makes them."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType.Q8_0

    def make(linear):
        if linear.in_features % 32:
            return linear
        blocks = torch.from_numpy(gguf.quants.quantize(linear.weight.detach().numpy(), kind))
        new = GGUFLinear(linear.in_features, linear.out_features, linear.bias is not None, torch.float32)
        new.weight, new.bias = GGUFParameter(blocks, quant_type=kind), linear.bias
        return new

    tiny, core, exact = PATCHES[patch]
    acts_as_on_stock(tiny, lambda model: quantize(model, make), core, exact)


@pytest.mark.parametrize("patch", CALLED)
def test_torchao_int8_weight_only(patch):
    ao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")

    def make(model):
        ao.quantize_(model, ao.Int8WeightOnlyConfig(), lambda m, name: isinstance(m, nn.Linear) and "core" not in name)
        return model

    tiny, core, exact = PATCHES[patch]
    acts_as_on_stock(tiny, make, core, exact)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("patch", ["unet-softmax", "unet-linear", "flux-softmax", "sana-exact"])
def test_bitsandbytes(patch, bits):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

    def make(linear):
        sizes = linear.in_features, linear.out_features, linear.bias is not None
        if bits == 8:
            new = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
        else:
            new = bnb.nn.Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4")
        new.load_state_dict(linear.state_dict())
        return new.to("cpu")  # which quantizes

    tiny, core, exact = PATCHES[patch]
    acts_as_on_stock(tiny, lambda model: quantize(model, make), core, exact)
