"""Loads fonts as faces with linear metrics, grouped into the training and the test families.

Metrics are taken once per glyph at a large size and scaled, so that a page can be laid out without drawing it. Units
are em (the font size), x to the right from the pen, y down from the baseline.
"""

import json
import zlib
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONT_LIST = Path(__file__).with_name("fonts.json")
MEASURE_SIZE = 96  # pixels an em when metrics are taken: hinting is then below 1 % of an em
PROFILE_BINS = 32


class Metrics(NamedTuple):
    """One glyph in em: advance, ink box, and where its ink lies (cumulative share, `PROFILE_BINS` equal steps)."""

    advance: float
    x0: float
    y0: float
    x1: float
    y1: float
    share_x: tuple[float, ...]
    share_y: tuple[float, ...]


@dataclass
class Face:
    """One font file.

    Args:
        path: the file; None stands for Pillow's built-in face, which needs no file.
        family: name shared by the faces of a family.
        style: "regular", "bold", "italic" or "bolditalic".
    """

    path: str | None
    family: str
    style: str = "regular"
    metrics: dict[str, Metrics] = field(default_factory=dict, repr=False)

    def __getitem__(self, char: str) -> Metrics:
        found = self.metrics.get(char)
        if found is None:
            found = self.metrics[char] = _measure(self.path, char)
        return found

    @property
    def cap_height(self) -> float:
        """Height of a capital in em."""
        return -self["H"].y0

    def at(self, size: float) -> ImageFont.FreeTypeFont:
        """The face at `size` pixels an em, cached."""
        return load(self.path, size)


@dataclass
class FontSet:
    """The faces of one split, by family.

    Args:
        families: for each family its faces, the regular one first.
    """

    families: list[list[Face]]

    @classmethod
    def builtin(cls) -> "FontSet":
        """Pillow's built-in face alone: enough for tests, on any machine."""
        return cls([[Face(None, "builtin")]])

    @classmethod
    def installed(cls, split: str, *, verify: bool = False, font_list: Path = FONT_LIST) -> "FontSet":
        """The listed families of one split, as installed on this machine.

        Args:
            split: "train" or "test"; no family is in both.
            verify: compare every file's SHA-256 with the list.
            font_list: the list, JSON.

        Raises:
            ValueError: unknown split, or a file that differs from the list.
            FileNotFoundError: a listed file is missing; the message names the packages to install.
        """
        listed = json.loads(font_list.read_text())
        if split not in ("train", "test"):
            raise ValueError(f'split must be "train" or "test", got {split!r}')
        families, missing = [], set()
        for family in listed["families"]:
            if family["split"] != split:
                continue
            faces = []
            for entry in family["files"]:
                path = Path(entry["path"])
                if not path.exists():
                    missing.add(family["package"])
                elif verify and sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
                    raise ValueError(f"{path} differs from {font_list.name}: another version of {family['package']}?")
                faces.append(Face(str(path), family["family"], entry["style"]))
            families.append(faces)
        if missing:
            raise FileNotFoundError(f"fonts not installed; apt-get install {' '.join(sorted(missing))}")
        return cls(families)


@lru_cache(maxsize=256)
def load(path: str | None, size: float) -> ImageFont.FreeTypeFont:
    """A face at a size in pixels an em, without kerning or ligatures: the generator places every glyph itself."""
    if path is None:
        font = ImageFont.load_default(size)
        assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
        return font
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def _measure(path: str | None, char: str) -> Metrics:
    font = load(path, MEASURE_SIZE)
    advance = font.getlength(char) / MEASURE_SIZE
    left, top, right, bottom = font.getbbox(char, anchor="ls")
    image = Image.new("L", (max(1, int(right - left)), max(1, int(bottom - top))))
    ImageDraw.Draw(image).text((-left, -top), char, font=font, fill=255, anchor="ls")
    box = image.getbbox()
    if box is None:
        return Metrics(advance, 0.0, 0.0, 0.0, 0.0, (), ())
    ink = np.asarray(image.crop(box), dtype=np.float64)
    x0, y0, x1, y1 = ((edge + base) / MEASURE_SIZE for edge, base in zip(box, (left, top, left, top), strict=True))
    return Metrics(advance, x0, y0, x1, y1, _cumulative(ink.sum(0)), _cumulative(ink.sum(1)))


def _cumulative(ink: np.ndarray) -> tuple[float, ...]:
    total = np.concatenate([[0.0], np.cumsum(ink)]) / ink.sum()
    at = np.linspace(0, len(ink), PROFILE_BINS + 1)
    return tuple(float(v) for v in np.interp(at, np.arange(len(ink) + 1), total))


def fingerprint(text: str) -> int:
    """A small stable hash, the same on every machine and run."""
    return zlib.crc32(text.encode())
