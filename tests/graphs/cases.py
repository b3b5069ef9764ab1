"""Families of models as graphs: one or more for each file of processors, and how their inputs change size."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import diffattn
from diffattn.export_inputs import resized
from diffattn.layers import find_layers
from diffattn.traceable import traceable
from tests.models import BY_NAME
from tests.models.base import Rand, TinyModel
from tests.models.stock import is_linear

#: What an axis grows by from one resolution to the next: every model here takes multiples of 4.
STEP = 4


@dataclass(frozen=True, eq=False)
class Family:
    """A tiny model and the axes along which its inputs may change.

    Attributes:
        name: of the tiny model.
        axes: {input: {dimension: axis}}; `batch`, `text`, and the resolution: `height`, `width`, `tokens`.
        changes: of its config: a graph of one layer says as much as one of two.
        sized: inputs that are no tensors, or that follow from several axes, from the sizes of all.
    """

    name: str
    axes: dict[str, dict[int, str]]
    changes: dict[str, Any] = field(default_factory=dict)
    sized: Callable[[dict[str, int]], dict[str, Any]] | None = None

    def model(self) -> nn.Module:
        tiny = BY_NAME[self.name]
        return TinyModel(tiny.cls, tiny.config | self.changes, module=tiny.module).model()

    def patched(self) -> nn.Module:
        return patch_all(self.model())

    def traceable(self, model: nn.Module) -> nn.Module:
        """The model with a forward that a graph can hold, where it has diffattn's processors."""
        return traceable(model) if diffattn.status(model).installed else model

    def sizes(self, resolution: int = 0, batch: int = 2) -> dict[str, int]:
        """Axis -> size, of the first, second, ... resolution; the first is that of the tiny model."""
        sizes = {axis: t.shape[d] for t, axes in self._tensors() for d, axis in axes.items()}
        grows = {axis: size + STEP * resolution for axis, size in sizes.items() if axis not in ("batch", "text")}
        return sizes | grows | {"batch": batch}

    def inputs(self, resolution: int = 0, batch: int = 2) -> dict[str, Any]:
        """Keyword arguments of the model's call, `return_dict=False` where it has that."""
        given, sizes = self._given(), self.sizes(resolution, batch)
        # `resized` finds inputs by the path to them
        axes = {(name,): named for name, named in self.axes.items()}
        fresh = resized({key: given[key[0]] for key in axes}, axes, sizes, seed=1)
        given |= {key[0]: t for key, t in fresh.items()}
        given |= self.sized(sizes) if self.sized else {}
        return given | (dict(return_dict=False) if takes_return_dict(self) else {})

    def free_axes(self) -> dict[str, dict[int, str]]:
        """The axes that an export leaves free: of Python numbers that follow from a size, the batch alone."""
        if self.sized is None:
            return self.axes
        return {name: {d: axis for d, axis in named.items() if axis == "batch"} for name, named in self.axes.items()}

    def other_inputs(self) -> list[dict[str, Any]]:
        """Inputs of two sizes that an export has not traced."""
        return [self.inputs(resolution=0 if self.sized else r, batch=batch) for r, batch in ((1, 3), (2, 4))]

    def _given(self) -> dict[str, Any]:
        return BY_NAME[self.name].inputs(Rand(torch.Generator().manual_seed(1)))

    def _tensors(self):
        given = self._given()
        return [(given[name], axes) for name, axes in self.axes.items()]

    def __str__(self) -> str:
        return self.name


@functools.cache
def takes_return_dict(family: Family) -> bool:
    return "return_dict" in inspect.signature(type(family.model()).forward).parameters


def patch_all(model: nn.Module) -> nn.Module:
    """The exact core where stock has a formula of its own, diffattn's softmax in every layer else."""
    diffattn.patch(model)
    rest = [x.name for x in find_layers(model) if x.family and not x.patched and not is_linear(x)]
    if rest:
        diffattn.patch(model, diffattn.SoftmaxAttention(), layers=rest)
    return model


def stable_audio_rotary(sizes):
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    length = sizes["tokens"] + 1  # the global state is a token too
    return dict(rotary_embedding=get_1d_rotary_pos_embed(8, length, use_real=True, repeat_interleave_real=False))


