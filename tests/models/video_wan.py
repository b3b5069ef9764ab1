"""Transformers that draw videos: Wan, LTX and their kin, with norms over all heads."""

import torch

from tests.models.base import Rand, TinyModel, text_mask, two_times

HEADS = dict(num_attention_heads=2, attention_head_dim=16)


WAN = dict(
    in_channels=4,
    out_channels=4,
    text_dim=16,
    freq_dim=16,
    ffn_dim=32,
    num_layers=2,
    rope_max_seq_len=32,
    **HEADS,
)


def video(rand: Rand, channels: int = 4, frames: int = 3, side: int = 4):
    return dict(hidden_states=rand(2, channels, frames, side, side))


def wan_inputs(rand, channels=4):
    return video(rand, channels) | dict(timestep=two_times(), encoder_hidden_states=rand(2, 7, 16))


def wan_image_inputs(rand, channels=4):
    # The processors take the last 512 tokens for text.
    return video(rand, channels) | dict(
        timestep=two_times(),
        encoder_hidden_states=rand(2, 512, 16),
        encoder_hidden_states_image=rand(2, 5, 16),
    )


LTX = dict(in_channels=8, out_channels=8, cross_attention_dim=32, num_layers=2, caption_channels=16, **HEADS)


LTX2 = LTX | dict(
    audio_in_channels=4,
    audio_out_channels=4,
    audio_num_attention_heads=2,
    audio_attention_head_dim=8,
    audio_cross_attention_dim=16,
)


def ltx2_inputs(rand):
    return dict(
        hidden_states=rand(2, 12, 8),
        audio_hidden_states=rand(2, 5, 4),
        encoder_hidden_states=rand(2, 7, 16),
        audio_encoder_hidden_states=rand(2, 7, 16),
        timestep=torch.tensor([[3.0], [500.0]]),
        encoder_attention_mask=text_mask(7),
        audio_encoder_attention_mask=text_mask(7),
        num_frames=3,
        height=2,
        width=2,
        audio_num_frames=5,
    )


def helios_inputs(rand):
    return video(rand) | dict(
        timestep=two_times(),
        encoder_hidden_states=rand(2, 7, 16),
        indices_hidden_states=torch.arange(2, 5).expand(2, -1),
        indices_latents_history_short=torch.arange(2).expand(2, -1),
        latents_history_short=rand(2, 4, 2, 4, 4),
    )


