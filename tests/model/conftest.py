"""Fixtures: a small FILA with random weights and open gates, in memory and on disk, made once per session."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from fila import FilaForConditionalGeneration, FilaImageProcessor, FilaProcessor, preset
from fila.checkpoints.check import WEIGHTS
from fila.checkpoints.load import load
from recipes.nano.tokenizer import build_character_tokenizer
from tests.model.tiny_checkpoint import save_checkpoint


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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load(checkpoint)


@pytest.fixture
def copy(checkpoint, tmp_path) -> Path:
    """A checkpoint to damage; its weights are shared until a test replaces them."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in checkpoint.iterdir():
        if file.name == WEIGHTS:
            os.link(file, folder / WEIGHTS)
        else:
            shutil.copy(file, folder)
    return folder
