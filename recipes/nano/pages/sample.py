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
from recipes.nano.pages.turns import Span, links, reading_lines, turns

CHARSET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz.,:-/%$#&()+'"
# What cards are planned on, and with them the frozen test; a model may see them on wider canvases (`sources.moved`).
NANO_GEOMETRY = Geometry(64, 8, 16, ((64, 128), (128, 64), (128, 128), (192, 64), (64, 192)), "scaled", 128)
MOST_FURTHER = 16
LARGEST_SPACE = 0.5  # em; a wider gap separates columns

__all__ = ["CHARSET", "NANO_GEOMETRY", "SHAPES", "Glyph", "Sample", "locate", "make_sample"]


@dataclass(frozen=True)
class Glyph:
    """A character with the centre of its ink box, the middle of its line and the height of a capital, canvas pixels.

    Shapes appear with the characters of `SHAPES`. A space has the middle of its advance and of its line.
    """

    char: str
    cx: float
    cy: float
    line: float
    cap: float


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
        asked: everything asked about the page, its own question first.
        links: (way, glyph of the value, glyph of its label): where one text belongs to another, see `turns.Link`.
        size: (height, width) of the picture in image pixels.
        lines: the page's text in reading order.
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
    asked: list["Asked"] = field(default_factory=list)
    links: list[tuple[str, int, int]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    global_ink: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Asked:
    """A question with its answer, the glyph of each of the answer's characters, and those that name the place."""

    kind: str
    question: str
    answer: str
    glyphs: list[int]
    anchors: list[int]


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
        cut: whether a seam should cut the answer; None leaves it to the seed, half and half. Nothing is cut under the
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
    return sample_of(page, rng, wanted, render)


def sample_of(page: Page, rng: Random, cut: bool, render: bool) -> Sample:
    """Draws a planned page and finds everything that can be asked about it."""
    glyphs, places = locate(page)

    def stands(span: Span) -> list[int]:
        return places[span.block, span.run][span.start : span.end] if span.run >= 0 else places[span.block, -1]

    asked = [
        Asked(t.kind, t.question, t.answer, stands(t.span), [stands(a)[-1] for a in t.anchors])
        for t in turns(page.blocks, page.question, rng, MOST_FURTHER)
    ]
    joined = [(link.way, stands(link.value)[0], stands(link.label)[-1]) for link in links(page.blocks)]
    image = draw_page(page) if render else None
    size = (page.layout.height, page.layout.width)
    return Sample(
        image,
        page.question,
        page.answer,
        cut,
        page.layout.canvas,
        glyphs,
        page.kind,
        [i for i in asked[0].glyphs if glyphs[i].char != " "],
        size,
        asked,
        joined,
        reading_lines(page.blocks),
        global_ink(page),
    )


def locate(page: Page) -> tuple[list[Glyph], dict[tuple[int, int], list[int]]]:
    """Every glyph of the page, and which of them each run's characters are, by (block, run); -1 for its shape.

    A gap between two runs of one line that is as narrow as a space counts as a space: it looks like one.
    """
    glyphs: list[Glyph] = []
    places: dict[tuple[int, int], list[int]] = {}
    for number, block in enumerate(page.blocks):
        for mark in block.marks:
            x, y = mark.cx + block.x, mark.cy + block.y
            places[number, -1] = [len(glyphs)]
            glyphs.append(Glyph(SHAPES[mark.shape], x, y, y, mark.r))
        pen = baseline = -math.inf  # where the last run ended
        for index, run in enumerate(block.runs):
            x, y, em, face = run.x + block.x, run.y + block.y, run.em, run.face
            cap = em * face.cap_height
            middle = y - cap / 2
            if abs(y - baseline) < em / 4 and 0 < x - pen < LARGEST_SPACE * em:
                glyphs.append(Glyph(" ", (pen + x) / 2, middle, middle, cap))
            places[number, index] = []
            for char in run.text:
                m = face[char]
                places[number, index].append(len(glyphs))
                if char == " ":
                    glyphs.append(Glyph(" ", x + em * m.advance / 2, middle, middle, cap))
                else:
                    glyphs.append(Glyph(char, x + em * (m.x0 + m.x1) / 2, y + em * (m.y0 + m.y1) / 2, middle, cap))
                x += em * m.advance
            pen, baseline = x, y
    return glyphs, places


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
