"""Inputs for one forward of a diffusers model on the meta device, from its config and the names that it asks for."""

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffattn.layers import is_autoencoder

# Where neither the user nor the config names a size.
PICTURE, VIDEO = (1024, 1024), (480, 832, 81)  # height, width, frames
SOUND = 1024  # latents

#: Class name prefix -> how much smaller latents are than the picture, along height and width and along frames: the
#: autoencoder that such models are published with. Every other: 8, and 4.
COMPRESSION = {
    "SanaTransformer": (32, 1),
    "SanaControlNet": (32, 1),
    "LTX": (32, 8),
    "HunyuanVideo15": (16, 4),
    "HunyuanImage": (32, 1),
    "UNet2DModel": (1, 1),  # unconditional models draw pixels
} | dict.fromkeys(("UNet3D", "UNetMotion", "UNetSpatioTemporal", "I2VGenXL", "SparseControlNet"), (8, 1))

#: Class name prefix -> frames of a video, where its config does not tell. Every other: 81.
FRAMES = {"UNet": 16, "I2VGenXL": 16, "SparseControlNet": 16}

#: Class name prefixes of models whose video has frames before channels.
FRAMES_FIRST = ("CogVideoX", "ConsisID", "AnyFlowTransformer", "UNetSpatioTemporal")

#: Class name prefix -> tokens of text that its pipeline pads to. Every other: 512; UNets: CLIP's 77.
TEXT_TOKENS = {
    "Sana": 300,
    "Lumina": 256,
    "CogVideoX": 226,
    "ConsisID": 226,
    "PixArt": 300,
    "LTX": 128,
    "UNetSpatioTemporal": 1,  # of the picture
    "UNet": 77,
    "I2VGenXL": 77,
    "ControlNetModel": 77,
    "ControlNetUnion": 77,
    "SparseControlNet": 77,
    "SD3": 333,
}

#: The config entries that hold the width of text embeddings: the first that is there and is a number.
TEXT_WIDTHS = (
    "joint_attention_dim",
    "text_embed_dim",
    "caption_channels",
    "text_dim",
    "cap_feat_dim",
    "context_in_dim",
    "cond_token_dim",
    "cross_attention_input_dim",
    "encoder_hid_dim",
    "cross_attention_dim",
)


@dataclass(frozen=True)
class Size:
    """Height and width in pixels, frames of a video."""

    height: int
    width: int
    frames: int

    def __str__(self) -> str:
        return (f"{self.frames} frames of " if self.frames > 1 else "") + f"{self.width} x {self.height}"


