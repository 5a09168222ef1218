"""Estimates how large the text of a picture is, from the picture alone, to tell when it is too small for a model.

Letters are connected patches of ink that stand side by side: of like height, on one baseline. A picture in which few
patches do so counts as one without text, and nothing is said about it.
"""

import numpy as np
from PIL import Image, ImageFilter

from fila.geometry import Layout
from fila.images import Picture

ZOOM = 3.0  # pixels measured per canvas pixel, at most: text of two canvas pixels still has separate lines
REACH = 15  # pixels around a pixel that it is compared with
CONTRAST = 32  # of 255
TALLEST = 44  # pixels; larger patches are pictures, frames and headings
LEAST_LETTERS = 8
LEAST_SHARE = 0.5  # of patches that stand in a line
LEAST_SPREAD = 0.1  # of the letters' widths, relative to their mean; the cells of a grid are all alike
MOST_ASKED = 400  # patches whose neighbours are looked for
TALL = 0.7  # quantile of the letters' heights that capitals and ascenders reach
MARGIN = 0.85  # of the smallest capitals learned: estimates are up to 7 % low


def capital_height(image: Image.Image, layout: Layout) -> float | None:
    """Height of the capitals of most of a picture's text, canvas pixels; None where there is no text to be seen."""
    scale = layout.content.height / layout.height  # canvas pixels of an image pixel
    zoom = min(1.0, ZOOM * scale)
    size = max(1, round(image.width * zoom)), max(1, round(image.height * zoom))
    small = image.convert("L").resize(size, Image.Resampling.BOX)
    darker = np.asarray(small, dtype=np.int16) - np.asarray(small.filter(ImageFilter.BoxBlur(REACH)), dtype=np.int16)
    found = [_letters(darker < -CONTRAST), _letters(darker > CONTRAST)]
    heights = max(found, key=len)  # dark letters on light paper, or the other way round
    if not len(heights):
        return None
    heights = np.sort(heights)  # each counts by its height, so that rows of dots count little
    return float(heights[np.searchsorted(np.cumsum(heights), TALL * heights.sum())]) * scale / zoom


def smallness(picture: Picture, layout: Layout, smallest: float | None) -> str | None:
    """What to say of a picture whose text is smaller than a model has learned to read; `smallest` in canvas pixels."""
    if smallest is None:
        return None
    height = capital_height(picture.image, layout)
    if height is None or height >= MARGIN * smallest:
        return None
    seen = f"{layout.canvas[1]}x{layout.canvas[0]}"
    return (
        f"the text is too small for this model: on the {seen} pixels that it sees, capitals are about "
        f"{height:.1f} pixels high, and it learned to read from {smallest:g}; cut out the part that matters"
    )


def _letters(ink: np.ndarray) -> np.ndarray:
    """Heights of the patches that are letters; none where they are too few, or few of all patches."""
    top, bottom, left, right = _patches(ink).T
    height, width = bottom - top, right - left
    like = (height >= 2) & (height <= TALLEST) & (width <= 15 * height) & (height <= 12 * width)
    bottom, left, right, height = bottom[like], left[like], right[like], height[like]
    asked = slice(None, None, len(height) // MOST_ASKED + 1)
    tall = np.maximum(height[asked, None], height)
    # Another patch begins soon beside it, on the same baseline, and is not much taller or smaller.
    level = np.abs(bottom[asked, None] - bottom) <= 0.12 * tall + 1
    gap = np.maximum(left - right[asked, None], left[asked, None] - right)
    beside = level & (gap > -1) & (gap <= 1.2 * tall) & (tall <= 1.8 * np.minimum(height[asked, None], height) + 1)
    stands = beside.any(1)
    width = (right - left)[asked][stands]
    if stands.sum() < LEAST_LETTERS or stands.mean() < LEAST_SHARE or width.std() < LEAST_SPREAD * width.mean():
        return np.empty(0)
    return height[asked][stands]


def _patches(ink: np.ndarray) -> np.ndarray:
    """Boxes (top, bottom, left, right) of the connected patches of a mask, [n, 4]."""
    # Runs of ink in a row, by their place in rows that are one longer than the picture's.
    row = ink.shape[1] + 1
    edges = np.diff(np.pad(ink.astype(np.int8), ((0, 0), (1, 1))), axis=1).ravel()
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    # Runs `first` to `last` of the next row touch a run, corners included.
    first, last = np.searchsorted(ends, starts + row), np.searchsorted(starts, ends + row, side="right")
    count = np.maximum(last - first, 0)
    upper = np.repeat(np.arange(len(starts)), count)
    lower = np.arange(len(upper)) + np.repeat(first - (np.cumsum(count) - count), count)
    root, before = np.arange(len(starts)), None
    while before is None or (root != before).any():  # every run takes the least number of those that it touches
        before = root.copy()
        least = np.minimum(root[upper], root[lower])
        np.minimum.at(root, before[upper], least)
        np.minimum.at(root, before[lower], least)
        root = root[root]
    order = np.argsort(root, kind="stable")
    groups = np.flatnonzero(np.diff(root[order], prepend=-1))
    if not len(groups):
        return np.empty((0, 4), dtype=np.int64)
    y, x0, x1 = starts[order] // row, starts[order] % row, ends[order] % row
    return np.stack(
        [np.minimum.reduceat(y, groups), np.maximum.reduceat(y, groups) + 1, np.minimum.reduceat(x0, groups),
         np.maximum.reduceat(x1, groups)], axis=1,
    )  # fmt: skip
