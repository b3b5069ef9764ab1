"""Transformers that draw images: one stream of tokens, self- and cross-attention, or image queries over both."""

import torch

from tests.models.base import TinyModel, grid, text_mask, two_times
from tests.models.image_joint import FLUX, HEADS, ROPE, flux_inputs, latents, qwen_image_inputs

HUNYUAN_DIT = dict(
    in_channels=4,
    patch_size=2,
    sample_size=8,
    hidden_size=32,
    num_attention_heads=2,
    attention_head_dim=16,
    cross_attention_dim=16,
    cross_attention_dim_t5=16,
    pooled_projection_dim=16,
    text_len=7,
    text_len_t5=5,
    use_style_cond_and_image_meta_size=False,
    mlp_ratio=2.0,
)


def hunyuan_dit_inputs(rand):
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    mask = text_mask(7)
    return dict(
        hidden_states=rand(2, 4, 8, 8),
        timestep=torch.tensor([3.0, 500.0]),
        encoder_hidden_states=rand(2, 7, 16),
        text_embedding_mask=mask,
        encoder_hidden_states_t5=rand(2, 5, 16),
        text_embedding_mask_t5=text_mask(5),
        image_rotary_emb=get_2d_rotary_pos_embed(16, ((0, 0), (4, 4)), (4, 4), output_type="pt"),
    )


def z_image_inputs(rand):
    return dict(
        x=[rand(4, 1, 8, 8), rand(4, 1, 8, 8)],
        t=torch.tensor([0.3, 0.9]),
        cap_feats=[rand(7, 16), rand(4, 16)],
    )


Z_IMAGE = dict(
    in_channels=4,
    dim=32,
    n_layers=2,
    n_refiner_layers=1,
    n_heads=2,
    n_kv_heads=2,
    cap_feat_dim=16,
    axes_dims=[4, 6, 6],
    axes_lens=[128, 16, 16],
)


def rotary_lumina(rand):
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    return dict(
        hidden_states=rand(2, 4, 8, 8),
        timestep=torch.tensor([0.3, 0.9]),
        encoder_hidden_states=rand(2, 7, 16),
        encoder_mask=text_mask(7),
        image_rotary_emb=get_2d_rotary_pos_embed_lumina(12, 16, 16),
        cross_attention_kwargs={"base_sequence_length": 8},
    )


def omnigen_inputs(rand):
    length = 7 + 1 + 16  # text, time, image
    mask = torch.ones(2, length, length).tril()
    mask[:, 8:, 8:] = 1
    mask[1, :, :3] = 0  # padded on the left
    return dict(
        hidden_states=rand(2, 4, 8, 8),
        timestep=torch.tensor([0.3, 0.9]),
        input_ids=rand.tokens(32, 2, 7),
        input_img_latents=[rand(1, 4, 4, 4)],
        input_image_sizes={0: [[1, 5]]},
        attention_mask=mask,
        position_ids=torch.arange(length).expand(2, -1),
    )


def ideogram_inputs(rand):
    indicator = torch.full((2, 23), 2)
    indicator[:, :7] = 3
    segments = torch.ones(2, 23, dtype=torch.long)
    segments[1, :3] = -1
    return dict(
        hidden_states=rand(2, 23, 8),
        timestep=torch.tensor([0.3, 0.9]),
        encoder_hidden_states=rand(2, 23, 16),
        position_ids=torch.cat((torch.zeros(7, 3, dtype=torch.long), grid(1, 4, 4))).expand(2, -1, -1),
        segment_ids=segments,
        indicator=indicator,
    )


def lumina2_inputs(rand):
    return dict(
        hidden_states=rand(2, 4, 8, 8),
        timestep=torch.tensor([0.3, 0.9]),
        encoder_hidden_states=rand(2, 7, 16),
        encoder_attention_mask=text_mask(7),
    )


