"""Transformers that draw sound, and those of other kinds: proteins, text conditions."""

import torch

from tests.models.base import TinyModel, text_mask, two_times


def stable_audio_inputs(rand):
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    return dict(
        hidden_states=rand(2, 4, 12),
        timestep=two_times(),
        encoder_hidden_states=rand(2, 7, 16),
        global_hidden_states=rand(2, 1, 16),
        rotary_embedding=get_1d_rotary_pos_embed(8, 13, use_real=True, repeat_interleave_real=False),
        encoder_attention_mask=text_mask(7).bool(),
    )


def tokens_mask(length):
    return text_mask(length).bool()


AUDIO = [
    TinyModel(
        "AceStepTransformer1DModel",
        dict(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            in_channels=12,
            audio_acoustic_hidden_dim=4,
            sliding_window=2,
        ),
        lambda rand: dict(
            hidden_states=rand(2, 12, 4),
            timestep=torch.tensor([0.3, 0.9]),
            timestep_r=torch.tensor([0.1, 0.5]),
            encoder_hidden_states=rand(2, 7, 32),
            context_latents=rand(2, 12, 8),
        ),
        fused="*",
        converts="layers.1.self_attn",
    ),
    TinyModel(
        "LongCatAudioDiTTransformer",
        dict(dit_dim=32, dit_depth=2, dit_heads=2, dit_text_dim=16, latent_dim=4, ff_mult=2.0),
        lambda rand: dict(
            hidden_states=rand(2, 12, 4),
            encoder_hidden_states=rand(2, 7, 16),
            encoder_attention_mask=tokens_mask(7),
            timestep=torch.tensor([0.3, 0.9]),
            attention_mask=tokens_mask(12),
            latent_cond=rand(2, 12, 4),
        ),
        converts="*self_attn",
        padded=("encoder_hidden_states", "encoder_attention_mask"),
    ),
    TinyModel(
        "MiniMaxMusic3RVQDepthDecoder",
        dict(hidden_size=32, num_layers=2, num_attention_heads=2, intermediate_size=32, audio_vocab_size=16),
        lambda rand: dict(inputs_embeds=rand(2, 8, 32)),
    ),
    TinyModel(
        "MiniMaxMusic3Transformer1DModel",
        dict(
            in_channels=4,
            condition_dim=16,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=16,
            ff_inner_dim=32,
            rotary_dim=8,
            fourier_embedding_dim=16,
        ),
        lambda rand: dict(
            hidden_states=rand(2, 4, 12), timestep=torch.tensor([0.3, 0.9]), encoder_hidden_states=rand(2, 12, 16)
        ),
        converts="*",
    ),
    TinyModel(
        "RFD4ProteinaTransformer",
        dict(
            nlayers=2,
            token_dim=32,
            nheads=2,
            dim_cond=16,
            pair_repr_dim=16,
            latent_dim=4,
            token_type_emb_dim=4,
            cath_emb_dim=4,
            t_emb_dim=8,
            seq_sep_dim=8,
            xt_pair_dist_dim=6,
            tri_mult_c=8,
            feats_seq=("xt_bb_ca", "xt_local_latents"),
            feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents"),
            feats_pair_repr=("xt_bb_ca_pair_dists",),
        ),
        lambda rand: dict(
            bb_ca=rand(2, 12, 3),
            local_latents=rand(2, 12, 4),
            bb_ca_time=torch.tensor([0.3, 0.9]),
            local_latents_time=torch.tensor([0.3, 0.9]),
            padding_mask=tokens_mask(12),
            conditioning=dict(is_in_context_conditioning=torch.zeros(2, 12), supports_local_latent=torch.ones(2, 12)),
        ),
    ),
    TinyModel(
        "StableAudio3DiTModel",
        dict(
            io_channels=4,
            embed_dim=32,
            depth=2,
            num_heads=2,
            cond_token_dim=16,
            global_cond_dim=16,
            local_add_cond_dim=5,
            timestep_features_dim=8,
            ff_mult=2.0,
            num_memory_tokens=3,
        ),
        lambda rand: dict(
            hidden_states=rand(2, 4, 12),
            timestep=torch.tensor([0.3, 0.9]),
            encoder_hidden_states=rand(2, 7, 16),
            global_hidden_states=rand(2, 16),
            encoder_attention_mask=tokens_mask(7),
            local_add_cond=rand(2, 5, 12),
        ),
        converts="*self_attn",
        padded=("encoder_hidden_states", "encoder_attention_mask"),
    ),
    TinyModel(
        "StableAudioDiTModel",
        dict(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            num_key_value_attention_heads=2,
            cross_attention_dim=32,
            time_proj_dim=16,
            global_states_input_dim=16,
            cross_attention_input_dim=16,
        ),
        stable_audio_inputs,
        fused="*attn2",
        converts="*attn1",
        padded=("encoder_hidden_states", "encoder_attention_mask"),
    ),
    TinyModel(
        "T5FilmDecoder",
        dict(input_dims=4, targets_length=12, d_model=32, num_layers=2, num_heads=2, d_kv=16, d_ff=32),
        lambda rand: dict(
            encodings_and_masks=[(rand(2, 7, 32), text_mask(7)), (rand(2, 5, 32), text_mask(5))],
            decoder_input_tokens=rand(2, 12, 4),
            decoder_noise_time=torch.tensor([0.3, 0.9]),
        ),
    ),
    TinyModel(
        "AnimaTextConditioner",
        dict(
            source_dim=16,
            target_dim=32,
            model_dim=32,
            num_layers=2,
            num_attention_heads=2,
            mlp_ratio=2.0,
            target_vocab_size=32,
            min_sequence_length=8,
        ),
        lambda rand: dict(
            source_hidden_states=rand(2, 7, 16),
            target_input_ids=rand.tokens(32, 2, 5),
            target_attention_mask=text_mask(5),
            source_attention_mask=text_mask(7),
        ),
        module="diffusers.models.condition_embedders.condition_embedder_anima",
    ),
]
