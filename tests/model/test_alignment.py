"""Tiles, global view and high-resolution raster show the same place of the picture wherever the model joins them.

The test picture encodes coordinates as colours: cosine and sine of the coordinate in red and green, a plain ramp in
blue. The ramp gives the period and the angle the place within it, to a few hundredths of a pixel: 8-bit rounding moves
it little, and a resampling filter is symmetric, so it weakens the wave without shifting it. The test reads the image
coordinate of a rendered pixel back from the processor's output and compares it where the model joins the parts: at the
centre of each ViT patch, and at the point of the raster that the patch's box names.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
from PIL import Image

from fila.configuration import preset
from fila.geometry import LLAVA_NEXT_CANVASES, Geometry, Layout, Rect, fit
from fila.image_processing import FilaImageProcessor
from fila.resampling import Pixels, place_normalized

Resize = Callable[[int, int], Pixels]

AMPLITUDE = 110  # room for the overshoot of a bicubic filter
PRECISION = 0.15  # of a coordinate read back, in pixels of the frame it is read in

NANO_CANVASES = ((128, 256), (256, 128), (256, 256), (384, 128), (128, 384))
NANO = {"tile": 128, "patch": 16, "canvases": NANO_CANVASES, "fixed_size": 256}
PAPER = {"tile": 336, "patch": 14, "canvases": LLAVA_NEXT_CANVASES, "fixed_size": 768}
RULES = ("scaled", "fixed", "direct")


def coordinate_picture(height: int, width: int, axis: int, period: float) -> Image.Image:
    """A picture whose colours give the coordinate along `axis` (0: y), in image pixels, centres at halves."""
    length = (height, width)[axis]
    place = np.arange(length) + 0.5
    angle = 2 * np.pi * place / period
    colours = np.stack([127.5 + AMPLITUDE * np.cos(angle), 127.5 + AMPLITUDE * np.sin(angle), 255 * place / length], -1)
    colours = np.rint(colours).astype(np.uint8)
    colours = colours[:, None] if axis == 0 else colours[None]
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(colours, (height, width, 3))))


def read_coordinates(colours: np.ndarray, length: int, period: float) -> np.ndarray:
    """The image coordinate that each of the rendered pixels [n, 3] shows."""
    angle = np.arctan2(colours[:, 1] - 127.5, colours[:, 0] - 127.5)
    within = angle / (2 * np.pi) * period
    ramp = colours[:, 2] / 255 * length
    return within + period * np.round((ramp - within) / period)


def edges(rect: Rect, axis: int) -> tuple[float, float]:
    return ((rect.y0, rect.y1), (rect.x0, rect.x1))[axis]


@dataclass
class Line:
    """A line of rendered pixels: the image coordinate at each of its centres, and where it should be.

    `start` is where the picture starts, in pixels of this rendering from its own corner (negative in a tile that begins
    inside the picture), `size` is what the whole picture measures in them.
    """

    shown: np.ndarray
    start: float
    size: float
    length: int

    def __post_init__(self) -> None:
        centres = np.arange(len(self.shown)) + 0.5
        # Within the filter's reach of the picture's own border the wave is cut off, and says nothing.
        reach = 3 * max(1.0, self.size / self.length)
        keep = (centres > self.start + reach) & (centres < self.start + self.size - reach)
        self.centres, self.shown = centres[keep], self.shown[keep]

    def error(self) -> float:
        """The largest distance from where it should be, in rendered pixels."""
        per_pixel = self.length / self.size
        expected = (self.centres - self.start) * per_pixel
        return float(np.abs(self.shown - expected).max(initial=0) / per_pixel)

    def covers(self, places: np.ndarray) -> np.ndarray:
        if not len(self.centres):
            return np.zeros(len(places), bool)
        return (places >= self.centres[0]) & (places <= self.centres[-1])

    def at(self, places: np.ndarray) -> np.ndarray:
        return np.interp(places, self.centres, self.shown)


def draw_lines(processor: FilaImageProcessor, height: int, width: int, axis: int) -> tuple[Line, dict[int, Line]]:
    """A line through the raster and one through each view that shows the picture, by the view's index."""
    layout, length, across = processor.geometry.layout(height, width), (height, width)[axis], 1 - axis
    content, raster_content, side = layout.content, layout.raster_content, processor.tile_size
    (content_start, content_end), (raster_start, raster_end) = edges(content, axis), edges(raster_content, axis)
    content_size, raster_size = content_end - content_start, raster_end - raster_start
    # Long enough for the coarsest rendering to carry, and for a picture that is enlarged to be smooth.
    period = max(16.0, 12 * length / min(side, content_size, raster_size))
    data = processor(coordinate_picture(height, width, axis, period), return_tensors="np")

    def line(pixels: np.ndarray, mean: list[float], std: list[float], middle: float, start: float, size: float) -> Line:
        colours = 255 * (np.moveaxis(pixels, 0, -1) * std + mean)
        colours = colours[:, int(middle)] if axis == 0 else colours[int(middle)]
        return Line(read_coordinates(colours, length, period), start, size, length)

    raster = line(
        data["high_res_pixel_values"][0],
        processor.high_res_image_mean,
        processor.high_res_image_std,
        sum(edges(raster_content, across)) / 2,
        raster_start,
        raster_size,
    )
    colours = (processor.image_mean, processor.image_std)
    views = {0: line(data["pixel_values"][0][0], *colours, side / 2, 0, side)}
    for index, tile in enumerate(layout.tiles, start=1):
        (tile_start, tile_end), (first, last) = edges(tile, across), edges(content, across)
        first, last = max(first, tile_start), min(last, tile_end)
        if first < last:
            start = content_start - edges(tile, axis)[0]
            middle = (first + last) / 2 - tile_start
            views[index] = line(data["pixel_values"][0][index], *colours, middle, start, content_size)
    return raster, views


