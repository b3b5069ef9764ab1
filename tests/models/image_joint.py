"""Transformers that draw images: text and image tokens attend together, with projections of their own or shared."""

import torch

from tests.models.base import TinyModel, grid, text_mask, two_times

HEADS = dict(num_attention_heads=2, attention_head_dim=16)


SIDE = dict(sample_size=8, in_channels=4, out_channels=4)


ROPE = (4, 6, 6)


def latents(rand):
    return dict(hidden_states=rand(2, 4, 8, 8))


def flux_inputs(rand, channels=8, text=32):
    return dict(
        hidden_states=rand(2, 16, channels),
        encoder_hidden_states=rand(2, 7, text),
        timestep=torch.tensor([0.3, 0.9]),
        img_ids=grid(1, 4, 4).float(),
        txt_ids=torch.zeros(7, 3),
    )


FLUX = dict(
    in_channels=8,
    num_layers=1,
    num_single_layers=1,
    joint_attention_dim=32,
    axes_dims_rope=ROPE,
    **HEADS,
)


def cog_sizes():
    return dict(
        original_size=torch.tensor([[8.0, 8.0]] * 2),
        target_size=torch.tensor([[8.0, 8.0]] * 2),
        crop_coords=torch.zeros(2, 2),
    )


COG = dict(
    patch_size=2,
    in_channels=4,
    out_channels=4,
    num_layers=2,
    text_embed_dim=16,
    time_embed_dim=16,
    condition_dim=8,
    **HEADS,
)


def qwen_image_inputs(rand, channels=8):
    return dict(
        hidden_states=rand(2, 16, channels),
        encoder_hidden_states=rand(2, 7, 16),
        encoder_hidden_states_mask=text_mask(7).bool(),
        timestep=torch.tensor([0.3, 0.9]),
        img_shapes=[[(1, 4, 4)]] * 2,
    )


QWEN_IMAGE = dict(
    patch_size=2, in_channels=8, out_channels=2, num_layers=2, joint_attention_dim=16, axes_dims_rope=ROPE, **HEADS
)


SD3 = dict(
    sample_size=8,
    patch_size=2,
    in_channels=4,
    out_channels=4,
    num_layers=2,
    joint_attention_dim=32,
    caption_projection_dim=32,
    pooled_projection_dim=16,
    pos_embed_max_size=8,
    **HEADS,
)


def sd3_inputs(rand):
    return dict(
        hidden_states=rand(2, 4, 8, 8),
        encoder_hidden_states=rand(2, 7, 32),
        pooled_projections=rand(2, 16),
        timestep=two_times(),
    )


