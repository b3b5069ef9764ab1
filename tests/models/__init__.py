"""Tiny models of every diffusers class that has attention."""

from tests.models.audio import AUDIO
from tests.models.base import TinyModel
from tests.models.controlnets import CONTROLNETS
from tests.models.image_joint import IMAGE_JOINT
from tests.models.image_stream import IMAGE_STREAM
from tests.models.unets import UNETS
from tests.models.vaes import VAES
from tests.models.video_joint import VIDEO_JOINT
from tests.models.video_stream import VIDEO_STREAM
from tests.models.video_wan import VIDEO_WAN

#: Title -> models, as in docs/models.md.
GROUPS: dict[str, list[TinyModel]] = {
    "Image transformers": IMAGE_JOINT + IMAGE_STREAM,
    "Video transformers": VIDEO_WAN + VIDEO_JOINT + VIDEO_STREAM,
    "Audio and other transformers": AUDIO,
    "UNets": UNETS,
    "ControlNets": CONTROLNETS,
    "Autoencoders": VAES,
}
MODELS = [model for models in GROUPS.values() for model in models]
BY_NAME = {str(model): model for model in MODELS}