IMAGE_STREAM = [
    TinyModel(
        "BriaFibo2Transformer2DModel",
        dict(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            cap_feat_dim=16,
            injection_layer_ids=(1,),
            perceiver_num_layers=1,
            min_num_gist_tokens=4,
            max_num_gist_tokens=8,
            gist_step=2,
            gist_min_text_len=4,
            gist_max_text_len=16,
            axes_dims=ROPE,
            axes_lens=(64, 16, 16),
        ),
        lambda rand: (
            latents(rand)
            | dict(
                timestep=torch.tensor([0.3, 0.9]),
                encoder_hidden_states=rand(2, 2, 7, 16),
                encoder_attention_mask=text_mask(7).bool(),
            )
        ),
        converts="*?.attention",
    ),
    TinyModel(
        "DiTTransformer2DModel",
        dict(num_layers=2, sample_size=8, norm_num_groups=4, num_embeds_ada_norm=10, **HEADS),
        lambda rand: latents(rand) | dict(timestep=torch.tensor([3, 5]), class_labels=torch.tensor([1, 2])),
        converts="*",
    ),
    TinyModel(
        "DreamLiteTransformer2DModel",
        dict(in_channels=32, norm_num_groups=4, cross_attention_dim=16, ff_mult=2, **HEADS),
        lambda rand: dict(
            hidden_states=rand(2, 32, 4, 4),
            encoder_hidden_states=rand(2, 7, 16),
            encoder_attention_mask=text_mask(7),
        ),
        module="diffusers.models.transformers.transformer_2d_dreamlite",
        converts="*attn1",
        padded=("encoder_hidden_states", "encoder_attention_mask"),
    ),
    TinyModel(
        "ErnieImageTransformer2DModel",
        dict(
            hidden_size=32,
            num_attention_heads=2,
            num_layers=2,
            ffn_hidden_size=32,
            in_channels=4,
            out_channels=4,
            text_in_dim=16,
            rope_axes_dim=ROPE,
        ),
        lambda rand: dict(
            hidden_states=rand(2, 4, 4, 4),
            timestep=two_times(),
            text_bth=rand(2, 7, 16),
            text_lens=torch.tensor([7, 4]),
        ),
        converts="*",
    ),
    TinyModel(
        "Flux3Transformer2DModel",
        FLUX | dict(cond_in_channels=8, timestep_channels=16, mlp_ratio=2.0, axes_dims_rope=(4, 4, 4, 4)),
        lambda rand: flux_inputs(rand) | dict(img_ids=grid(1, 4, 4, 1).float(), txt_ids=grid(1, 1, 1, 7).float()),
        unused="*image_cond*",
        converts="mode_blocks* single_transformer_blocks*",
    ),
    TinyModel(
        "HunyuanDiT2DModel",
        HUNYUAN_DIT | dict(num_layers=4),
        hunyuan_dit_inputs,
        converts="*attn1",
    ),
    TinyModel(
        "Ideogram4Transformer2DModel",
        dict(
            in_channels=8,
            num_layers=2,
            intermediate_size=32,
            adaln_dim=16,
            llm_features_dim=16,
            mrope_section=(4, 2, 2),
            **HEADS,
        ),
        ideogram_inputs,
    ),
    TinyModel(
        "Krea2Transformer2DModel",
        dict(
            in_channels=8,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=32,
            timestep_embed_dim=16,
            text_hidden_dim=32,
            num_text_layers=3,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=32,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=ROPE,
        ),
        lambda rand: dict(
            hidden_states=rand(2, 16, 8),
            encoder_hidden_states=rand(2, 7, 3, 32),
            timestep=torch.tensor([0.3, 0.9]),
            position_ids=torch.cat((torch.zeros(7, 3, dtype=torch.long), grid(1, 4, 4))),
            encoder_attention_mask=text_mask(7).bool(),
        ),
        fused="transformer_blocks.?.attn",
        converts="transformer_blocks.?.attn",
        padded=("encoder_hidden_states", "encoder_attention_mask"),
    ),
    TinyModel(
        "Lumina2Transformer2DModel",
        dict(
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
        ),
        lumina2_inputs,
        fused="*",
        converts="layers.?.attn noise_refiner.?.attn",
        padded=("encoder_hidden_states", "encoder_attention_mask"),
    ),
    TinyModel(
        "LuminaNextDiT2DModel",
        dict(
            sample_size=8,
            hidden_size=48,
            num_layers=2,
            num_attention_heads=4,
            num_kv_heads=2,
            multiple_of=16,
            cross_attention_dim=16,
        ),
        rotary_lumina,
        fused="*",
        converts="*attn1",
        padded=("encoder_hidden_states", "encoder_mask"),
    ),
    TinyModel(
        "NucleusMoEImageTransformer2DModel",
        dict(
            patch_size=2,
            in_channels=8,
            out_channels=2,
            num_layers=2,
            joint_attention_dim=16,
            axes_dims_rope=ROPE,
            mlp_ratio=2.0,
            moe_enabled=False,
            **HEADS,
        ),
        qwen_image_inputs,
        padded=("encoder_hidden_states", "encoder_hidden_states_mask"),
    ),
    TinyModel(
        "OmniGenTransformer2DModel",
        dict(
            in_channels=4,
            hidden_size=32,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=32,
            num_layers=2,
            pad_token_id=0,
            vocab_size=32,
            max_position_embeddings=64,
            original_max_position_embeddings=64,
            rope_scaling={"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
            pos_embed_max_size=8,
            time_step_dim=16,
        ),
        omnigen_inputs,
    ),
    TinyModel(
        "PRXTransformer2DModel",
        dict(in_channels=4, context_in_dim=16, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=2, axes_dim=[8, 8]),
        lambda rand: (
            latents(rand)
            | dict(
                timestep=torch.tensor([0.3, 0.9]), encoder_hidden_states=rand(2, 7, 16), attention_mask=text_mask(7)
            )
        ),
        padded=("encoder_hidden_states", "attention_mask"),
    ),
    TinyModel(
        "PixArtTransformer2DModel",
        dict(
            num_layers=2,
            cross_attention_dim=32,
            caption_channels=16,
            sample_size=8,
            use_additional_conditions=False,
            **HEADS,
        ),
        lambda rand: (
            latents(rand)
            | dict(
                encoder_hidden_states=rand(2, 7, 16),
                timestep=two_times(),
                encoder_attention_mask=text_mask(7),
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            )
        ),
        converts="*attn1",
        padded=("encoder_hidden_states", "encoder_attention_mask"),
    ),
    TinyModel(
        "PriorTransformer",
        dict(num_layers=2, embedding_dim=16, num_embeddings=7, **HEADS),
        lambda rand: dict(
            hidden_states=rand(2, 16),
            timestep=two_times(),
            proj_embedding=rand(2, 16),
            encoder_hidden_states=rand(2, 7, 16),
            attention_mask=text_mask(7).bool(),
        ),
    ),
    TinyModel(
        "QwenImage21Transformer2DModel",
        dict(
            in_channels=8,
            out_channels=8,
            num_layers=2,
            context_in_dim=16,
            mlp_ratio=2,
            axes_dims_rope=ROPE,
            **HEADS,
        ),
        lambda rand: dict(
            hidden_states=rand(2, 16, 8),
            encoder_hidden_states=rand(2, 7, 16),
            timestep=torch.tensor([0.3, 0.9]),
            img_shapes=[[(1, 4, 4)]] * 2,
            img_mask=torch.cat((torch.zeros(2, 7), torch.ones(2, 4)), 1).bool(),
            encoder_hidden_states_mask=text_mask(7),
        ),
    ),
    TinyModel(
        "SanaTransformer2DModel",
        dict(
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
        ),
        lambda rand: (
            latents(rand)
            | dict(encoder_hidden_states=rand(2, 7, 16), timestep=two_times(), encoder_attention_mask=text_mask(7))
        ),
        fused="*attn1",
        padded=("encoder_hidden_states", "encoder_attention_mask"),
    ),
    TinyModel(
        "Transformer2DModel",
        dict(in_channels=32, norm_num_groups=4, cross_attention_dim=16, **HEADS),
        lambda rand: dict(
            hidden_states=rand(2, 32, 4, 4),
            encoder_hidden_states=rand(2, 7, 16),
            encoder_attention_mask=text_mask(7),
        ),
        converts="*attn1",
        padded=("encoder_hidden_states", "encoder_attention_mask"),
    ),
    TinyModel(
        "ZImageTransformer2DModel",
        Z_IMAGE,
        z_image_inputs,
        converts="layers.?.attention noise_refiner.?.attention",
    ),
]
