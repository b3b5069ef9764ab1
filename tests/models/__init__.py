"""Tiny models of every diffusers class that has attention."""

from tests.models.base import TinyModel
from tests.models.controlnets import CONTROLNETS
from tests.models.transformers_audio import TRANSFORMERS_AUDIO
from tests.models.transformers_image import TRANSFORMERS_IMAGE
from tests.models.transformers_video import TRANSFORMERS_VIDEO
from tests.models.unets import UNETS
from tests.models.vaes import VAES

MODELS: list[TinyModel] = TRANSFORMERS_IMAGE + TRANSFORMERS_VIDEO + TRANSFORMERS_AUDIO + UNETS + CONTROLNETS + VAES
BY_NAME = {str(model): model for model in MODELS}
