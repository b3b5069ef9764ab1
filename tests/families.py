"""Tiny models of the real diffusers classes with random weights, one per calling convention."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Family:
    """A model class at a size that runs in milliseconds on a CPU."""

    name: str
    build: Callable[[], nn.Module]
    run: Callable[[nn.Module, torch.Generator], Tensor]
    fused: str | None  # glob of the layers that an exact patch takes; None: stock is the fast path
    converts: str | None  # a glob of layers that a converted core takes by default

    def model(self, seed: int = 0) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.build()
            # Norms and gates start at 0 or 1; random ones make every path count.
            for parameter in model.parameters():
                if parameter.dim() <= 1:
                    nn.init.normal_(parameter, 0.5, 0.2)
        return model.eval()

    def __str__(self) -> str:
        return self.name


def rand(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device)


def text_mask(length: int) -> Tensor:
    """The second of two prompts is three tokens shorter."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, -3:] = 0
    return mask


UNET_CONFIG = dict(
    sample_size=8,
    block_out_channels=(16, 32),
    layers_per_block=1,
    norm_num_groups=4,
    cross_attention_dim=16,
    attention_head_dim=4,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)


def build_unet(**changes):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**UNET_CONFIG | changes)


def run_unet(model, generator):
    return model(
        rand(generator, 2, 4, 8, 8),
        torch.tensor([3, 500]),
        rand(generator, 2, 7, 16),
        encoder_attention_mask=text_mask(7),
    ).sample


def build_added_kv_unet():
    return build_unet(
        down_block_types=("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
    )


def run_added_kv_unet(model, generator):
    return model(rand(generator, 2, 4, 8, 8), 3, rand(generator, 2, 7, 16)).sample


def build_pixart():
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
        use_additional_conditions=False,
    )


def run_pixart(model, generator):
    return model(
        rand(generator, 2, 4, 8, 8),
        encoder_hidden_states=rand(generator, 2, 7, 16),
        timestep=torch.tensor([3, 500]),
        encoder_attention_mask=text_mask(7),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    ).sample


def build_kl():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )


def run_kl(model, generator):
    return model(rand(generator, 2, 3, 16, 16)).sample


def build_vq():
    from diffusers import VQModel

    return VQModel(
        block_out_channels=(32, 32),  # the spatial norm has 32 groups
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
        norm_type="spatial",
    )


def run_vq(model, generator):
    return model.decode(rand(generator, 2, 3, 8, 8), force_not_quantize=True).sample


def build_sana():
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=16,
        qk_norm="rms_norm_across_heads",
    )


def run_sana(model, generator):
    return model(
        rand(generator, 2, 4, 8, 8),
        rand(generator, 2, 7, 16),
        torch.tensor([3, 500]),
        encoder_attention_mask=text_mask(7),
    ).sample


def build_sana_video():
    from diffusers import SanaVideoTransformer3DModel

    return SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=16,
        rope_max_seq_len=32,
    )


def run_sana_video(model, generator):
    return model(
        rand(generator, 2, 4, 3, 8, 8),
        rand(generator, 2, 7, 16),
        torch.tensor([3, 500]),
        encoder_attention_mask=text_mask(7),
    ).sample


def build_dcae():
    from diffusers import AutoencoderDC

    blocks = ("ResBlock", "EfficientViTBlock")
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
    )


def run_dcae(model, generator):
    return model(rand(generator, 2, 3, 16, 16)).sample


def run_dcae_small(model, generator):
    """As few pixels as features a head: stock multiplies pixel by pixel scores there."""
    return model(rand(generator, 2, 3, 4, 4)).sample


def build_dreamlite():
    from diffusers import DreamLiteUNetModel

    return DreamLiteUNetModel(
        sample_size=8,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
        num_kv_heads=1,
        ff_mult=2,
    )


def run_dreamlite(model, generator):
    return model(rand(generator, 2, 4, 8, 8), 3, rand(generator, 2, 7, 16), encoder_attention_mask=text_mask(7)).sample


def build_lumina2():
    from diffusers import Lumina2Transformer2DModel

    return Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=48,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(16, 16, 16),
        cap_feat_dim=16,
    )


def run_lumina2(model, generator):
    return model(
        rand(generator, 2, 4, 8, 8),
        torch.tensor([0.3, 0.9]),
        rand(generator, 2, 7, 16),
        text_mask(7),
    ).sample


def build_lumina_next():
    from diffusers import LuminaNextDiT2DModel

    return LuminaNextDiT2DModel(
        sample_size=8,
        hidden_size=48,
        num_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        cross_attention_dim=16,
    )


def run_lumina_next(model, generator):
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    return model(
        rand(generator, 2, 4, 8, 8),
        torch.tensor([0.3, 0.9]),
        rand(generator, 2, 7, 16),
        text_mask(7),
        get_2d_rotary_pos_embed_lumina(12, 16, 16),
        cross_attention_kwargs={"base_sequence_length": 8},
    ).sample


def build_stable_audio():
    from diffusers import StableAudioDiTModel

    return StableAudioDiTModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        cross_attention_dim=32,
        time_proj_dim=16,
        global_states_input_dim=16,
        cross_attention_input_dim=16,
    )


def run_stable_audio(model, generator):
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    rotary = get_1d_rotary_pos_embed(8, 13, use_real=True, repeat_interleave_real=False)
    return model(
        rand(generator, 2, 4, 12),
        torch.tensor([3, 500]),
        rand(generator, 2, 7, 16),
        rand(generator, 2, 1, 16),
        rotary,
        encoder_attention_mask=text_mask(7).bool(),
    ).sample


FAMILIES = [
    Family("unet", build_unet, run_unet, None, "*attn1"),
    Family("unet-added-kv", build_added_kv_unet, run_added_kv_unet, None, None),
    Family("pixart", build_pixart, run_pixart, None, "*attn1"),
    Family("autoencoder-kl", build_kl, run_kl, None, None),
    Family("vq-spatial-norm", build_vq, run_vq, None, None),
    Family("sana", build_sana, run_sana, "*attn1", None),
    Family("sana-video", build_sana_video, run_sana_video, "*attn1", None),
    Family("dc-ae", build_dcae, run_dcae, "*attn", None),
    Family("dc-ae-few-pixels", build_dcae, run_dcae_small, "*attn", None),
    Family("dreamlite", build_dreamlite, run_dreamlite, "*attn?", "*attn1"),
    Family("lumina2", build_lumina2, run_lumina2, "*attn", "*layers.?.attn"),
    Family("lumina-next", build_lumina_next, run_lumina_next, "*attn?", "*attn1"),
    Family("stable-audio", build_stable_audio, run_stable_audio, "*attn2", "*attn1"),
]
