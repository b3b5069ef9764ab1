"""A text-to-picture pipeline of real classes that draws in milliseconds, and a core that learns."""

from pathlib import Path

import torch
from torch import nn

EMOJI = Path(__file__).parents[2] / "examples" / "emoji" / "model"
PROMPTS = ("red heart", "owl", "a cat", "pizza")
#: 4 trajectories of 2 guided steps.
SAMPLING = dict(steps=2, guidance=2.0, height=16, width=16, batch=2)


def pipeline(seed: int = 0, **changes):
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from tests.models.unets import build_unet

    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(EMOJI / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
    )
    vae = AutoencoderKL(
        sample_size=16,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        mid_block_add_attention=False,
    )
    unet = build_unet(attention_head_dim=(2, 4), **changes)  # the number of heads, despite its name
    for name, parameter in unet.named_parameters():
        if "attn1.to_q" in name or "attn1.to_k" in name:
            parameter.data *= 6  # attention that looks somewhere: at its initial weights it is a plain mean
    pipe = StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        scheduler=DPMSolverMultistepScheduler(timestep_spacing="trailing", steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


class LearnedMap(nn.Module):
    """relu(W x), 8 features."""

    def __init__(self, features: int = 8):
        super().__init__()
        self.proj = nn.Linear(features, features)

    def forward(self, x):
        return self.proj(x).relu()