def worst_deviations(processor: FilaImageProcessor, height: int, width: int) -> dict[str, float]:
    """The largest error of each kind, over both axes.

    view, raster: from the place where the geometry puts the picture, in pixels of that rendering.
    joined: between a ViT patch's centre and the raster point that its box gives it, in raster pixels.
    """
    worst = {"view": 0.0, "raster": 0.0, "joined": 0.0, "points": 0.0}
    layout, side, grid = processor.geometry.layout(height, width), processor.tile_size, processor.geometry.grid
    patches = (np.arange(grid) + 0.5) * side / grid
    boxes = np.array(layout.boxes(processor.high_res_stride)) * processor.high_res_stride
    for axis in (0, 1):
        raster, views = draw_lines(processor, height, width, axis)
        worst["raster"] = max(worst["raster"], raster.error())
        for index, view in views.items():
            worst["view"] = max(worst["view"], view.error())
            start, end = boxes[index][axis], boxes[index][axis + 2]
            points = start + patches / side * (end - start)
            both = view.covers(patches) & raster.covers(points)
            apart = np.abs(view.at(patches[both]) - raster.at(points[both])) if both.any() else np.zeros(1)
            worst["joined"] = max(worst["joined"], apart.max() * raster.size / raster.length)
            worst["points"] += int(both.sum())
    return worst


def assert_aligned(processor: FilaImageProcessor, height: int, width: int) -> None:
    worst = worst_deviations(processor, height, width)
    where = f"{height}x{width}, rule {processor.high_res_rule}: {worst}"
    assert worst["points"] >= 2 * processor.geometry.grid, f"too little of the picture could be read: {where}"
    assert worst["view"] <= PRECISION, f"a view is not where the geometry says, {where}"
    assert worst["raster"] <= PRECISION, f"the raster is not where the geometry says, {where}"
    # The raster's content has its edges rounded once: half a raster pixel, and what reading back can err.
    assert worst["joined"] <= 0.5 + PRECISION, f"ViT and ConvNeXt see different places, {where}"


def processor_of(fields: dict, rule: str) -> FilaImageProcessor:
    return FilaImageProcessor.from_geometry(Geometry(rule=rule, **fields))


# For each canvas: filled exactly, enlarged with padding on one axis and on the other, reduced, odd amounts of padding.
NANO_SIZES = [
    *NANO_CANVASES,
    *[(103, 251), (128, 231), (311, 700)],
    *[(251, 117), (256, 91), (611, 300)],
    *[(241, 200), (211, 243), (999, 801)],
    *[(384, 101), (371, 128), (1201, 333)],
    *[(97, 384), (121, 351), (333, 1250)],
]


