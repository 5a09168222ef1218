"""Upstream's own test mixins, imported from the source distribution of the pinned transformers.

The distribution carries the top-level files of upstream's `tests/` and none of its folders. What those files import
from the folders is stubbed here: `generation/` and `exporters/` by empty mixins (`tests/model/test_generation.py` and
`tests/model/test_export.py` hold these contracts), configuration values by none, and pictures on the hub by one drawn
here.
`tools/upstream.py` unpacks the files and names their folder in `FILA_UPSTREAM`.
"""

import importlib
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

PACKAGE = "upstream_tests"


class GenerationTesterMixin:
    """Stands in for `tests/generation/test_utils.py`, which the source distribution does not carry."""


class ExportTesterMixin:
    """Stands in for `tests/exporters/test_export.py`, which the source distribution does not carry."""


def picture_path(url: str) -> str:
    """A picture on this disk, one for each name, in place of one on the hub."""
    path = Path(tempfile.gettempdir()) / f"fila-upstream-{os.getuid()}-{Path(url).stem}.png"
    if not path.exists():
        pixels = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return str(path)


def install() -> None:
    """Makes `upstream_tests` importable, with stubs for what the distribution lacks."""
    sys.path.insert(0, os.environ["FILA_UPSTREAM"])
    stubs = {
        f"{PACKAGE}.generation.test_utils": {"GenerationTesterMixin": GenerationTesterMixin},
        f"{PACKAGE}.exporters.test_export": {"ExportTesterMixin": ExportTesterMixin},
        f"{PACKAGE}.utils.test_configuration_utils": {"config_common_kwargs": {}},
        "fetch_hub_objects_for_ci": {"url_to_local_path": picture_path},
    }
    for name, values in stubs.items():
        module = ModuleType(name)
        vars(module).update(values)
        sys.modules[name] = module
        parent = name.rpartition(".")[0]
        if parent and parent not in sys.modules:
            sys.modules[parent] = ModuleType(parent)


def name_fila() -> None:
    """Enters FILA where upstream's tests look up its own models' names, as registration does for the Auto classes."""
    common = importlib.import_module(f"{PACKAGE}.test_modeling_common")
    common.MODEL_MAPPING_NAMES = {**common.MODEL_MAPPING_NAMES, "fila": "FilaModel"}
    common.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES = {
        **common.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        "fila": "FilaForConditionalGeneration",
    }


install()
name_fila()
