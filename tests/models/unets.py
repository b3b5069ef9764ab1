"""UNets."""

import torch

from tests.models.base import Rand, TinyModel, text_mask, two_times

UNET = dict(
    sample_size=8,
    block_out_channels=(16, 32),
    layers_per_block=1,
    norm_num_groups=4,
    cross_attention_dim=16,
    attention_head_dim=4,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)


def unet_inputs(rand):
    return dict(
        sample=rand(2, 4, 8, 8),
        timestep=two_times(),
        encoder_hidden_states=rand(2, 7, 16),
        encoder_attention_mask=text_mask(7),
    )


def build_unet(**changes):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**UNET | changes)


def run_unet(model, generator):
    return model(**unet_inputs(Rand(generator))).sample


def video_inputs(rand):
    return dict(sample=rand(2, 4, 3, 8, 8), timestep=two_times(), encoder_hidden_states=rand(2, 7, 16))


def frame_inputs(rand):
    """The pipelines of motion models repeat the text for each frame."""
    return video_inputs(rand) | dict(encoder_hidden_states=rand(2, 7, 16).repeat_interleave(3, 0))


def blocks(kind: str) -> dict:
    return dict(
        down_block_types=(f"CrossAttnDownBlock{kind}", f"DownBlock{kind}"),
        up_block_types=(f"UpBlock{kind}", f"CrossAttnUpBlock{kind}"),
    )


def without(config: dict, *names: str) -> dict:
    return {name: value for name, value in config.items() if name not in names}


def build_motion_adapter():
    """Adapters only run inside a UNet; this is the UNet, with an adapter's weights."""
    from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel

    adapter = MotionAdapter(
        block_out_channels=(16, 32),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
        motion_max_seq_length=8,
    )
    return UNetMotionModel.from_unet2d(UNet2DConditionModel(**UNET), adapter)


UNETS = [
    TinyModel(
        "UNet2DConditionModel",
        UNET,
        unet_inputs,
        converts="*attn1",
        padded=("encoder_hidden_states", "encoder_attention_mask"),
    ),
    TinyModel(
        "UNet2DConditionModel",
        UNET
        | dict(
            down_block_types=("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
        ),
        lambda rand: without(unet_inputs(rand), "encoder_attention_mask"),
        name="UNet2DConditionModel-added-kv",
    ),
    TinyModel(
        "DreamLiteUNetModel",
        dict(
            sample_size=8,
            block_out_channels=(16, 32, 32),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=16,
            attention_head_dim=4,
            num_kv_heads=1,
            ff_mult=2,
        ),
        unet_inputs,
        fused="*",
        converts="*attn1",
        padded=("encoder_hidden_states", "encoder_attention_mask"),
    ),
    TinyModel(
        "I2VGenXLUNet",
        without(UNET, "attention_head_dim") | blocks("3D") | dict(attention_head_dim=4, num_attention_heads=4),
        lambda rand: (
            video_inputs(rand)
            | dict(fps=torch.tensor([8, 16]), image_latents=rand(2, 4, 3, 8, 8), image_embeddings=rand(2, 16))
        ),
        converts="*attn1 *temp_attentions*attn2 transformer_in*attn2",
    ),
    TinyModel(
        "Kandinsky3UNet",
        dict(
            time_embedding_dim=16,
            groups=4,
            attention_head_dim=4,
            layers_per_block=2,
            block_out_channels=(16, 32),
            cross_attention_dim=16,
            encoder_hid_dim=16,
        ),
        unet_inputs,
    ),
    TinyModel(
        "MotionAdapter",
        build=build_motion_adapter,
        inputs=frame_inputs,
        converts="*attn1 *motion_modules*attn2",
    ),
    TinyModel(
        "StableCascadeUNet",
        dict(
            in_channels=4,
            out_channels=4,
            timestep_ratio_embedding_dim=8,
            conditioning_dim=32,
            block_out_channels=(32, 32),
            num_attention_heads=(2, 2),
            down_num_layers_per_block=(1, 1),
            up_num_layers_per_block=(1, 1),
            clip_text_in_channels=16,
            clip_text_pooled_in_channels=16,
            clip_image_in_channels=16,
            clip_seq=2,
        ),
        lambda rand: dict(
            sample=rand(2, 4, 8, 8),
            timestep_ratio=torch.tensor([0.3, 0.9]),
            clip_text_pooled=rand(2, 1, 16),
            clip_text=rand(2, 7, 16),
            clip_img=rand(2, 1, 16),
        ),
        converts="*",
    ),
    TinyModel(
        "UNet1DModel",
        dict(sample_size=32, block_out_channels=(32, 32, 64), extra_in_channels=64),
        lambda rand: dict(sample=rand(2, 2, 32), timestep=two_times()),
        unreachable="*",
        since="0.42",
    ),
    TinyModel(
        "UNet2DModel",
        dict(
            sample_size=8,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
        ),
        lambda rand: dict(sample=rand(2, 3, 8, 8), timestep=two_times()),
        converts="*",
    ),
    TinyModel(
        "UNet3DConditionModel",
        UNET | blocks("3D"),
        video_inputs,
        converts="*attn1 *temp_attentions*attn2 transformer_in*attn2",
    ),
    TinyModel(
        "UNetMotionModel",
        without(UNET, "attention_head_dim")
        | blocks("Motion")
        | dict(num_attention_heads=2, motion_num_attention_heads=2, motion_max_seq_length=8),
        frame_inputs,
        converts="*attn1 *motion_modules*attn2",
    ),
    TinyModel(
        "UNetSpatioTemporalConditionModel",
        without(UNET, "attention_head_dim", "norm_num_groups")
        | blocks("SpatioTemporal")
        | dict(
            block_out_channels=(32, 64),  # its norms have 32 groups
            num_attention_heads=(2, 2),
            num_frames=3,
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24,
        ),
        lambda rand: dict(
            sample=rand(2, 3, 8, 8, 8),
            timestep=two_times(),
            encoder_hidden_states=rand(2, 7, 16),
            added_time_ids=rand(2, 3),
        ),
        converts="*attn1",
    ),
    TinyModel(
        "UVit2DModel",
        dict(
            hidden_size=32,
            cond_embed_dim=16,
            micro_cond_encode_dim=4,
            micro_cond_embed_dim=20,
            encoder_hidden_size=16,
            vocab_size=32,
            codebook_size=30,
            in_channels=32,
            block_out_channels=32,
            num_res_blocks=1,
            block_num_heads=2,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            sample_size=4,
        ),
        lambda rand: dict(
            input_ids=rand.tokens(30, 2, 4, 4),
            encoder_hidden_states=rand(2, 7, 16),
            pooled_text_emb=rand(2, 16),
            micro_conds=rand(2, 5),
        ),
        converts="transformer_layers.?.attn1",
    ),
]
