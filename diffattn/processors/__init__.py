"""One processor per calling convention of diffusers, and the table that finds it."""

from diffattn.processors.base import CoreAttnProcessor
from diffattn.processors.by_hand import LinearAttnProcessor, MQAAttnProcessor
from diffattn.processors.dcae import DCAEAttnProcessor
from diffattn.processors.lumina import Lumina2AttnProcessor, LuminaNextAttnProcessor
from diffattn.processors.plain import AddedKVAttnProcessor, PlainAttnProcessor
from diffattn.processors.sana import SanaAttnProcessor, SanaCrossAttnProcessor, SanaVideoAttnProcessor
from diffattn.processors.stable_audio import StableAudioAttnProcessor

PROCESSORS: tuple[type[CoreAttnProcessor], ...] = (
    PlainAttnProcessor,
    AddedKVAttnProcessor,
    SanaAttnProcessor,
    SanaVideoAttnProcessor,
    SanaCrossAttnProcessor,
    DCAEAttnProcessor,
    Lumina2AttnProcessor,
    LuminaNextAttnProcessor,
    StableAudioAttnProcessor,
)

#: Stock processor class name -> ours. By name, so that no model of diffusers is imported for it.
BY_STOCK_NAME = {stock: ours for ours in PROCESSORS for stock in ours.replaces}

__all__ = [
    "BY_STOCK_NAME",
    "PROCESSORS",
    "AddedKVAttnProcessor",
    "CoreAttnProcessor",
    "DCAEAttnProcessor",
    "LinearAttnProcessor",
    "Lumina2AttnProcessor",
    "LuminaNextAttnProcessor",
    "MQAAttnProcessor",
    "PlainAttnProcessor",
    "SanaAttnProcessor",
    "SanaCrossAttnProcessor",
    "SanaVideoAttnProcessor",
    "StableAudioAttnProcessor",
]
