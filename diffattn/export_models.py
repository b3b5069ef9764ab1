"""What an export needs to know of a model family: sample inputs, and a forward that a graph can hold."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffattn.kernels import Rotary


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


#: Class -> sample inputs from its config, or None where the config asks for inputs that are not known here.
SAMPLE_INPUTS: dict[str, Callable[..., dict | None]] = {
    "UNet2DConditionModel": _unet,
    "DreamLiteUNetModel": _dreamlite,
    "SanaTransformer2DModel": _sana,
    "Lumina2Transformer2DModel": _lumina2,
}


class Lumina2ForExport(nn.Module):
    """`Lumina2Transformer2DModel.forward` without loops over the batch, Python lists of lengths and complex tables.

    Stock packs each picture's tokens right behind those of its own text. Here text keeps its padding, hidden as
    keys by a mask, and positions say where a token would have been packed: attention knows order by positions alone,
    so image tokens come out the same. The layers have to hold diffattn's processors, which take real tables.

    Args as in the model's own `forward`; as there, padding of the text is on the right.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        for axis, table in enumerate(model.rope_embedder.freqs_cis):
            self.register_buffer(f"cos{axis}", table.real.float(), persistent=False)
            self.register_buffer(f"sin{axis}", table.imag.float(), persistent=False)

    def tables(self, position: tuple[Tensor, Tensor, Tensor]) -> Rotary:
        """Rotary tables of tokens at positions (time, row, column), each (B, N)."""
        cos = [getattr(self, f"cos{axis}")[p] for axis, p in enumerate(position)]
        sin = [getattr(self, f"sin{axis}")[p] for axis, p in enumerate(position)]
        return Rotary(torch.cat(cos, dim=-1), torch.cat(sin, dim=-1))

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        model, p = self.model, self.model.config.patch_size
        B, _, height, width = hidden_states.shape
        rows, columns = height // p, width // p
        temb, text = model.time_caption_embed(hidden_states, timestep, encoder_hidden_states)
        length = text.shape[1]

        # text tokens count up in time; image tokens all come one after the last
        lengths = encoder_attention_mask.sum(dim=1, keepdim=True)  # [B, 1]
        order = torch.arange(length, device=text.device).expand(B, length)
        text_at = (order, torch.zeros_like(order), torch.zeros_like(order))
        row = torch.arange(rows, device=text.device).unsqueeze(1).expand(rows, columns).reshape(1, -1)
        column = torch.arange(columns, device=text.device).expand(rows, columns).reshape(1, -1)
        image_at = (lengths.expand(B, rows * columns), row.expand(B, -1), column.expand(B, -1))
        text_rotary, image_rotary = self.tables(text_at), self.tables(image_at)

        image = hidden_states.reshape(B, -1, rows, p, columns, p).permute(0, 2, 4, 3, 5, 1).reshape(
            B, rows * columns, -1
        )  # fmt: skip
        image = model.x_embedder(image)
        for layer in model.context_refiner:
            text = layer(text, encoder_attention_mask, text_rotary)
        for layer in model.noise_refiner:
            image = layer(image, None, image_rotary, temb)

        joint = torch.cat((text, image), dim=1)
        mask = torch.cat((order < lengths, torch.ones_like(image[..., 0], dtype=torch.bool)), dim=1)
        rotary = Rotary(*(torch.cat((text_rotary[i], image_rotary[i]), dim=1) for i in (0, 1)))
        for layer in model.layers:
            joint = layer(joint, mask, rotary, temb)
        out = model.norm_out(joint, temb)[:, length:]
        out = out.reshape(B, rows, columns, p, p, model.out_channels).permute(0, 5, 1, 3, 2, 4)
        return (out.reshape(B, model.out_channels, height, width),)


#: Class -> a module with the same call whose forward can be traced.
TRACEABLE: dict[str, type[nn.Module]] = {"Lumina2Transformer2DModel": Lumina2ForExport}
