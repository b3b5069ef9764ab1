"""The parts of the pipeline, all stock diffusers and transformers classes, sized for 32 MB in float16."""

from __future__ import annotations

import string

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TEXT_WIDTH = 256
MAX_TOKENS = 32
HEAD_DIM = 32


def make_vae(*, tiny: bool = False) -> AutoencoderKL:
    """128 x 128 x 3 pixels to 32 x 32 x 4 latents and back."""
    return AutoencoderKL(
        sample_size=128,
        latent_channels=4,
        block_out_channels=(16, 16, 16) if tiny else (48, 96, 128),
        layers_per_block=1,
        norm_num_groups=16,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        mid_block_add_attention=False,
        scaling_factor=1.0,  # `normalise_latents` makes it so
        force_upcast=False,
    )


def make_unet(*, tiny: bool = False) -> UNet2DConditionModel:
    """Attention at 32 x 32 = 1,024 and 16 x 16 = 256 tokens and in the middle, in heads of 32."""
    channels = (32, 32, 32) if tiny else (96, 128, 128)
    return UNet2DConditionModel(
        sample_size=32,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        # Despite its name diffusers reads this as the number of heads.
        attention_head_dim=tuple(c // HEAD_DIM for c in channels),
    )


def make_text_encoder(tokenizer: CLIPTokenizer, *, tiny: bool = False) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=1 if tiny else 4,
        num_attention_heads=TEXT_WIDTH // 64,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def make_tokenizer(captions: list[str], vocab_size: int = 3072) -> CLIPTokenizer:
    """CLIP's tokenizer with byte pairs learnt from `captions`."""
    # Every printable character becomes a token of its own, so that no prompt meets the unknown token,
    # which in CLIP is the end of the text.
    return CLIPTokenizer(model_max_length=MAX_TOKENS).train_new_from_iterator(
        [*captions, *(f"{c} {c}a" for c in string.printable)], vocab_size
    )


def make_scheduler() -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing", steps_offset=1
    )


def assemble(vae, unet, text_encoder, tokenizer) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Give each latent channel mean 0 and deviation 1, inside the VAE's own 1x1 convolutions.

    `StableDiffusionPipeline` knows one scaling factor for all channels and no shift, so both are
    folded into the last layer of the encoder and the first of the decoder. Pictures stay the same.

    Args:
        mean, std: (4,), of the latents that this VAE makes now.
    """
    channels = len(mean)
    into, out = vae.quant_conv, vae.post_quant_conv
    into.weight[:channels] /= std[:, None, None, None]
    into.bias[:channels] = (into.bias[:channels] - mean) / std
    into.bias[channels:] -= 2 * std.log()  # the second half of the outputs is the log variance
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight *= std[None, :, None, None]
