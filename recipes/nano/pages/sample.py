"""Seeded document-like pictures, each with a question whose answer a seam cuts or leaves whole.

A page is planned first (`compose`: what is written where, on the canvas the model will see) and drawn second (`draw`).

    python -m recipes.nano.pages.sample --out DIR --count 20 --seed 0 --split test
"""

import argparse
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from PIL import Image

from fila.geometry import Geometry
from recipes.nano.pages.blocks import SHAPES
from recipes.nano.pages.compose import find_page, global_ink
from recipes.nano.pages.draw import draw_page
from recipes.nano.pages.fonts import FontSet
from recipes.nano.pages.page import Page
from recipes.nano.pages.turns import further_questions, reading_lines

CHARSET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz.,:-/%$#&()+'"
NANO_GEOMETRY = Geometry(
    tile=64, patch=8, stride=16, canvases=((64, 128), (128, 64), (128, 128), (192, 64), (64, 192)), fixed_size=128
)
MOST_FURTHER = 8
LARGEST_SPACE = 0.5  # em; a wider gap separates columns

__all__ = ["CHARSET", "NANO_GEOMETRY", "SHAPES", "Glyph", "Sample", "locate", "make_sample"]


@dataclass(frozen=True)
class Glyph:
    """A character with the centre of its ink box and the middle of its line (of its capitals), canvas pixels.

    Shapes appear with the characters of `SHAPES`. A space has the middle of its advance and of its line.
    """

    char: str
    cx: float
    cy: float
    line: float


@dataclass
class Sample:
    """A picture and a question.

    Args:
        image: RGB at image resolution; None when not rendered.
        answer: at most 12 characters of `CHARSET` and spaces.
        cut: whether a seam crosses a glyph of the answer.
        canvas: (height, width) in canvas pixels.
        glyphs: every glyph, space and shape on the page.
        kind: the kind of question, a key of `compose.KIND_SHARES`.
        answer_glyphs: indices into `glyphs` of the answer's characters, spaces left out.
        size: (height, width) of the picture in image pixels.
        more: further (question, answer) pairs about the page, for training.
        lines: the page's text in reading order, for training.
        global_ink: median (height, width) of the answer's glyphs in the global view, pixels of that view.
    """

    image: Image.Image | None
    question: str
    answer: str
    cut: bool
    canvas: tuple[int, int]
    glyphs: list[Glyph]
    kind: str
    answer_glyphs: list[int] = field(default_factory=list)
    size: tuple[int, int] = (0, 0)
    more: list[tuple[str, str]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    global_ink: tuple[float, float] = (0.0, 0.0)

    @property
    def questions(self) -> list[tuple[str, str]]:
        """Everything asked about the page, its own question first."""
        return [(self.question, self.answer), *self.more]


def make_sample(
    seed: int,
    *,
    split: str,
    fonts: FontSet,
    geometry: Geometry = NANO_GEOMETRY,
    cut: bool | None = None,
    render: bool = True,
    crowded: bool = False,
) -> Sample:
    """The sample of a seed: the same on every machine with the same fonts and Pillow.

    Args:
        seed: any integer; each split has its own sequence.
        split: "train" or "test", the split of the words; `fonts` should be that split's.
        fonts: the faces to draw with.
        geometry: canvases, tile and fit; one row or column of tiles up to three.
        cut: whether a seam shall cut the answer; None leaves it to the seed, half and half. Nothing is cut under the
            rule "direct", which has no seams.
        crowded: fills the page with lines around what is asked.
        render: False skips the drawing (and the measure on the drawn glyphs), for samples of text only.

    Returns:
        A `Sample`. When rendered, `cut` has been measured on the drawn glyphs (`seams.verdict`).
    """
    rng = Random(f"{split}/{seed}")
    coin = rng.random() < 0.5
    wanted = (coin if cut is None else cut) and geometry.rule != "direct"
    page = find_page(rng, split=split, fonts=fonts, geometry=geometry, cut=wanted, measure=render, crowded=crowded)
    glyphs, answer_glyphs = locate(page)
    image = draw_page(page) if render else None
    size = (page.layout.height, page.layout.width)
    more = further_questions(page.blocks, (page.question, page.answer), rng, MOST_FURTHER)
    return Sample(
        image,
        page.question,
        page.answer,
        wanted,
        page.layout.canvas,
        glyphs,
        page.kind,
        answer_glyphs,
        size,
        more,
        reading_lines(page.blocks),
        global_ink(page),
    )


def locate(page: Page) -> tuple[list[Glyph], list[int]]:
    """Every glyph of the page, and which of them are the answer's.

    A gap between two runs of one line that is as narrow as a space counts as a space: it looks like one.
    """
    glyphs: list[Glyph] = []
    answer: list[int] = []
    for number, block in enumerate(page.blocks):
        for mark in block.marks:
            x, y = mark.cx + block.x, mark.cy + block.y
            glyphs.append(Glyph(SHAPES[mark.shape], x, y, y))
        pen = baseline = -math.inf  # where the last run ended
        for index, run in enumerate(block.runs):
            asked = number == 0 and block.ask is not None and block.ask.run == index
            x, y, em, face = run.x + block.x, run.y + block.y, run.em, run.face
            middle = y - em * face.cap_height / 2
            if abs(y - baseline) < em / 4 and 0 < x - pen < LARGEST_SPACE * em:
                glyphs.append(Glyph(" ", (pen + x) / 2, middle, middle))
            for i, char in enumerate(run.text):
                m = face[char]
                if char == " ":
                    glyphs.append(Glyph(" ", x + em * m.advance / 2, middle, middle))
                else:
                    if asked and block.ask.start <= i < block.ask.end:  # type: ignore[union-attr]
                        answer.append(len(glyphs))
                    glyphs.append(Glyph(char, x + em * (m.x0 + m.x1) / 2, y + em * (m.y0 + m.y1) / 2, middle))
                x += em * m.advance
            pen, baseline = x, y
    return glyphs, answer


def main(arguments: list[str] | None = None) -> int:
    """Writes samples as PNG files with a `labels.jsonl`."""
    parser = argparse.ArgumentParser(prog="python -m recipes.nano.pages.sample", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first sample; the others follow")
    parser.add_argument("--split", choices=("train", "test"), default="test")
    parser.add_argument("--builtin-font", action="store_true", help="Pillow's own face instead of the listed fonts")
    options = parser.parse_args(arguments)
    fonts = FontSet.builtin() if options.builtin_font else FontSet.installed(options.split)
    options.out.mkdir(parents=True, exist_ok=True)
    with open(options.out / "labels.jsonl", "w") as labels:
        for seed in range(options.seed, options.seed + options.count):
            sample = make_sample(seed, split=options.split, fonts=fonts)
            assert sample.image is not None
            name = f"{options.split}-{seed:06d}.png"
            sample.image.save(options.out / name)
            record = {"file": name, "seed": seed, "question": sample.question, "answer": sample.answer,
                      "cut": sample.cut, "kind": sample.kind, "canvas": sample.canvas,
                      "glyphs": [[g.char, round(g.cx, 2), round(g.cy, 2)] for g in sample.glyphs],
                      "answer_glyphs": sample.answer_glyphs,
                      "global_ink": [round(side, 2) for side in sample.global_ink]}  # fmt: skip
            labels.write(json.dumps(record) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