IMAGE_JOINT = [
    TinyModel(
        "AuraFlowTransformer2DModel",
        dict(
            patch_size=2,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            joint_attention_dim=16,
            caption_projection_dim=32,
            pos_embed_max_size=16,
            **SIDE,
            **HEADS,
        ),
        lambda rand: latents(rand) | dict(encoder_hidden_states=rand(2, 7, 16), timestep=torch.tensor([0.3, 0.9])),
        converts="*",
    ),
    TinyModel(
        "BriaFiboTransformer2DModel",
        FLUX | dict(text_encoder_dim=16),
        lambda rand: flux_inputs(rand) | dict(text_encoder_layers=[rand(2, 7, 16), rand(2, 7, 16)]),
        converts="*",
    ),
    TinyModel(
        "BriaTransformer2DModel",
        FLUX,
        flux_inputs,
        converts="*",
    ),
    TinyModel(
        "ChromaTransformer2DModel",
        FLUX | dict(approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1),
        lambda rand: flux_inputs(rand) | dict(attention_mask=torch.cat((text_mask(7), torch.ones(2, 16)), 1).bool()),
        converts="*",
        pair_mask=("attention_mask",),
    ),
    TinyModel(
        "CogView3PlusTransformer2DModel",
        COG | dict(pos_embed_max_size=8, sample_size=8),
        lambda rand: latents(rand) | dict(encoder_hidden_states=rand(2, 7, 16), timestep=two_times()) | cog_sizes(),
        converts="*",
    ),
    TinyModel(
        "CogView4Transformer2DModel",
        COG | dict(pos_embed_max_size=8, sample_size=8, rope_axes_dim=(8, 8)),
        lambda rand: latents(rand) | dict(encoder_hidden_states=rand(2, 7, 16), timestep=two_times()) | cog_sizes(),
        converts="*",
    ),
    TinyModel(
        "Flux2Transformer2DModel",
        FLUX | dict(timestep_guidance_channels=16, mlp_ratio=2.0, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False),
        lambda rand: flux_inputs(rand) | dict(img_ids=grid(1, 4, 4, 1).float(), txt_ids=grid(1, 1, 1, 7).float()),
        converts="*",
    ),
    TinyModel(
        "FluxTransformer2DModel",
        FLUX | dict(pooled_projection_dim=16),
        lambda rand: flux_inputs(rand) | dict(pooled_projections=rand(2, 16)),
        converts="*",
    ),
    TinyModel(
        "GlmImageTransformer2DModel",
        COG | dict(prior_vq_quantizer_codebook_size=32),
        lambda rand: (
            latents(rand)
            | dict(
                encoder_hidden_states=rand(2, 7, 16),
                prior_token_id=rand.tokens(32, 2, 16),
                prior_token_drop=torch.tensor([False, True]),
                timestep=two_times(),
                target_size=torch.tensor([[8.0, 8.0]] * 2),
                crop_coords=torch.zeros(2, 2),
                attention_mask=text_mask(7),
            )
        ),
        converts="*",
        pair_mask=("attention_mask",),
    ),
    TinyModel(
        "HiDreamImageTransformer2DModel",
        dict(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            caption_channels=[16, 12],
            text_emb_dim=16,
            num_routed_experts=2,
            num_activated_experts=1,
            axes_dims_rope=ROPE,
            max_resolution=(4, 4),
            llama_layers=[0, 1],
            **HEADS,
        ),
        lambda rand: (
            latents(rand)
            | dict(
                timesteps=two_times(),
                encoder_hidden_states_t5=rand(2, 5, 16),
                encoder_hidden_states_llama3=rand(2, 2, 7, 12),
                pooled_embeds=rand(2, 16),
            )
        ),
        converts="*",
    ),
    TinyModel(
        "HunyuanImageTransformer2DModel",
        dict(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            text_embed_dim=16,
            rope_axes_dim=(8, 8),
            **HEADS,
        ),
        lambda rand: dict(
            hidden_states=rand(2, 4, 4, 4),
            timestep=torch.tensor([3.0, 500.0]),
            encoder_hidden_states=rand(2, 7, 16),
            encoder_attention_mask=text_mask(7),
        ),
        converts="single_transformer_blocks.?.attn transformer_blocks.?.attn",
        padded=("encoder_hidden_states", "encoder_attention_mask"),
    ),
    TinyModel(
        "LongCatImageTransformer2DModel",
        FLUX | dict(pooled_projection_dim=16),
        flux_inputs,
        converts="*",
    ),
    TinyModel(
        "OvisImageTransformer2DModel",
        FLUX | dict(out_channels=8),
        flux_inputs,
        converts="*",
    ),
    TinyModel(
        "QwenImageTransformer2DModel",
        QWEN_IMAGE,
        qwen_image_inputs,
        converts="*",
        padded=("encoder_hidden_states", "encoder_hidden_states_mask"),
        since="0.42",
    ),
    TinyModel(
        "SD3Transformer2DModel",
        SD3,
        sd3_inputs,
        converts="*",
    ),
    TinyModel(
        "SD3Transformer2DModel",
        SD3 | dict(dual_attention_layers=(0,), qk_norm="rms_norm"),
        sd3_inputs,
        name="SD3Transformer2DModel-3.5",
        converts="*",
    ),
]
