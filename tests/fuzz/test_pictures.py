"""The fuzz of pictures in small, and proof that it finds what it is made to find."""

import random
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from fila import images
from tests.fuzz import pictures


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)  # put back afterwards
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    found = pictures.fuzz(200, 0, tmp_path)
    assert sum(found.values()) == 200
    assert found["mutated read"] > 10
    assert found["mutated refused"] > 50


def test_every_bomb_is_read_or_refused() -> None:
    draw = random.Random(0)
    for name, make in pictures.bombs(draw):
        if name != "PNG, large and empty":  # within the limits: it is read, and takes what a picture of its size takes
            assert pictures.judge(draw, make(), None) in ("read", "refused"), name


def test_a_decoder_that_raises_its_own_error_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(image: Image.Image, *rest: object) -> None:
        raise KeyError("planted")

    monkeypatch.setattr(images, "to_rgb", fail)
    with pytest.raises(AssertionError, match=r"file \d+ of seed 0 .*KeyError: 'planted'"):
        pictures.fuzz(50, 0, tmp_path)


def test_wrong_pixels_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = images.to_rgb

    def darker(image: Image.Image, *rest: object) -> Image.Image:
        return Image.fromarray((np.asarray(honest(image, *rest)) * 0.9).astype(np.uint8))

    monkeypatch.setattr(images, "to_rgb", darker)
    with pytest.raises(AssertionError, match="levels off"):
        pictures.fuzz(200, 0, tmp_path)


def test_trust_in_pillows_settings_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing:
        def __init__(self, max_side: int) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(images, "trusting_no_settings", Nothing)
    with pytest.raises(AssertionError, match=r"setting of Pillow|reads differently"):
        pictures.fuzz(500, 0, tmp_path)
