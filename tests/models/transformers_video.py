"""Transformers that draw videos, some of them with sound."""

from unittest import mock

import torch

from tests.models.base import Rand, TinyModel, grid, text_mask, two_times

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


COSMOS = dict(
    num_attention_heads=2,
    attention_head_dim=16,
    mlp_ratio=2.0,
    text_embed_dim=16,
    adaln_lora_dim=4,
    max_size=(4, 16, 16),
    concat_padding_mask=False,
    rope_scale=(2.0, 1.0, 1.0),
)


def cosmos_inputs(rand):
    return dict(
        hidden_states=rand(2, 4, 3, 8, 8),
        timestep=two_times(),
        encoder_hidden_states=rand(2, 7, 16),
        attention_mask=text_mask(7).bool(),
        fps=24,
    )


def cosmos_image_inputs(rand):
    return cosmos_inputs(rand) | dict(encoder_hidden_states=(rand(2, 7, 16), rand(2, 5, 12)), attention_mask=None)


def cosmos3_inputs(rand):
    text, frames = 5, 3 * 4
    return dict(
        input_ids=rand.tokens(32, text),
        text_indexes=torch.arange(text),
        position_ids=torch.cat((torch.arange(text).expand(3, -1), 20 + grid(3, 2, 2).T), 1),
        und_len=text,
        sequence_length=text + frames,
        vision_tokens=[rand(1, 4, 3, 4, 4)],
        vision_token_shapes=[(3, 2, 2)],
        vision_sequence_indexes=text + torch.arange(frames),
        vision_mse_loss_indexes=text + torch.arange(frames),
        vision_timesteps=torch.full((frames,), 300.0),
        vision_noisy_frame_indexes=[torch.arange(3)],
    )


def motif_inputs(rand):
    return video(rand) | dict(
        timestep=two_times(),
        encoder_hidden_states=rand(2, 7, 16),
        encoder_attention_mask=text_mask(7),
    )


def minimax_h3_inputs(rand):
    text, frames, sound = 7, 12, 5
    length = text + frames + sound
    return dict(
        hidden_states=rand(2, frames, 16),
        audio_hidden_states=rand(2, sound, 4),
        encoder_hidden_states=rand(2, text, 16),
        timestep=torch.tensor([0.3]),
        timestep_indices=torch.zeros(length, dtype=torch.long),
        token_tags=torch.tensor([2] * text + [0] * frames + [1] * sound),
        position_ids=torch.arange(length)[:, None].expand(-1, 3),
        video_indices=text + torch.arange(frames),
        audio_indices=text + frames + torch.arange(sound),
        text_indices=torch.arange(text),
    )


