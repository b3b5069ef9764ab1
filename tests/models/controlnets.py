"""ControlNets."""

from unittest import mock

import torch
import torch.nn.functional as F

from tests.models.base import TinyModel, text_mask, two_times
from tests.models.image_joint import FLUX, QWEN_IMAGE, SD3, flux_inputs, qwen_image_inputs, sd3_inputs
from tests.models.image_stream import HUNYUAN_DIT, Z_IMAGE, hunyuan_dit_inputs, z_image_inputs
from tests.models.unets import UNET, without
from tests.models.video_stream import COSMOS

CONTROLNET = without(UNET, "sample_size", "up_block_types") | dict(conditioning_embedding_out_channels=(4, 4))


def controlnet_inputs(rand):
    return dict(
        sample=rand(2, 4, 8, 8),
        timestep=two_times(),
        encoder_hidden_states=rand(2, 7, 16),
        controlnet_cond=rand(2, 3, 16, 16),
    )


XS = dict(
    block_out_channels=(16, 32),
    cross_attention_dim=16,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    transformer_layers_per_block=1,
)


def unet_of_xs():
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**UNET | dict(layers_per_block=2))


def build_xs_adapter():
    """An adapter only runs inside a UNet."""
    from diffusers import ControlNetXSAdapter, UNetControlNetXSModel

    unet = unet_of_xs()
    adapter = ControlNetXSAdapter.from_unet(
        unet, size_ratio=0.5, conditioning_embedding_out_channels=(4, 4), num_attention_heads=2
    )
    return UNetControlNetXSModel.from_unet(unet, adapter)


def build_z_image_controlnet():
    """Its embedders are those of the transformer that it controls."""
    from diffusers import ZImageControlNetModel, ZImageTransformer2DModel

    controlnet = ZImageControlNetModel(
        control_layers_places=[0, 1],
        control_refiner_layers_places=[0],
        control_in_dim=4,
        add_control_noise_refiner="control_noise_refiner",
        dim=32,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
    )
    controlnet = ZImageControlNetModel.from_transformer(controlnet, ZImageTransformer2DModel(**Z_IMAGE))
    controlnet.gradient_checkpointing = False  # its forward reads what its class does not define
    return controlnet


def run_cosmos_controlnet(model, rand):
    """It resizes the padding mask by torchvision, whatever the mask; nearest neighbours are the same here."""
    transforms = mock.Mock()
    transforms.functional.resize = lambda mask, size, interpolation: F.interpolate(mask, size)
    with mock.patch("diffusers.models.controlnets.controlnet_cosmos.transforms", transforms, create=True):
        return model(
            controls_latents=rand(2, 4, 3, 8, 8),
            latents=rand(2, 4, 3, 8, 8),
            timestep=two_times(),
            encoder_hidden_states=rand(2, 7, 16),
            condition_mask=torch.ones(2, 1, 3, 8, 8),
            padding_mask=torch.zeros(1, 1, 8, 8),
            attention_mask=text_mask(7).bool(),
            return_dict=False,
        )


CONTROLNETS = [
    TinyModel(
        "ControlNetModel",
        CONTROLNET,
        controlnet_inputs,
        converts="*attn1",
    ),
    TinyModel(
        "ControlNetUnionModel",
        CONTROLNET
        | dict(
            num_trans_channel=16,
            num_trans_head=2,
            num_proj_channel=16,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=16 + 6 * 8,
        ),
        lambda rand: (
            controlnet_inputs(rand)
            | dict(
                controlnet_cond=[rand(2, 3, 16, 16)],
                control_type=torch.tensor([[1.0, 0, 0, 0, 0, 0]] * 2),
                control_type_idx=[0],
                added_cond_kwargs=dict(text_embeds=rand(2, 16), time_ids=rand(2, 6)),
            )
        ),
        converts="*attn1",
    ),
    TinyModel(
        "ControlNetXSAdapter",
        build=build_xs_adapter,
        inputs=controlnet_inputs,
        converts="*attn1",
    ),
    TinyModel(
        "UNetControlNetXSModel",
        build=build_xs_adapter,
        inputs=controlnet_inputs,
        converts="*attn1",
    ),
    TinyModel(
        "CosmosControlNetModel",
        without(COSMOS, "concat_padding_mask")
        | dict(n_controlnet_blocks=2, in_channels=6, latent_channels=6, model_channels=32),
        run_model=run_cosmos_controlnet,
        converts="*attn1",
    ),
    TinyModel(
        "FluxControlNetModel",
        FLUX | dict(pooled_projection_dim=16),
        lambda rand: flux_inputs(rand) | dict(pooled_projections=rand(2, 16), controlnet_cond=rand(2, 16, 8)),
        converts="*",
    ),
    TinyModel(
        "HunyuanDiT2DControlNetModel",
        HUNYUAN_DIT | dict(transformer_num_layers=4),
        lambda rand: hunyuan_dit_inputs(rand) | dict(controlnet_cond=rand(2, 4, 8, 8)),
        converts="*attn1",
    ),
    TinyModel(
        "QwenImageControlNetModel",
        QWEN_IMAGE,
        lambda rand: qwen_image_inputs(rand) | dict(controlnet_cond=rand(2, 16, 8)),
        converts="*",
        padded=("encoder_hidden_states", "encoder_hidden_states_mask"),
    ),
    TinyModel(
        "SD3ControlNetModel",
        SD3,
        lambda rand: sd3_inputs(rand) | dict(controlnet_cond=rand(2, 4, 8, 8)),
        converts="*",
    ),
    TinyModel(
        "SanaControlNetModel",
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
        ),
        lambda rand: dict(
            hidden_states=rand(2, 4, 8, 8),
            encoder_hidden_states=rand(2, 7, 16),
            timestep=two_times(),
            controlnet_cond=rand(2, 4, 8, 8),
            encoder_attention_mask=text_mask(7),
        ),
        fused="*attn1",
        padded=("encoder_hidden_states", "encoder_attention_mask"),
    ),
    TinyModel(
        "SparseControlNetModel",
        without(CONTROLNET, "attention_head_dim")
        | dict(
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            num_attention_heads=2,
            motion_num_attention_heads=2,
            motion_max_seq_length=8,
            conditioning_channels=3,
        ),
        lambda rand: dict(
            sample=rand(2, 4, 3, 8, 8),
            timestep=two_times(),
            encoder_hidden_states=rand(2, 7, 16).repeat_interleave(3, 0),
            controlnet_cond=rand(2, 3, 3, 8, 8),
            conditioning_mask=torch.ones(2, 1, 3, 8, 8),
        ),
        converts="*attn1",
    ),
    TinyModel(
        "ZImageControlNetModel",
        build=build_z_image_controlnet,
        inputs=lambda rand: z_image_inputs(rand) | dict(control_context=[rand(4, 1, 8, 8), rand(4, 1, 8, 8)]),
        converts="control_layers.?.attention control_noise_refiner.?.attention noise_refiner.?.attention",
    ),
]