def run_wan_animate2(model, rand):
    """The reference pass, which fills the cache; the cached pass needs FlexAttention."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    return model(
        hidden_states=[rand(4, 3, 4, 4)],
        timestep=torch.tensor([500.0]),
        encoder_hidden_states=[rand(5, 16)],
        condition_latents=[rand(4, 3, 4, 4)],
        kv_cache=WanAnimate2KVCache(2),
        kv_cache_mode="extract",
        seq_len=12,
        encoder_hidden_states_image=rand(1, 257, 1280),
        offset_grid_sizes=torch.tensor([[3, 2, 2]]),
    )


VIDEO_WAN = [
    TinyModel(
        "AnyFlowFARTransformer3DModel",
        {k: v for k, v in WAN.items()} | dict(chunk_partition=(1, 2), compressed_patch_size=(1, 4, 4)),
        lambda rand: dict(
            hidden_states=rand(2, 3, 4, 4, 4),
            timestep=torch.tensor([[3.0] * 3, [500.0] * 3]),
            r_timestep=torch.tensor([[1.0] * 3, [400.0] * 3]),
            encoder_hidden_states=rand(2, 7, 16),
            chunk_partition=[1, 2],
        ),
        unreachable="*attn1",
        differentiable=False,
    ),
    TinyModel(
        "AnyFlowTransformer3DModel",
        WAN,
        lambda rand: dict(
            hidden_states=rand(2, 3, 4, 4, 4),
            timestep=torch.tensor([[3.0] * 3, [500.0] * 3]),
            r_timestep=torch.tensor([[1.0] * 3, [400.0] * 3]),
            encoder_hidden_states=rand(2, 7, 16),
        ),
        converts="*attn1",
    ),
    TinyModel(
        "ChronoEditTransformer3DModel",
        WAN | dict(rope_temporal_skip_len=4),
        wan_inputs,
        converts="*attn1",
    ),
    TinyModel(
        "HeliosTransformer3DModel",
        {k: v for k, v in WAN.items() if k != "rope_max_seq_len"} | dict(rope_dim=(4, 6, 6), is_amplify_history=True),
        helios_inputs,
        converts="*attn1",
    ),
    TinyModel(
        "LTX2VideoTransformer3DModel",
        LTX2 | dict(gated_attn=True, audio_gated_attn=True),
        ltx2_inputs,
        converts="*attn1",
        padded=("encoder_hidden_states", "encoder_attention_mask"),
    ),
    TinyModel(
        "LTX2VideoTransformer3DModel",
        LTX2 | dict(rope_type="split"),
        ltx2_inputs,
        name="LTX2VideoTransformer3DModel-split",
        converts="*attn1",
    ),
    TinyModel(
        "LTXVideoTransformer3DModel",
        LTX,
        lambda rand: dict(
            hidden_states=rand(2, 12, 8),
            encoder_hidden_states=rand(2, 7, 16),
            timestep=two_times(),
            encoder_attention_mask=text_mask(7),
            num_frames=3,
            height=2,
            width=2,
        ),
        converts="*attn1",
        padded=("encoder_hidden_states", "encoder_attention_mask"),
    ),
    TinyModel(
        "SanaWMLTX2RefinerTransformer3DModel",
        LTX2,
        lambda rand: dict(
            hidden_states=rand(2, 12, 8),
            encoder_hidden_states=rand(2, 7, 16),
            timestep=torch.tensor([[3.0], [500.0]]),
            video_rotary_emb=(rand(1, 12, 32), rand(1, 12, 32)),
            encoder_attention_mask=text_mask(7),
        ),
        converts="*audio_attn1",
        unreachable="*?.attn1",
        unused="*audio*",
    ),
    TinyModel("SkyReelsV2Transformer3DModel", WAN, wan_inputs, converts="*attn1", since="0.42"),
    TinyModel(
        "SkyReelsV2Transformer3DModel",
        WAN | dict(num_frame_per_block=2),
        lambda rand: wan_inputs(rand) | video(rand, frames=4),
        converts="*attn1",
        pair_mask=None,
        name="SkyReelsV2Transformer3DModel-block-causal",
        since="0.42",
    ),
    TinyModel(
        "WanAnimate2Transformer3DModel",
        dict(
            text_len=7,
            in_dim=8,
            dim=32,
            ffn_dim=32,
            freq_dim=16,
            text_dim=16,
            out_dim=4,
            num_heads=2,
            num_layers=2,
        ),
        run_model=run_wan_animate2,
        unreachable="*self_attn",
    ),
    TinyModel(
        "WanAnimateTransformer3DModel",
        WAN
        | dict(
            in_channels=12,
            latent_channels=4,
            image_dim=16,
            added_kv_proj_dim=32,
            motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
            motion_encoder_size=16,
            motion_style_dim=8,
            motion_dim=4,
            motion_encoder_dim=16,
            face_encoder_hidden_dim=16,
            face_encoder_num_heads=2,
            inject_face_latents_blocks=2,
        ),
        lambda rand: (
            wan_image_inputs(rand, channels=12)
            | dict(pose_hidden_states=rand(2, 4, 2, 4, 4), face_pixel_values=rand(2, 3, 5, 16, 16))
        ),
        converts="*attn1",
    ),
    TinyModel(
        "WanTransformer3DModel",
        WAN,
        wan_inputs,
        converts="*attn1",
    ),
    TinyModel(
        "WanTransformer3DModel",
        WAN | dict(image_dim=16, added_kv_proj_dim=32),
        wan_image_inputs,
        name="WanTransformer3DModel-image",
        converts="*attn1",
    ),
    TinyModel(
        "WanVACETransformer3DModel",
        WAN | dict(vace_layers=[0, 1], vace_in_channels=8),
        lambda rand: wan_inputs(rand) | dict(control_hidden_states=rand(2, 8, 3, 4, 4)),
        converts="*attn1",
    ),
]
