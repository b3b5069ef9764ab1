"""Autoencoders."""

import torch

from tests.models.base import TinyModel, text_mask

KL = dict(
    block_out_channels=(8, 16),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    norm_num_groups=4,
)


def image(rand):
    return dict(sample=rand(2, 3, 16, 16))


def video(rand):
    return dict(sample=rand(1, 3, 5, 16, 16))


def wave(rand):
    return dict(sample=rand(1, 1, 64))


DC_BLOCKS = ("ResBlock", "EfficientViTBlock")
DC = dict(
    latent_channels=4,
    attention_head_dim=8,
    encoder_block_types=DC_BLOCKS,
    decoder_block_types=DC_BLOCKS,
    encoder_block_out_channels=(8, 16),
    decoder_block_out_channels=(8, 16),
    encoder_layers_per_block=(1, 1),
    decoder_layers_per_block=(1, 1),
    encoder_qkv_multiscales=((), (5,)),
    decoder_qkv_multiscales=((), (5,)),
)


def run_vq(model, rand):
    # Without the quantization between the two, which has no gradient of its own.
    return model.encode(rand(2, 3, 16, 16)), model.decode(rand(2, 3, 8, 8), force_not_quantize=True)


VAES = [
    TinyModel(
        "AsymmetricAutoencoderKL",
        dict(
            down_block_types=("DownEncoderBlock2D",) * 2,
            down_block_out_channels=(8, 16),
            up_block_types=("UpDecoderBlock2D",) * 2,
            up_block_out_channels=(8, 16),
            norm_num_groups=4,
        ),
        image,
    ),
    TinyModel(
        "AutoencoderDC",
        DC,
        image,
        fused="*",
    ),
    TinyModel(
        "AutoencoderDC",
        DC,
        # As few pixels as features a head: stock multiplies pixel by pixel scores there.
        lambda rand: dict(sample=rand(2, 3, 4, 4)),
        name="AutoencoderDC-few-pixels",
        fused="*",
    ),
    TinyModel("AutoencoderKL", KL, image),
    TinyModel(
        "AutoencoderKLAllegro",
        dict(
            block_out_channels=(8, 16),
            down_block_types=("AllegroDownBlock3D",) * 2,
            up_block_types=("AllegroUpBlock3D",) * 2,
            temporal_downsample_blocks=(True, False),
            temporal_upsample_blocks=(False, True),
            layers_per_block=1,
            norm_num_groups=4,
        ),
        run_model=lambda model, rand: (
            model.encoder(rand(1, 3, 4, 16, 16)),  # encode() works in tiles of 320 pixels only
            model.decoder(rand(1, 4, 2, 8, 8)),
        ),
    ),
    TinyModel(
        "AutoencoderKLCosmos",
        dict(
            latent_channels=4,
            encoder_block_out_channels=(8, 16),
            decode_block_out_channels=(8, 16),
            attention_resolutions=(8,),
            resolution=16,
            num_layers=1,
            patch_size=2,
            spatial_compression_ratio=4,
            temporal_compression_ratio=4,
        ),
        video,
    ),
    TinyModel(
        "AutoencoderKLFlux2",
        dict(KL, latent_channels=4),
        image,
    ),
    TinyModel(
        "AutoencoderKLHunyuanImage",
        dict(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(32, 32),
            layers_per_block=1,
            spatial_compression_ratio=2,
            sample_size=16,
        ),
        image,
        unreachable="*",
    ),
    TinyModel(
        "AutoencoderKLHunyuanImageRefiner",
        dict(
            latent_channels=4,
            block_out_channels=(16, 16),
            layers_per_block=1,
            spatial_compression_ratio=2,
            temporal_compression_ratio=2,
        ),
        video,
        unreachable="*",
    ),
    TinyModel(
        "AutoencoderKLHunyuanVideo",
        dict(
            latent_channels=4,
            block_out_channels=(8, 8, 16, 16),
            layers_per_block=1,
            norm_num_groups=4,
        ),
        video,
    ),
    TinyModel(
        "AutoencoderKLHunyuanVideo15",
        dict(
            latent_channels=4,
            block_out_channels=(16, 16),
            layers_per_block=1,
            spatial_compression_ratio=2,
            temporal_compression_ratio=2,
        ),
        video,
        unreachable="*",
    ),
    TinyModel(
        "AutoencoderKLKVAEAudio",
        dict(
            encoder_dim=4,
            encoder_rates=[2, 2],
            latent_dim=16,
            codebook_dim=4,
            decoder_dim=16,
            decoder_rates=[2, 2],
            attn_num_heads=2,
        ),
        wave,
    ),
    TinyModel(
        "AutoencoderKLLTX2Audio",
        dict(
            base_channels=8,
            ch_mult=(1, 2),
            num_res_blocks=1,
            resolution=16,
            latent_channels=2,
            mel_bins=8,
            mid_block_add_attention=True,
        ),
        lambda rand: dict(sample=rand(1, 2, 8, 8)),
        unreachable="*",
    ),
    TinyModel(
        "AutoencoderKLMiniMaxH3",
        dict(
            latent_channels=4,
            block_out_channels=(8, 8),
            layers_per_block=1,
            spatial_downsample_factors=(2, 2),
            temporal_downsample_factors=(2, 1),
            norm_num_groups=4,
            decoder_num_layers=2,
            decoder_num_attention_heads=2,
            decoder_attention_head_dim=16,
            decoder_ffn_mult=2,
            clip_length=5,
            token_drop=0,
            latents_mean=(0.0,) * 4,
            latents_std=(1.0,) * 4,
        ),
        video,
    ),
    TinyModel(
        "AutoencoderKLMiniMaxH3Audio",
        dict(
            encoder_dim=4,
            encoder_rates=(2, 2),
            latent_dim=16,
            latent_channels=4,
            num_attention_heads=2,
            decoder_dim=16,
            decoder_rates=(2, 2),
            decoder_kernel_sizes=(4, 4),
            resblock_kernel_sizes=(3,),
            resblock_dilation_sizes=((1, 3, 5),),
        ),
        wave,
    ),
    TinyModel(
        "AutoencoderKLMochi",
        dict(
            in_channels=15,
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32),
            latent_channels=4,
            layers_per_block=(1, 1, 1, 1, 1),
            latents_mean=(0.0,) * 4,
            latents_std=(1.0,) * 4,
        ),
        run_model=lambda model, rand: model.encode(rand(1, 3, 13, 16, 16), return_dict=False)[0].mean,
    ),
    TinyModel(
        "AutoencoderKLQwenImage",
        dict(base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False]),
        video,
        unreachable="*",
    ),
    TinyModel(
        "AutoencoderKLQwenImage21",
        dict(
            base_dim=8,
            decoder_base_dim=8,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[False],
            in_channels=3,
            out_channels=3,
            is_residual=False,
        ),
        lambda rand: dict(sample=rand(1, 3, 1, 16, 16)),
        unreachable="*",
    ),
    TinyModel(
        "AutoencoderKLTemporalDecoder",
        dict(block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=2),
        lambda rand: dict(sample=rand(2, 3, 16, 16), num_frames=2),
    ),
    TinyModel(
        "AutoencoderKLWan",
        dict(base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False]),
        video,
        unreachable="*",
    ),
    TinyModel(
        "AutoencoderRAE",
        dict(
            encoder_hidden_size=64,
            encoder_patch_size=4,
            encoder_num_hidden_layers=1,
            decoder_hidden_size=32,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=32,
            patch_size=4,
            encoder_input_size=16,
            image_size=16,
        ),
        image,
    ),
    TinyModel(
        "AutoencoderSAME",
        dict(
            audio_channels=1,
            patch_size=4,
            encoder_channels=16,
            encoder_c_mults=(2,),
            encoder_strides=(2,),
            encoder_transformer_depths=(1,),
            latent_dim=4,
            dim_heads=16,
            ff_mult=2,
        ),
        wave,
    ),
    TinyModel(
        "AutoencoderVidTok",
        dict(ch=32, ch_mult=[1, 1], num_res_blocks=1),
        video,
        unreachable="*",
    ),
    TinyModel(
        "ConsistencyDecoderVAE",
        dict(
            encoder_block_out_channels=(8, 16),
            encoder_down_block_types=("DownEncoderBlock2D",) * 2,
            encoder_layers_per_block=1,
            encoder_norm_num_groups=4,
            decoder_block_out_channels=(8, 16),
            decoder_down_block_types=("ResnetDownsampleBlock2D",) * 2,
            decoder_up_block_types=("ResnetUpsampleBlock2D",) * 2,
            decoder_layers_per_block=1,
            decoder_norm_num_groups=4,
        ),
        run_model=lambda model, rand: model.encode(rand(2, 3, 16, 16), return_dict=False)[0].mean,
    ),
    TinyModel(
        "LTX2VideoDiffusionDecoderModel",
        dict(
            latent_channels=4,
            patch_size=2,
            decoder_head_dim=16,
            decoder_stage_channels=(32, 16),
            decoder_stage_depths=(1, 1),
            decoder_stage_kernels=((3, 3, 3),),
            decoder_upsample_strides=((1, 2, 2),),
            decoder_upsample_channel_reductions=(2,),
            decoder_stage5_kernel=(3, 3, 3),
            decoder_t_emb_dim=16,
            spatial_compression_ratio=4,
            temporal_compression_ratio=1,
        ),
        run_model=lambda model, rand: model(rand(1, 4, 3, 4, 4), generator=rand.generator, return_dict=False),
        unreachable="*",
        differentiable=False,
    ),
    TinyModel(
        "MMAudioVAE",
        dict(
            mel_bins=8,
            latent_channels=4,
            hidden_channels=16,
            channel_multipliers=(1, 2),
            layers_per_block=1,
            n_fft=64,
            hop_length=16,
        ),
        lambda rand: dict(sample=rand(1, 512)),
    ),
    TinyModel(
        "RFD4ProteinaAutoencoder",
        dict(
            atom37_mask=[[True] * 37] * 5,
            allowed_residue_types=[[True] * 5] * 3,
            latent_dim=4,
            n_residue_types=5,
            num_token_types=3,
            nlayers=1,
            token_dim=32,
            nheads=2,
            dim_cond=16,
            pair_repr_dim=16,
            token_type_emb_dim=4,
            decoder_feats_seq=("ca_coors_nm", "z_latent_seq"),
            encoder_feats_seq=("x1_a37coors_nm",),
        ),
        lambda rand: dict(
            z_latent=rand(2, 12, 4),
            ca_coors_nm=rand(2, 12, 3),
            padding_mask=text_mask(12).bool(),
            conditioning=dict(is_in_context_conditioning=torch.zeros(2, 12), supports_local_latent=torch.ones(2, 12)),
        ),
        unused="encoder*",
    ),
    TinyModel(
        "VQModel",
        dict(KL, block_out_channels=(32, 32)),
        run_model=run_vq,
    ),
    TinyModel(
        "VQModel",
        dict(
            block_out_channels=(32, 32),  # the spatial norm has 32 groups
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
            norm_type="spatial",
        ),
        run_model=run_vq,
        name="VQModel-spatial-norm",
    ),
]