def krea_positions(sizes):
    image = torch.arange(sizes["tokens"])
    at = torch.stack((torch.zeros_like(image), image // 4, image % 4), dim=-1)
    return dict(position_ids=torch.cat((torch.zeros(sizes["text"], 3, dtype=torch.long), at)))


BATCH = {0: "batch"}
PICTURE = {0: "batch", 2: "height", 3: "width"}
VIDEO = {0: "batch", 3: "height", 4: "width"}
TOKENS = {0: "batch", 1: "tokens"}
TEXT = {0: "batch", 1: "text"}
ON_TEXT = dict(timestep=BATCH, encoder_hidden_states=TEXT)
MASKED = ON_TEXT | dict(encoder_attention_mask=TEXT)
ONE = dict(num_layers=1)
DREAMLITE = dict(
    block_out_channels=(16, 32),
    down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
    up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
)

FAMILIES = [
    # plain.py
    Family("UNet2DConditionModel", dict(sample=PICTURE) | MASKED, dict(mid_block_type=None)),
    Family("DreamLiteUNetModel", dict(sample=PICTURE) | MASKED, DREAMLITE),
    Family("PixArtTransformer2DModel", dict(hidden_states=PICTURE) | MASKED, ONE),
    # joint.py, joint_renamed.py, joint_shared.py
    Family(
        "FluxTransformer2DModel",
        dict(hidden_states=TOKENS, img_ids={0: "tokens"}, txt_ids={0: "text"}, pooled_projections=BATCH) | ON_TEXT,
    ),
    Family("SD3Transformer2DModel", dict(hidden_states=PICTURE, pooled_projections=BATCH) | ON_TEXT, ONE),
    Family("MochiTransformer3DModel", dict(hidden_states=VIDEO) | MASKED, ONE),
    Family(
        "CogView4Transformer2DModel",
        dict(hidden_states=PICTURE, original_size=BATCH, target_size=BATCH, crop_coords=BATCH) | ON_TEXT,
        ONE,
    ),
    # single_stream.py, image_queries.py
    Family(
        "Krea2Transformer2DModel",
        dict(hidden_states=TOKENS) | MASKED,
        ONE,
        krea_positions,
    ),
    Family("PRXTransformer2DModel", dict(hidden_states=PICTURE, attention_mask=TEXT) | ON_TEXT, dict(depth=1)),
    # wan.py, ltx.py, video_cross.py
    Family("WanTransformer3DModel", dict(hidden_states=VIDEO) | ON_TEXT, ONE),
    Family(
        "LTXVideoTransformer3DModel",
        dict(hidden_states=TOKENS) | MASKED,
        ONE,
        lambda sizes: dict(num_frames=sizes["tokens"] // 4, height=2, width=2),
    ),
    Family("CosmosTransformer3DModel", dict(hidden_states=VIDEO, attention_mask=TEXT) | ON_TEXT, ONE),
    # sana.py, dcae.py, lumina.py
    Family("SanaTransformer2DModel", dict(hidden_states=PICTURE) | MASKED, ONE),
    Family("SanaVideoTransformer3DModel", dict(hidden_states=VIDEO) | MASKED, ONE),
    Family("AutoencoderDC", dict(sample=PICTURE)),
    Family("Lumina2Transformer2DModel", dict(hidden_states=PICTURE) | MASKED, ONE),
    Family("LuminaNextDiT2DModel", dict(hidden_states=PICTURE, encoder_mask=TEXT) | ON_TEXT, ONE),
    # audio.py, stable_audio.py, vae.py
    Family(
        "AceStepTransformer1DModel",
        dict(hidden_states=TOKENS, context_latents=TOKENS, timestep_r=BATCH) | ON_TEXT,
        dict(num_hidden_layers=1),
    ),
    Family(
        "StableAudioDiTModel",
        dict(hidden_states={0: "batch", 2: "tokens"}, global_hidden_states=BATCH) | MASKED,
        ONE,
        stable_audio_rotary,
    ),
    Family(
        "RFD4ProteinaTransformer",
        dict(
            bb_ca=TOKENS, local_latents=TOKENS, bb_ca_time=BATCH, local_latents_time=BATCH, padding_mask=TOKENS,
        ),
        dict(nlayers=1),
        lambda sizes: dict(
            conditioning=dict(
                is_in_context_conditioning=torch.zeros(sizes["batch"], sizes["tokens"]),
                supports_local_latent=torch.ones(sizes["batch"], sizes["tokens"]),
            )
        ),
    ),
]  # fmt: skip
FAMILY = {str(family): family for family in FAMILIES}


def exported(family: Family, call: nn.Module) -> torch.export.ExportedProgram:
    """The program of a model with everything dynamic that `axes` names, as the docs tell users to make it."""
    inputs = family.inputs()
    # of one size in all inputs; 63, since convolutions on a CPU are another program from there on
    one = {"batch": torch.export.Dim("batch", max=63), "text": torch.export.Dim("text", max=512)}
    free = torch.export.Dim.DYNAMIC

    axes = family.free_axes()

    def shapes(name, value):
        if isinstance(value, torch.Tensor):
            return {d: one.get(axis, free) for d, axis in axes.get(name, {}).items()} or None
        if isinstance(value, (tuple, list)):
            return type(value)(shapes(None, item) for item in value)
        if isinstance(value, dict):  # of tensors with a row for each sample
            return {key: {0: one["batch"]} if isinstance(item, torch.Tensor) else None for key, item in value.items()}
        return None

    dynamic = {name: shapes(name, value) for name, value in inputs.items()}
    with torch.no_grad():
        return torch.export.export(call, (), inputs, dynamic_shapes=dynamic)
