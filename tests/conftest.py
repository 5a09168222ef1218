"""Gives every test a fixed seed, no network, and no more threads than the machine has cores."""

import importlib.util
import os
from pathlib import Path

# Set before transformers is imported: a test that needs a download must fail, not wait.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

if torch.version.cuda is None and importlib.util.find_spec("torchvision"):
    # timm wants torchvision, and the registry's looks for operators that only its CUDA library would bring.
    _torchvision = torch.library.Library("torchvision", "FRAGMENT")
    for _operator in ("nms", "qnms"):
        _torchvision.define(f"{_operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

settings.register_profile("project", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("project")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root folder."""
    return Path(__file__).resolve().parent.parent
