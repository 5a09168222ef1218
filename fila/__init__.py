"""FILA: a fine-grained vision-language model that reads high-resolution pictures in tiles and as a whole.

Importing the package registers its classes with transformers' Auto classes, so that `from_pretrained` finds them. The
Auto classes take classes, not names, so the model's modules are imported here; commands, answers and loading are not.
"""

import fila.startup  # noqa: F401, I001 (first: it serves the command while the others run)

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

# Not from the top level: without torchvision, transformers 5.17 has a stand-in there that only raises.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from fila.configuration import FilaConfig, FilaVisionConfig, preset
from fila.geometry import Geometry, Layout
from fila.image_processing import FilaImageProcessor
from fila.modeling import FilaForConditionalGeneration, FilaModel
from fila.processing import FilaProcessor
from fila.vision import FilaVisionModel

AutoConfig.register("fila", FilaConfig)
AutoConfig.register("fila_vision", FilaVisionConfig)
AutoModel.register(FilaVisionConfig, FilaVisionModel)
AutoModel.register(FilaConfig, FilaModel)
AutoModelForImageTextToText.register(FilaConfig, FilaForConditionalGeneration)
AutoModelForMultimodalLM.register(FilaConfig, FilaForConditionalGeneration)
AutoImageProcessor.register(FilaConfig, slow_image_processor_class=FilaImageProcessor)
AutoProcessor.register(FilaConfig, FilaProcessor)

__all__ = [
    "FilaConfig",
    "FilaForConditionalGeneration",
    "FilaImageProcessor",
    "FilaModel",
    "FilaProcessor",
    "FilaVisionConfig",
    "FilaVisionModel",
    "Geometry",
    "Layout",
    "preset",
]
