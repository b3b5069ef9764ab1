"""Transformers that draw videos: self- and cross-attention, or one stream of tokens."""

from unittest import mock

import torch

from tests.models.base import TinyModel, grid, text_mask, two_times
from tests.models.video_wan import HEADS, video

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


SANA_WM = dict(
    in_channels=4,
    num_layers=2,
    hidden_size=32,
    num_attention_heads=2,
    linear_head_dim=16,
    chunk_plucker_channels=4,
    image_size=16,
    caption_channels=16,
    mlp_ratio=2.0,
)


def sana_wm_inputs(rand):
    """Of a camera, poses to world coordinates, row by row, then focal lengths and center on a picture of 4 x 4."""
    angle = 0.3 * rand(2, 3)
    poses = torch.eye(4).repeat(2, 3, 1, 1)
    poses[..., 0, 0] = poses[..., 2, 2] = angle.cos()
    poses[..., 0, 2], poses[..., 2, 0] = angle.sin(), -angle.sin()
    poses[..., :3, 3] = 0.3 * rand(2, 3, 3)
    lens = torch.tensor([4.0, 4.0, 2.0, 2.0]).expand(2, 3, 4)
    return dict(
        hidden_states=rand(2, 4, 3, 4, 4),
        timestep=torch.tensor([[[3.0] * 3], [[500.0] * 3]]),
        encoder_hidden_states=rand(2, 1, 7, 16),
        encoder_attention_mask=text_mask(7)[:, None, None],
        camera_conditions=torch.cat((poses.flatten(2), lens), -1),
    )


def without_bfloat16():
    """Kandinsky 5 rounds rotated queries and keys to bfloat16 in float32 models too. Here it does not."""
    from diffusers.models.transformers import transformer_kandinsky

    class Torch:
        bfloat16 = torch.float32

        def __getattr__(self, name):
            return getattr(torch, name)

    return mock.patch.object(transformer_kandinsky, "torch", Torch())


def allegro_rotary():
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    *freqs, t, h, w = get_3d_rotary_pos_embed_allegro(24, ((0, 0), (4, 4)), (4, 4), 3)
    positions = torch.cartesian_prod(t.long(), h.long(), w.long())
    return tuple(freqs), positions.T[:, None].contiguous()


VIDEO_STREAM = [
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
        since="0.42",
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
    TinyModel("SanaWMTransformer3DModel", SANA_WM, sana_wm_inputs, fused="*.attn.*"),
    # all of them, since what comes before a rounding to bfloat16 in float32 models is not compared to 1e-5
    TinyModel(
        "SanaWMTransformer3DModel",
        dict(SANA_WM, softmax_every_n=1),
        sana_wm_inputs,
        name="SanaWMTransformer3DModel-softmax",
    ),
    TinyModel(
        "TransformerTemporalModel",
        dict(in_channels=32, norm_num_groups=4, **HEADS),
        lambda rand: dict(hidden_states=rand(6, 32, 4, 4), num_frames=3),
        converts="*",
    ),
]
