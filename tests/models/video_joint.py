"""Transformers that draw videos: text and video tokens attend together."""

import torch

from tests.models.base import TinyModel, text_mask, two_times
from tests.models.video_wan import HEADS, video

COGVIDEO = dict(
    in_channels=4,
    out_channels=4,
    time_embed_dim=16,
    text_embed_dim=16,
    num_layers=2,
    sample_width=8,
    sample_height=8,
    sample_frames=9,
    max_text_seq_length=7,
    use_rotary_positional_embeddings=True,
    **HEADS,
)


def cogvideo_inputs(rand):
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    rotary = get_3d_rotary_pos_embed(16, ((0, 0), (4, 4)), (4, 4), 3)
    return dict(
        hidden_states=rand(2, 3, 4, 8, 8),
        encoder_hidden_states=rand(2, 7, 16),
        timestep=two_times(),
        image_rotary_emb=rotary,
    )


HUNYUAN = dict(
    in_channels=4,
    out_channels=4,
    num_layers=1,
    num_single_layers=1,
    num_refiner_layers=1,
    mlp_ratio=2.0,
    patch_size=2,
    text_embed_dim=16,
    rope_axes_dim=(4, 6, 6),
    **HEADS,
)


def hunyuan_inputs(rand):
    return video(rand) | dict(
        timestep=two_times(),
        encoder_hidden_states=rand(2, 7, 16),
        encoder_attention_mask=text_mask(7),
        pooled_projections=rand(2, 16),
    )


def motif_inputs(rand):
    return video(rand) | dict(
        timestep=two_times(),
        encoder_hidden_states=rand(2, 7, 16),
        encoder_attention_mask=text_mask(7),
    )


def joy_plus_inputs(rand):
    return dict(
        hidden_states=rand(2, 12, 4, 1, 2, 2),
        timestep=two_times(),
        encoder_hidden_states=rand(2, 7, 16),
        encoder_hidden_states_mask=text_mask(7).float(),
        shape_list=[[(2, 2, 2), (1, 2, 2)], [(2, 2, 2)]],
    )


JOY = dict(
    in_channels=4,
    hidden_size=32,
    num_attention_heads=2,
    text_dim=16,
    mlp_width_ratio=2.0,
    num_layers=2,
    rope_dim_list=[4, 6, 6],
)


VIDEO_JOINT = [
    TinyModel(
        "CogVideoXTransformer3DModel",
        COGVIDEO,
        cogvideo_inputs,
        converts="*",
    ),
    TinyModel(
        "ConsisIDTransformer3DModel",
        COGVIDEO,
        cogvideo_inputs,
        converts="*",
    ),
    TinyModel(
        "EasyAnimateTransformer3DModel",
        dict(
            in_channels=4,
            out_channels=4,
            patch_size=2,
            sample_width=8,
            sample_height=8,
            num_layers=2,
            mmdit_layers=1,
            time_embed_dim=16,
            text_embed_dim=16,
            **HEADS,
        ),
        lambda rand: video(rand, side=8) | dict(timestep=two_times(), encoder_hidden_states=rand(2, 7, 16)),
        converts="*",
    ),
    TinyModel(
        "HunyuanVideo15Transformer3DModel",
        {k: v for k, v in HUNYUAN.items() if k != "num_single_layers"}
        | dict(num_layers=2, patch_size=1, text_embed_2_dim=12, image_embed_dim=12, target_size=16),
        lambda rand: (
            video(rand)
            | dict(
                timestep=torch.tensor([3.0, 500.0]),
                encoder_hidden_states=rand(2, 7, 16),
                encoder_attention_mask=text_mask(7).bool(),
                encoder_hidden_states_2=rand(2, 5, 12),
                encoder_attention_mask_2=text_mask(5).bool(),
                image_embeds=rand(2, 3, 12),
            )
        ),
        hides_queries=True,
        converts="transformer_blocks.?.attn",
        padded=("encoder_hidden_states", "encoder_attention_mask"),
    ),
    TinyModel(
        "HunyuanVideoFramepackTransformer3DModel",
        HUNYUAN
        | dict(
            pooled_projection_dim=16,
            guidance_embeds=False,
            has_image_proj=True,
            image_proj_dim=12,
            has_clean_x_embedder=True,
        ),
        lambda rand: (
            hunyuan_inputs(rand)
            | dict(
                image_embeds=rand(2, 3, 12),
                indices_latents=torch.arange(1, 4),
                latents_clean=rand(2, 4, 1, 4, 4),
                indices_latents_clean=torch.arange(1),
                latents_history_2x=rand(2, 4, 2, 4, 4),
                indices_latents_history_2x=torch.arange(2),
                latents_history_4x=rand(2, 4, 4, 8, 8),
                indices_latents_history_4x=torch.arange(4),
            )
        ),
        converts="single_transformer_blocks.?.attn transformer_blocks.?.attn",
        padded=("encoder_hidden_states", "encoder_attention_mask"),
    ),
    TinyModel(
        "HunyuanVideoTransformer3DModel",
        HUNYUAN | dict(pooled_projection_dim=16, guidance_embeds=False),
        hunyuan_inputs,
        converts="single_transformer_blocks.?.attn transformer_blocks.?.attn",
        padded=("encoder_hidden_states", "encoder_attention_mask"),
    ),
    TinyModel(
        "JoyImageEditPlusTransformer3DModel",
        JOY,
        joy_plus_inputs,
        converts="*",
        padded=("encoder_hidden_states", "encoder_hidden_states_mask"),
    ),
    TinyModel(
        "JoyImageEditTransformer3DModel",
        JOY,
        lambda rand: video(rand) | dict(timestep=two_times(), encoder_hidden_states=rand(2, 7, 16)),
        converts="*",
    ),
    TinyModel(
        "MochiTransformer3DModel",
        dict(
            in_channels=4,
            num_layers=2,
            pooled_projection_dim=16,
            text_embed_dim=16,
            time_embed_dim=16,
            max_sequence_length=7,
            **HEADS,
        ),
        lambda rand: (
            video(rand)
            | dict(
                encoder_hidden_states=rand(2, 7, 16), timestep=two_times(), encoder_attention_mask=text_mask(7).bool()
            )
        ),
        converts="*",
        padded=("encoder_hidden_states", "encoder_attention_mask"),
    ),
    TinyModel(
        "MotifVideoTransformer3DModel",
        {k: v for k, v in HUNYUAN.items() if k != "num_refiner_layers"},
        motif_inputs,
        converts="*",
        padded=("encoder_hidden_states", "encoder_attention_mask"),
    ),
    TinyModel(
        "MotifVideoTransformer3DModel",
        {k: v for k, v in HUNYUAN.items() if k != "num_refiner_layers"}
        | dict(enable_text_cross_attention_dual=True, enable_text_cross_attention_single=True, num_decoder_layers=1),
        motif_inputs,
        name="MotifVideoTransformer3DModel-cross",
        converts="*?.attn",
        padded=("encoder_hidden_states", "encoder_attention_mask"),
    ),
]
