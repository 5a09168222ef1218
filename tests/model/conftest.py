"""A small FILA with random weights and open gates, as the model tests need it; made once, never trained."""

import pytest
import torch

from fila import FilaForConditionalGeneration, FilaImageProcessor, FilaProcessor, preset
from fila.tokenization import build_character_tokenizer


def open_gates(model: FilaForConditionalGeneration, alpha: float = 0.5) -> None:
    """Sets every gate, so that the ConvNeXt has its say."""
    with torch.no_grad():
        for fusion in model.model.vision_tower.fusion:
            fusion.alpha.fill_(alpha)


@pytest.fixture(scope="session")
def nano() -> FilaForConditionalGeneration:
    torch.manual_seed(0)
    model = FilaForConditionalGeneration(preset("fila-nano")).eval()
    open_gates(model)
    return model


@pytest.fixture(scope="session")
def nano_processor() -> FilaProcessor:
    geometry = preset("fila-nano").vision_config.geometry()
    return FilaProcessor(FilaImageProcessor.from_geometry(geometry), build_character_tokenizer())
