"""What the tests of plug-ins share: two tiny models, the patches they get, LoRA weights for them."""

import functools

import torch
from torch import nn

import diffattn
from diffattn.patch import find_layers
from tests.models import BY_NAME, TinyModel
from tests.models.unets import UNET as UNET_CONFIG
from tests.models.unets import unet_inputs

# Four features a head at every resolution, so that one learned map fits all layers.
UNET = TinyModel("UNet2DConditionModel", UNET_CONFIG | dict(attention_head_dim=(4, 8)), unet_inputs)
FLUX = BY_NAME["FluxTransformer2DModel"]
SANA = BY_NAME["SanaTransformer2DModel"]


class LearnedMap(nn.Module):
    """A feature map with weights, which offloading and casting have to find."""

    def __init__(self, features: int = 4):
        super().__init__()
        self.proj = nn.Linear(features, features)  # as wide as the head: rotary tables have to fit
        with torch.random.fork_rng():
            torch.manual_seed(2)
            for parameter in self.parameters():
                # Numbers that float8 holds: casting the storage does not round them again.
                parameter.data.normal_().copy_(parameter.data.to(torch.float8_e4m3fn))

    def forward(self, x):
        return self.proj(x).relu()


def learned(features: int = 4):
    return diffattn.LinearAttention(LearnedMap(features), eps=1e-4)


#: (model, core, whether the core computes what stock computes)
PATCHES = {
    "unet-softmax": (UNET, diffattn.SoftmaxAttention, True),
    "unet-linear": (UNET, lambda: diffattn.LinearAttention("elu1"), False),
    "unet-learned": (UNET, learned, False),
    "unet-mqa": (UNET, lambda: "mqa", False),
    "unet-hedgehog": (UNET, lambda: "hedgehog", False),
    "unet-linfusion": (UNET, lambda: "linfusion", False),
    "flux-softmax": (FLUX, diffattn.SoftmaxAttention, True),
    "flux-learned": (FLUX, functools.partial(learned, 16), False),
    "flux-mqa": (FLUX, lambda: "mqa", False),
    "sana-exact": (SANA, lambda: None, True),
}


def out(tiny, model, **changes):
    with torch.no_grad():
        return tiny.run(model, **changes)


def processors(model):
    return {layer.name: layer.attn.processor for layer in find_layers(model)}


def error(ours, theirs) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@functools.cache
def lora(tiny, seed: int) -> dict[str, torch.Tensor]:
    """Weights of a LoRA on the projections of every attention layer."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    model = tiny.model()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    weights = get_peft_model_state_dict(model)
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(w.shape, generator=generator) / 4 for name, w in weights.items()}


def load_lora(model, tiny, seed: int = 1, name: str = "one", **options):
    weights = {name: w.clone() for name, w in lora(tiny, seed).items()}  # hotswap may write into them
    model.load_lora_adapter(weights, prefix=None, adapter_name=name, **options)
