"""Sample inputs of model families, made of their configs."""

from collections.abc import Callable

import torch
from torch import Tensor


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _text_mask(length: int = 7) -> Tensor:
    """Two prompts, the second three tokens shorter."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, -3:] = 0
    return mask


def _times() -> Tensor:
    # float: schedulers in sigmas have times between the integers
    return torch.tensor([3.0, 500.0])


def _unet(config) -> dict | None:
    others = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "encoder_hid_dim")
    if any(config.get(name) is not None for name in others):
        return None
    if config.addition_embed_type not in (None, "text_time") or not isinstance(config.cross_attention_dim, int):
        return None
    step = 2 ** (len(config.block_out_channels) - 1)  # each block but the last halves height and width
    inputs = dict(
        sample=_normal(2, config.in_channels, 4 * step, 6 * step),
        timestep=_times(),
        encoder_hidden_states=_normal(2, 7, config.cross_attention_dim),
    )
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = dict(text_embeds=_normal(2, pooled), time_ids=_normal(2, 6).abs() * 100)
    return inputs


def _dreamlite(config) -> dict | None:
    inputs = _unet(config)
    return None if inputs is None else inputs | dict(encoder_attention_mask=_text_mask())


def _sana(config) -> dict | None:
    if config.get("guidance_embeds"):
        return None
    return dict(
        hidden_states=_normal(2, config.in_channels, 4 * config.patch_size, 6 * config.patch_size),
        encoder_hidden_states=_normal(2, 7, config.caption_channels),
        timestep=_times(),
        encoder_attention_mask=_text_mask(),
    )


def _lumina2(config) -> dict:
    return dict(
        hidden_states=_normal(2, config.in_channels, 4 * config.patch_size, 6 * config.patch_size),
        timestep=torch.tensor([0.3, 0.9]),
        encoder_hidden_states=_normal(2, 7, config.cap_feat_dim),
        encoder_attention_mask=_text_mask(),
    )


def _lumina_next(config) -> dict:
    head_dim = config.hidden_size // config.num_attention_heads
    angles = _normal(384, 384, head_dim // 2)  # rows and columns of tokens, as many as LuminaPipeline makes
    return dict(
        hidden_states=_normal(2, config.in_channels, 4 * config.patch_size, 6 * config.patch_size),
        timestep=torch.tensor([0.3, 0.9]),
        encoder_hidden_states=_normal(2, 7, config.cross_attention_dim),
        encoder_mask=_text_mask(),
        image_rotary_emb=torch.polar(torch.ones_like(angles), angles),
        # as LuminaPipeline passes it
        cross_attention_kwargs={"base_sequence_length": (config.sample_size // 2) ** 2},
    )


def _sana_video(config) -> dict | None:
    if config.get("guidance_embeds"):
        return None
    frames, height, width = config.patch_size
    return dict(
        hidden_states=_normal(2, config.in_channels, 3 * frames, 4 * height, 6 * width),
        encoder_hidden_states=_normal(2, 7, config.caption_channels),
        timestep=_times(),
        encoder_attention_mask=_text_mask(),
    )


def _stable_audio(config) -> dict:
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    length, width = 12, config.attention_head_dim // 2
    return dict(
        hidden_states=_normal(2, config.in_channels, length),
        timestep=_times(),
        encoder_hidden_states=_normal(2, 7, config.cross_attention_input_dim),
        global_hidden_states=_normal(2, 1, config.global_states_input_dim),
        rotary_embedding=get_1d_rotary_pos_embed(width, length + 1, use_real=True, repeat_interleave_real=False),
        encoder_attention_mask=_text_mask().bool(),
    )


#: The rotary tables have a row more than the latents: the global state comes first.
STABLE_AUDIO_AXES = {
    "hidden_states": {0: "batch", 2: "length"},
    "rotary_embedding_0": {0: "length + 1"},
    "rotary_embedding_1": {0: "length + 1"},
}


def _dcae(config) -> dict:
    step = 2 ** (len(config.encoder_block_out_channels) - 1)
    return dict(sample=_normal(2, config.in_channels, 4 * step, 6 * step))


#: Class -> sample inputs from its config, or None where the config asks for inputs that are not known here.
SAMPLE_INPUTS: dict[str, Callable[..., dict | None]] = {
    "UNet2DConditionModel": _unet,
    "DreamLiteUNetModel": _dreamlite,
    "SanaTransformer2DModel": _sana,
    "Lumina2Transformer2DModel": _lumina2,
    "LuminaNextDiT2DModel": _lumina_next,
    "SanaVideoTransformer3DModel": _sana_video,
    "StableAudioDiTModel": _stable_audio,
    "AutoencoderDC": _dcae,
}
