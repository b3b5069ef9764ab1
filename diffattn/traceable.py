"""Forwards that a graph can hold, for models whose own forward loops over the batch, computes in complex numbers or
asks for its size."""

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

from diffattn.kernels import Rotary


def traceable(model: nn.Module) -> nn.Module:
    """A module with the call and the weights of a patched model that is one graph: mostly the model itself.

        torch.compile(traceable(pipe.transformer), fullgraph=True)
        torch.export.export(traceable(pipe.transformer), (), inputs, dynamic_shapes=...)

    The model is left as it is; a later `patch` or `unpatch` acts on both. Hooks on the model itself do not run.

    Raises: ValueError for a model of a class in `TRACEABLE` where an attention layer has no processor of diffattn's.
    """
    return TRACEABLE.get(type(model).__name__, _with_parts)(model)


def _with_parts(model: nn.Module) -> nn.Module:
    """The model itself, or where it has parts that a graph cannot hold a copy that shares everything but these."""
    from diffattn.traceable_parts import replacements

    parts = replacements(model, None if _stock_layers(model) else functools.partial(_refuse_stock, model))
    if not parts:
        return model
    model = copy.copy(model)
    model._modules = dict(model._modules)
    for name, part in parts.items():
        setattr(model, name, part)
    return model


class Traceable(nn.Module):
    """What such forwards share. Their layers have to hold diffattn's processors, which take real rotary tables."""

    def __init__(self, model: nn.Module):
        super().__init__()
        _refuse_stock(model)
        self.model = model
        self.train(model.training)

    def __call__(self, *args, **kwargs):
        _refuse_stock(self.model)  # unpatched since
        return super().__call__(*args, **kwargs)

    def result(self, sample: Tensor, return_dict: bool):
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


class Lumina2(Traceable):
    """`Lumina2Transformer2DModel.forward` without loops over the batch, Python lists of lengths and complex tables.

    Stock packs each picture's tokens right behind those of its own text. Here text keeps its padding, hidden as
    keys by a mask, and positions say where a token would have been packed: attention knows order by positions alone,
    so image tokens come out the same. Padding of the text is on the right, as stock has it.
    """

    def __init__(self, model: nn.Module):
        super().__init__(model)
        like = model.x_embedder.weight
        for axis, table in enumerate(model.rope_embedder.freqs_cis):
            self.register_buffer(f"cos{axis}", table.real.float().to(like.device), persistent=False)
            self.register_buffer(f"sin{axis}", table.imag.float().to(like.device), persistent=False)

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
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ):
        _refuse_kwargs("attention_kwargs", attention_kwargs)
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
        return self.result(out.reshape(B, model.out_channels, height, width), return_dict)


class LuminaNext(Traceable):
    """`LuminaNextDiT2DModel.forward` with a table of real numbers.

    `image_rotary_emb` may be complex (rows, columns, D/2), as stock has it, or `torch.view_as_real` of that.
    """

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_mask: Tensor,
        image_rotary_emb: Tensor,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ):
        model, p = self.model, self.model.patch_size
        B, _, height, width = hidden_states.shape
        rows, columns = height // p, width // p
        table = image_rotary_emb
        table = torch.view_as_real(table) if table.is_complex() else table
        table = table[:rows, :columns].flatten(0, 1).to(hidden_states.device)
        rotary = Rotary(table[..., 0], table[..., 1])

        x = hidden_states.reshape(B, -1, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5).reshape(B, rows * columns, -1)
        x = model.patch_embedder.proj(x)
        temb = model.time_caption_embed(timestep, encoder_hidden_states, encoder_mask)
        text_mask = encoder_mask.bool()
        for layer in model.layers:
            # every image token counts: stock's mask of them is all ones
            x = layer(x, None, rotary, encoder_hidden_states, text_mask, temb, cross_attention_kwargs or {})
        x = model.norm_out(x, temb)
        x = x.reshape(B, rows, columns, p, p, model.out_channels).permute(0, 5, 1, 3, 2, 4)
        return self.result(x.reshape(B, model.out_channels, height, width), return_dict)


def _stock_layers(model: nn.Module) -> list[str]:
    """Attention layers without a processor of diffattn's."""
    from diffattn.processors import CoreAttnProcessor

    return [
        name
        for name, module in model.named_modules()
        if callable(getattr(module, "processor", None)) and not isinstance(module.processor, CoreAttnProcessor)
    ]


def _refuse_stock(model: nn.Module) -> None:
    if stock := _stock_layers(model):
        raise ValueError(
            f"model: {type(model).__name__} as one graph needs diffattn's processors in every attention layer, and "
            f"{', '.join(stock[:3])}{', ...' if len(stock) > 3 else ''} have none: call diffattn.patch(model) first"
        )


def _refuse_kwargs(name: str, given: dict[str, Any] | None) -> None:
    if given:
        raise ValueError(
            f"{name}: got {', '.join(given)}, expected none: this one-graph forward has no counterpart for them"
        )


#: Class -> a module with the same call whose forward can be traced.
TRACEABLE: dict[str, type[Traceable]] = {"Lumina2Transformer2DModel": Lumina2, "LuminaNextDiT2DModel": LuminaNext}