@pytest.mark.parametrize("rule", RULES)
def test_nano(rule: str) -> None:
    processor = processor_of(NANO, rule)
    canvases = set()
    for size in NANO_SIZES:
        assert_aligned(processor, *size)
        canvases.add(processor.geometry.layout(*size).canvas)
    assert canvases == ({(128, 128)} if rule == "direct" else set(NANO_CANVASES))


@pytest.mark.parametrize("rule", RULES)
def test_the_shipped_geometry(rule: str) -> None:
    geometry = replace(preset("fila-nano").vision_config.geometry(), rule=rule)
    processor = FilaImageProcessor.from_geometry(geometry)
    canvases = set()
    # The sizes are made for other tiles; one view alone needs them as they are.
    shrink = 1 if rule == "direct" else NANO["tile"] / geometry.tile
    for height, width in NANO_SIZES:
        size = round(height / shrink), round(width / shrink)
        assert_aligned(processor, *size)
        canvases.add(geometry.layout(*size).canvas)
    assert canvases == ({(geometry.tile, geometry.tile)} if rule == "direct" else set(geometry.canvases))


@pytest.mark.parametrize(
    "rule, sizes",
    [
        ("scaled", [(331, 660), (671, 300), (640, 480), (1000, 331), (335, 1001)]),
        ("fixed", [(331, 660), (640, 480), (335, 1001)]),
        ("direct", [(640, 480)]),
    ],
)
def test_paper(rule: str, sizes: list[tuple[int, int]]) -> None:
    processor = processor_of(PAPER, rule)
    for size in sizes:
        assert_aligned(processor, *size)


# A test of alignment is worth what it would catch: each fault below is planted, and has to be found.


def shift_one_tile(monkeypatch: pytest.MonkeyPatch, axis: int) -> None:
    draw = FilaImageProcessor._draw_views

    def shifted(self: FilaImageProcessor, image: Image.Image, layout: Layout) -> np.ndarray:
        views = draw(self, image, layout)
        views[-1] = np.roll(views[-1], 1, axis=1 + axis)
        return views

    monkeypatch.setattr(FilaImageProcessor, "_draw_views", shifted)


def swap_two_tiles(monkeypatch: pytest.MonkeyPatch, axis: int) -> None:
    draw = FilaImageProcessor._draw_views

    def swapped(self: FilaImageProcessor, resize: Resize, layout: Layout) -> np.ndarray:
        views = draw(self, resize, layout)
        views[[1, 2]] = views[[2, 1]]
        return views

    monkeypatch.setattr(FilaImageProcessor, "_draw_views", swapped)


def fit_the_raster_again(monkeypatch: pytest.MonkeyPatch, axis: int) -> None:
    def again(self: FilaImageProcessor, resize: Resize, layout: Layout) -> np.ndarray:
        content = fit(layout.height, layout.width, layout.raster)
        return place_normalized(resize, layout.raster, content, self.image_mean, self.image_std).numpy()

    monkeypatch.setattr(FilaImageProcessor, "_draw_raster", again)


def fit_raster_and_boxes_again(monkeypatch: pytest.MonkeyPatch, axis: int) -> None:
    """The geometry itself fits twice, so that the raster is where it says: only the join can show it."""
    monkeypatch.setattr(
        Layout, "raster_content", property(lambda layout: fit(layout.height, layout.width, layout.raster))
    )


def box_the_whole_canvas(monkeypatch: pytest.MonkeyPatch, axis: int) -> None:
    """The global view is stretched over the picture, and its box must not take in the padding."""
    boxes = Layout.boxes

    def whole(layout: Layout, stride: int) -> list[list[float]]:
        return [[0, 0, layout.raster[0] / stride, layout.raster[1] / stride], *boxes(layout, stride)[1:]]

    monkeypatch.setattr(Layout, "boxes", whole)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    "plant",
    [shift_one_tile, swap_two_tiles, fit_the_raster_again, fit_raster_and_boxes_again, box_the_whole_canvas],
)
def test_planted_faults_are_found(plant, axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Fitted twice, these two end up 1 of 2 rows or columns elsewhere.
    size = (91, 250) if axis == 0 else (250, 91)
    processor = processor_of(NANO, "scaled")
    assert_aligned(processor, *size)
    plant(monkeypatch, axis)
    with pytest.raises(AssertionError, match=r"not where the geometry says|see different places"):
        assert_aligned(processor, *size)