class Inputs:
    """What a model is called with: batch 1, bfloat16 on the meta device.

    Args:
        height, width, frames: pixels and frames; None takes the config's `sample_size`, else the defaults above.
        compression: pixels along an edge for a latent, if an autoencoder beside the model tells it.

    Raises: ValueError for a height or width that latents and their patches do not divide.
    """

    def __init__(self, model: nn.Module, height=None, width=None, frames=None, compression: int | None = None):
        self.config: dict[str, Any] = dict(model.config)
        self.name = type(model).__name__
        self.names = inspect.signature(type(model).forward).parameters
        self.autoencoder = is_autoencoder(model)
        video = is_video(model)
        per_pixel, per_frame = by_prefix(COMPRESSION, self.name, (8, 4))
        if self.autoencoder:
            per_pixel, per_frame = 1, 1
        elif compression is not None:
            per_pixel = compression
        packed = "img_ids" in self.names or "img_shapes" in self.names or self.name.startswith("Krea2")
        patch = self.config.get("patch_size")
        patch = patch[-1] if isinstance(patch, (list, tuple)) else patch if isinstance(patch, int) else 1
        step = per_pixel * (2 if packed else patch)
        default = [pixels // step * step for pixels in self._default(per_pixel, video)]
        height, width = height or default[0], width or default[1]
        if video and frames is None:
            told = self.config.get("sample_frames") or self.config.get("num_frames")
            frames = told or by_prefix(FRAMES, self.name, VIDEO[2])
        self.size = Size(height, width, frames if video else 1)
        for name, pixels in (("height", height), ("width", width)):
            if pixels % step:
                raise ValueError(f"{name}: got {pixels}, expected a multiple of {step}: {self.name} cuts it so")
        grid = (height // per_pixel, width // per_pixel)
        if video:
            grid = ((self.size.frames - 1) // per_frame + 1, *grid)
        self.grid = tuple(n // 2 for n in grid[-2:]) if packed else grid  # packed: 2 x 2 latents a token
        channels = self.config.get("in_channels") or self.config.get("latent_channels") or 4
        if packed or self.name.startswith("LTX"):
            self.latents = (1, math.prod(self.grid), channels)
        elif self.name.startswith("StableAudio"):
            channels = self.config.get("io_channels") or channels
            self.latents = (1, channels, self.config.get("sample_size") or SOUND)
        elif self.name.startswith(FRAMES_FIRST):
            self.latents = (1, grid[0], channels, *grid[1:])
        else:
            self.latents = (1, channels, *grid)
        self.text = (1, by_prefix(TEXT_TOKENS, self.name, 512), self._text_width())

    def variants(self) -> Iterator[dict[str, Any]]:
        """Arguments of the forward. Models that read lengths off a mask need it real, others on their device."""
        for mask_device in ("cpu", "meta"):
            arguments = {}
            for name, parameter in self.names.items():
                value = self._argument(name, parameter.default is parameter.empty, mask_device)
                if value is not None:
                    arguments[name] = value
            yield arguments

    def __str__(self) -> str:
        if self.autoencoder:
            return f"{self.size} pixels, encoded and decoded"
        size = "" if self.name.startswith("StableAudio") else f"{self.size} pixels, "
        reads = self.text[1] > 1 and any("encoder_hidden" in n or "cap" in n for n in self.names)
        text = f", {self.text[1]} text tokens" if reads else ""
        return f"{size}latents {' x '.join(map(str, self.latents[1:]))}{text}"

    def _argument(self, name: str, required: bool, mask_device: str) -> Any:
        config = self.config
        if self.name.startswith("ZImage") and name in ("x", "cap_feats"):  # lists: of pictures, of texts
            return [meta(self.latents[1], 1, *self.grid) if name == "x" else meta(*self.text[1:])]
        if name in ("hidden_states", "sample", "x"):
            return meta(*self.latents)
        if name == "encoder_hidden_states" and "num_text_layers" in config:  # Krea 2: of several layers of its encoder
            return meta(1, self.text[1], config["num_text_layers"], config["text_hidden_dim"])
        if name == "encoder_hidden_states":
            repeated = self.name.startswith(("UNetMotion", "SparseControlNet"))  # by the pipeline, for each frame
            return meta(self.grid[0] if repeated else 1, *self.text[1:])
        if name in ("timestep", "t", "timestep_r", "r_timestep"):
            each = (self.grid[0],) if self.name.startswith("AnyFlowTransformer") else ()  # of frames
            return meta(1, *each) if required or name in ("timestep", "t") else None
        if name in ("pooled_projections", "pooled_text_emb"):
            return meta(1, config.get("pooled_projection_dim") or 768)
        if name in ("encoder_attention_mask", "encoder_hidden_states_mask", "encoder_mask"):
            required = required or self.name == "Kandinsky3UNet"
            return torch.ones(self.text[:2], dtype=torch.long, device=mask_device) if required else None
        if name in ("img_ids", "txt_ids"):
            tokens = self.latents[1] if name == "img_ids" else self.text[1]
            return meta(tokens, len(config.get("axes_dims_rope", (0, 0, 0))))
        if name == "position_ids":
            return meta(self.text[1] + self.latents[1], len(config.get("axes_dims_rope", (0, 0, 0))))
        if name == "img_shapes":
            return [(1, *self.grid)]
        if name == "guidance":
            return meta(1) if config.get("guidance_embeds") else None
        if name == "class_labels" and config.get("num_embeds_ada_norm"):
            return torch.zeros(1, dtype=torch.long, device="meta")
        if name in ("num_frames", "height", "width") and len(self.grid) == 3:
            return self.grid[("num_frames", "height", "width").index(name)]
        if name in ("original_size", "target_size"):
            return meta(1, 2)
        if name == "crop_coords":
            return meta(1, 2)
        if name == "controlnet_cond":
            return self._condition()
        if name == "conditioning_mask":
            return meta(1, 1, *self.grid)
        if name == "control_hidden_states" and "vace_in_channels" in config:
            return meta(1, config["vace_in_channels"], *self.grid)
        if name == "global_hidden_states":
            return meta(1, 1, config.get("global_states_input_dim") or config["global_cond_dim"])
        if name == "added_time_ids":
            return meta(1, config["projection_class_embeddings_input_dim"] // config["addition_time_embed_dim"])
        if name == "fps":
            return meta(1)
        if name == "image_latents":
            return meta(*self.latents)
        if name == "image_embeddings":
            return meta(1, self.text[2])
        if name == "added_cond_kwargs":
            return self._added()
        return None

    def _condition(self) -> Tensor:
        """What a ControlNet follows: a picture, or its latents with channels of more."""
        config = self.config
        if "hidden_states" in self.names:
            extra = config.get("extra_conditioning_channels") or config.get("extra_condition_channels") or 0
            at = 2 if len(self.latents) == 3 else 1
            return meta(*(n + extra * (i == at) for i, n in enumerate(self.latents)))
        if len(self.grid) == 3:
            return meta(1, config.get("conditioning_channels", 4), *self.grid)
        return meta(1, config.get("conditioning_channels", 3), self.size.height, self.size.width)

    def _added(self) -> dict[str, Any] | None:
        """SDXL's pooled text and sizes; PixArt's sizes."""
        if self.config.get("addition_embed_type") == "text_time":
            width = self.config["projection_class_embeddings_input_dim"] - 6 * self.config["addition_time_embed_dim"]
            return {"text_embeds": meta(1, width), "time_ids": meta(1, 6)}
        if self.name.startswith("PixArt"):
            return {"resolution": meta(1, 2), "aspect_ratio": meta(1, 1)}
        return None

    def _default(self, per_pixel: int, video: bool) -> tuple[int, int]:
        """Height and width in pixels. An autoencoder's `sample_size` is where its tiling starts: of no use here."""
        latents = [self.config.get(key) for key in ("sample_height", "sample_width")]
        if latents == [None, None] and not video and not self.autoencoder:
            latents = [self.config.get("sample_size")] * 2
        if all(isinstance(n, int) for n in latents):
            return latents[0] * per_pixel, latents[1] * per_pixel
        return VIDEO[:2] if video else PICTURE

    def _text_width(self) -> int:
        for key in TEXT_WIDTHS:
            value = self.config.get(key)
            value = value[0] if isinstance(value, (list, tuple)) else value
            if isinstance(value, int):
                return value
        return 1024


def is_video(model: nn.Module) -> bool:
    name = type(model).__name__
    if name.startswith("StableAudio"):
        return False
    told = ("3D", "Video", "UNetMotion", "SpatioTemporal", "I2VGenXL", "SparseControlNet")
    return any(part in name for part in told) or name.startswith(("AutoencoderKLWan", "LTX"))


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def by_prefix(table: dict[str, Any], name: str, default: Any) -> Any:
    return next((value for prefix, value in table.items() if name.startswith(prefix)), default)
