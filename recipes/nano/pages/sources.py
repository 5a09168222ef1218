"""Mixes the kinds of pages that a stage of training sees. Each page follows from its seed.

cards      the pages of the test (`sample`), planned on its canvases and seen on the model's
dense      the same planned on the model's own canvases, smaller therefore, and filled up with lines
documents  pages as people have them (`documents`)
"""

from dataclasses import replace
from random import Random

from fila.geometry import Geometry
from recipes.nano.pages.absent import with_absent
from recipes.nano.pages.documents import find_document
from recipes.nano.pages.fonts import FontSet
from recipes.nano.pages.sample import NANO_GEOMETRY, Sample, make_sample, sample_of


def draw(
    seed: int,
    shares: dict[str, float],
    *,
    split: str,
    fonts: FontSet,
    geometry: Geometry,
    render: bool = True,
    absent: float = 0.0,
) -> Sample:
    """The page of a seed, of a kind that the seed draws by `shares`; `absent` of its questions have no answer there."""
    sample = _draw(seed, shares, split=split, fonts=fonts, geometry=geometry, render=render)
    return with_absent(sample, Random(f"{split}/absent/{seed}"), split, absent)


def _draw(
    seed: int, shares: dict[str, float], *, split: str, fonts: FontSet, geometry: Geometry, render: bool
) -> Sample:
    kind = Random(f"source/{seed}").choices(list(shares), list(shares.values()))[0]
    if kind == "documents":
        rng = Random(f"{split}/document/{seed}")
        return sample_of(find_document(rng, split=split, fonts=fonts, geometry=geometry), rng, False, render)
    if kind == "dense":
        return make_sample(seed, split=split, fonts=fonts, geometry=geometry, render=render, crowded=True)
    planned = replace(NANO_GEOMETRY, rule=geometry.rule)
    return moved(make_sample(seed, split=split, fonts=fonts, geometry=planned, render=render), planned, geometry)


def moved(sample: Sample, planned: Geometry, seen: Geometry) -> Sample:
    """The same picture with its glyphs where they stand on the canvas of another geometry."""
    before, after = planned.layout(*sample.size), seen.layout(*sample.size)
    dy, dx = after.content.height / before.content.height, after.content.width / before.content.width
    oy, ox = after.content.y0 - before.content.y0 * dy, after.content.x0 - before.content.x0 * dx
    glyphs = [
        replace(g, cx=g.cx * dx + ox, cy=g.cy * dy + oy, line=g.line * dy + oy, cap=g.cap * dy) for g in sample.glyphs
    ]
    return replace(sample, glyphs=glyphs, canvas=after.canvas)