def sana_inputs(rand):
    return dict(
        hidden_states=rand(2, 4, 3, 8, 8),
        encoder_hidden_states=rand(2, 7, 16),
        timestep=two_times(),
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


def helios_inputs(rand):
    return video(rand) | dict(
        timestep=two_times(),
        encoder_hidden_states=rand(2, 7, 16),
        indices_hidden_states=torch.arange(2, 5).expand(2, -1),
        indices_latents_history_short=torch.arange(2).expand(2, -1),
        latents_history_short=rand(2, 4, 2, 4, 4),
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


def without_bfloat16():
    """Kandinsky 5 rounds rotated queries and keys to bfloat16 in float32 models too. Here it does not."""
    from diffusers.models.transformers import transformer_kandinsky

    class Torch:
        bfloat16 = torch.float32

        def __getattr__(self, name):
            return getattr(torch, name)

    return mock.patch.object(transformer_kandinsky, "torch", Torch())


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


def allegro_rotary():
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    *freqs, t, h, w = get_3d_rotary_pos_embed_allegro(24, ((0, 0), (4, 4)), (4, 4), 3)
    positions = torch.cartesian_prod(t.long(), h.long(), w.long())
    return tuple(freqs), positions.T[:, None].contiguous()


TRANSFORMERS_VIDEO = [
    TinyModel(
        "AllegroTransformer3DModel",
        dict(
            num_attention_heads=2,
            attention_head_dim=24,
            num_layers=2,
            cross_attention_dim=48,
            caption_channels=16,
            sample_height=8,
            sample_width=8,
            sample_frames=3,
        ),
        lambda rand: dict(
            hidden_states=rand(2, 4, 3, 8, 8),
            encoder_hidden_states=rand(2, 7, 16)[:, None],
            timestep=two_times(),
            attention_mask=torch.ones(2, 3, 8, 8),
            encoder_attention_mask=text_mask(7)[:, None].float(),
            image_rotary_emb=allegro_rotary(),
        ),
        converts="*attn1",
    ),
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
        "Cosmos3OmniTransformer",
        dict(
            head_dim=16,
            hidden_size=32,
            intermediate_size=32,
            latent_channel=4,
            latent_patch_size=2,
            num_attention_heads=4,
            num_hidden_layers=2,
            num_key_value_heads=2,
            patch_latent_dim=16,
            vocab_size=32,
            rope_scaling={"mrope_section": [4, 2, 2]},
        ),
        cosmos3_inputs,
        fused="*",
    ),
    TinyModel(
        "CosmosTransformer3DModel",
        COSMOS | dict(in_channels=4, out_channels=4, num_layers=2, extra_pos_embed_type=None),
        cosmos_inputs,
        converts="*attn1",
        padded=("encoder_hidden_states", "attention_mask"),
    ),
    TinyModel(
        "CosmosTransformer3DModel",
        COSMOS
        | dict(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            extra_pos_embed_type=None,
            img_context_dim_in=12,
            img_context_num_tokens=5,
            img_context_dim_out=32,
        ),
        cosmos_image_inputs,
        name="CosmosTransformer3DModel-image",
        converts="*attn1",
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
        "HeliosTransformer3DModel",
        {k: v for k, v in WAN.items() if k != "rope_max_seq_len"} | dict(rope_dim=(4, 6, 6), is_amplify_history=True),
        helios_inputs,
        converts="*attn1",
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
        "Kandinsky5Transformer3DModel",
        dict(
            in_text_dim=16,
            in_text_dim2=12,
            time_dim=16,
            model_dim=32,
            ff_dim=32,
            num_text_blocks=1,
            num_visual_blocks=2,
            axes_dims=(4, 6, 6),
        ),
        lambda rand: dict(
            hidden_states=rand(1, 3, 4, 4, 4),
            encoder_hidden_states=rand(1, 7, 16),
            timestep=torch.tensor([500.0]),
            pooled_projections=rand(1, 12),
            visual_rope_pos=[torch.arange(3), torch.arange(2), torch.arange(2)],
            text_rope_pos=torch.arange(7),
        ),
        reference=without_bfloat16,
        converts="visual_transformer_blocks.?.self_attention",
    ),
    TinyModel(
        "Kandinsky6SRTransformer3DModel",
        dict(
            in_visual_dim=8,
            out_visual_dim=8,
            time_dim=16,
            model_dim=32,
            ff_dim=32,
            num_visual_blocks=2,
            axes_dims=(4, 6, 6),
            nabla_window=(3, 3, 3),
        ),
        lambda rand: dict(hidden_states=rand(1, 3, 8, 8, 17), timestep=torch.tensor([500.0])),
        unreachable="*",
        differentiable=False,
    ),
    TinyModel(
        "Kandinsky6Transformer3DModel",
        dict(
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=16,
            in_text_dim2=12,
            time_dim=16,
            model_dim=32,
            ff_dim=32,
            num_text_blocks=1,
            num_visual_blocks=2,
            axes_dims=(4, 6, 6),
            visual_cond=False,
            in_audio_dim=4,
            out_audio_dim=4,
        ),
        lambda rand: dict(
            hidden_states=rand(1, 3, 4, 4, 4),
            encoder_hidden_states=rand(1, 7, 16),
            pooled_projections=rand(1, 12),
            timestep=torch.tensor([500.0]),
            audio_hidden_states=rand(1, 5, 4),
        ),
        converts="*self_attention",
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
        "LatteTransformer3DModel",
        dict(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            cross_attention_dim=32,
            sample_size=8,
            patch_size=2,
            norm_type="ada_norm_single",
            num_embeds_ada_norm=10,
            norm_elementwise_affine=False,
            caption_channels=16,
            video_length=3,
            **HEADS,
        ),
        lambda rand: (
            video(rand, side=8)
            # A text mask fails in stock: it is not repeated for each frame, as the text is.
            | dict(timestep=two_times(), encoder_hidden_states=rand(2, 7, 16))
        ),
        converts="*attn1",
    ),
    TinyModel(
        "MiniMaxH3Transformer3DModel",
        dict(
            hidden_size=32,
            num_layers=2,
            num_refiner_layers=1,
            ffn_dim=32,
            in_channels=4,
            audio_in_channels=4,
            text_dim=16,
            freq_dim=16,
            time_embed_hidden_dim=16,
            time_embed_dim=16,
            rope_freq_dim=2,
            **HEADS,
        ),
        minimax_h3_inputs,
        converts="transformer_blocks.?.attn",
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
    TinyModel(
        "SanaVideoTransformer3DModel",
        dict(
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
        ),
        sana_inputs,
        fused="*attn1",
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
    TinyModel(
        "SanaWMTransformer3DModel",
        dict(
            in_channels=4,
            num_layers=2,
            hidden_size=32,
            num_attention_heads=2,
            softmax_every_n=2,
            linear_head_dim=16,
            chunk_plucker_channels=4,
            image_size=16,
            caption_channels=16,
            mlp_ratio=2.0,
        ),
        lambda rand: dict(
            hidden_states=rand(2, 4, 3, 4, 4),
            timestep=torch.tensor([[[3.0] * 3], [[500.0] * 3]]),
            encoder_hidden_states=rand(2, 1, 7, 16),
            encoder_attention_mask=text_mask(7)[:, None, None],
        ),
    ),
    TinyModel("SkyReelsV2Transformer3DModel", WAN, wan_inputs, converts="*attn1"),
    TinyModel(
        "SkyReelsV2Transformer3DModel",
        WAN | dict(num_frame_per_block=2),
        lambda rand: wan_inputs(rand) | video(rand, frames=4),
        converts="*attn1",
        pair_mask=None,
        name="SkyReelsV2Transformer3DModel-block-causal",
    ),
    TinyModel(
        "TransformerTemporalModel",
        dict(in_channels=32, norm_num_groups=4, **HEADS),
        lambda rand: dict(hidden_states=rand(6, 32, 4, 4), num_frames=3),
        converts="*",
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
