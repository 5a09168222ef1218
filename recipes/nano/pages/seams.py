"""Measures what a seam does to a glyph: the share of its ink on each side, on the finished canvas.

The glyph is drawn alone at image resolution and resized to the canvas as the processor resizes; the ink is then summed
on both sides of every tile boundary. A glyph is *cut* when a seam leaves at least a fifth of its ink on
each side; an answer is *intact* when no seam leaves more than a hundredth of any of its glyphs on the other side.
"""

import math
from collections.abc import Iterable

import numpy as np
from PIL import Image

CUT_SHARE = 0.2
INTACT_SHARE = 0.01


def seams(layout) -> tuple[list[int], list[int]]:
    """Tile boundaries inside the content: (y of horizontal seams, x of vertical seams), canvas pixels."""
    tile, content = layout.geometry.tile, layout.content
    horizontal = [y for y in range(tile, layout.canvas[0], tile) if content.y0 < y < content.y1]
    vertical = [x for x in range(tile, layout.canvas[1], tile) if content.x0 < x < content.x1]
    return horizontal, vertical


def to_canvas(
    ink: Image.Image, origin: tuple[int, int], layout, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> tuple[np.ndarray, tuple[int, int]]:
    """Resizes a drawn-alone patch of the image onto the canvas, exactly as the whole image would be.

    Args:
        ink: mode "L", ink white on black, at image resolution; black for some pixels around the ink.
        origin: (y, x) of the patch in the image.
        layout: the image's `fila.geometry.Layout`.

    Returns:
        (array of canvas pixels, (y, x) of its corner on the canvas).
    """
    content = layout.content
    sy, sx = content.height / layout.height, content.width / layout.width
    y0, x0 = math.ceil(origin[0] * sy), math.ceil(origin[1] * sx)
    y1, x1 = math.floor((origin[0] + ink.height) * sy), math.floor((origin[1] + ink.width) * sx)
    box = (x0 / sx - origin[1], y0 / sy - origin[0], x1 / sx - origin[1], y1 / sy - origin[0])
    box = (max(box[0], 0.0), max(box[1], 0.0), min(box[2], ink.width), min(box[3], ink.height))
    out = ink.resize((max(1, x1 - x0), max(1, y1 - y0)), resample, box=box)
    return np.asarray(out, dtype=np.float64), (int(content.y0) + y0, int(content.x0) + x0)


def shares(ink: np.ndarray, corner: tuple[int, int], layout) -> list[float]:
    """For every seam, the smaller share of the ink on one of its sides (0 where the seam misses the glyph)."""
    total = ink.sum()
    if total <= 0:
        return []
    horizontal, vertical = seams(layout)
    found = []
    for axis, lines in ((0, horizontal), (1, vertical)):
        profile = ink.sum(1 - axis)
        for line in lines:
            at = line - corner[axis]
            before = float(profile[: max(0, at)].sum() / total)
            found.append(min(before, 1.0 - before))
    return found


def verdict(glyph_shares: Iterable[float]) -> str:
    """ "cut", "intact" or "between" for an answer, from the shares of all its glyphs and seams."""
    worst = max(glyph_shares, default=0.0)
    return "cut" if worst >= CUT_SHARE else "intact" if worst <= INTACT_SHARE else "between"
