"""One processor per calling convention of diffusers, and the table that finds it."""

from diffattn.processors import (
    audio,
    dcae,
    image_queries,
    joint,
    joint_renamed,
    joint_shared,
    ltx,
    lumina,
    plain,
    sana,
    sana_wm,
    single_stream,
    stable_audio,
    vae,
    video_cross,
    wan,
)
from diffattn.processors.base import CoreAttnProcessor
from diffattn.processors.by_hand import LinearAttnProcessor, MQAAttnProcessor
from diffattn.processors.plain import PlainAttnProcessor

_MODULES = (
    plain,
    joint,
    joint_renamed,
    joint_shared,
    single_stream,
    image_queries,
    wan,
    ltx,
    video_cross,
    sana,
    sana_wm,
    dcae,
    lumina,
    audio,
    stable_audio,
    vae,
)

#: Every processor that stands in for one of diffusers.
PROCESSORS: tuple[type[CoreAttnProcessor], ...] = tuple(
    cls
    for module in _MODULES
    for cls in vars(module).values()
    if isinstance(cls, type)
    and issubclass(cls, CoreAttnProcessor)
    and cls.__module__ == module.__name__
    and cls.replaces
)

#: Stock processor class name -> ours. By name, so that no model of diffusers is imported for it.
BY_STOCK_NAME = {stock: ours for ours in PROCESSORS for stock in ours.replaces}

#: Those of them that are modules without weights, which diffusers calls where other models call a processor.
STOCK_MODULES = {stock for stock, ours in BY_STOCK_NAME.items() if ours.is_module}

__all__ = [
    "BY_STOCK_NAME",
    "PROCESSORS",
    "STOCK_MODULES",
    "CoreAttnProcessor",
    "LinearAttnProcessor",
    "MQAAttnProcessor",
    "PlainAttnProcessor",
]
