"""Places every part of an image: canvas, content rectangle, tiles, high-resolution raster, boxes and token count.

The image processor, which draws, and the model, which crops, both use this module, so the two cannot drift apart.

There are three frames of coordinates. Each is (y, x) with the origin at the upper left corner; integers are edges of
pixels or cells:

    image    pixels of the picture as it came
    canvas   pixels of the canvas that the picture is fitted on; a tile has `tile` canvas pixels per side
    raster   pixels of the high-resolution raster that the ConvNeXt reads; a map of stride s has cells of s pixels

The *content rectangle* says where the picture lies on the canvas, in integer canvas pixels. It is the one source of
alignment: the raster's content is that rectangle times the scale, never a second fit of the picture.

Source: FILA (arXiv 2412.08378), section 3; canvas choice, fit and token order are LLaVA-NeXT's, as implemented in
`transformers.models.llava_next`.
"""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from numbers import Integral
from typing import Literal

HighResRule = Literal["scaled", "fixed", "direct"]
HIGH_RES_RULES = ("scaled", "fixed", "direct")
LLAVA_NEXT_CANVASES = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


@dataclass(frozen=True)
class Rect:
    """A rectangle [y0, y1) x [x0, x1), in the units its owner names."""

    y0: float
    x0: float
    y1: float
    x1: float

    @property
    def height(self) -> float:
        return self.y1 - self.y0

    @property
    def width(self) -> float:
        return self.x1 - self.x0

    def scaled(self, sy: float, sx: float) -> "Rect":
        return Rect(self.y0 * sy, self.x0 * sx, self.y1 * sy, self.x1 * sx)

    def rounded(self) -> "Rect":
        """Each edge to the nearest integer, halves up (Python's own `round` would send them to even numbers)."""
        return Rect(*(math.floor(edge + 0.5) for edge in (self.y0, self.x0, self.y1, self.x1)))


@dataclass(frozen=True)
class Geometry:
    """The constants that every layout follows from.

    Args:
        tile: side of a tile and of the global view, canvas pixels. A multiple of `patch`.
        patch: side of a ViT patch, canvas pixels.
        stride: stride of the ConvNeXt's last stage, raster pixels.
        canvases: allowed canvases, (height, width) in canvas pixels, each a multiple of `tile`.
        rule: how the high-resolution raster is made.
            "scaled": the canvas times `stride / patch`, so that a cell of the last stage lies on a ViT patch.
            "fixed": the canvas mapped to `fixed_size` x `fixed_size`, each axis on its own scale.
            "direct": no cropping at all; the picture is stretched to one tile and to `fixed_size` x `fixed_size`.
        fixed_size: side of the raster of the rules "fixed" and "direct", raster pixels.

    Raises:
        ValueError: if the numbers do not fit together.
    """

    tile: int = 336
    patch: int = 14
    stride: int = 32
    canvases: tuple[tuple[int, int], ...] = LLAVA_NEXT_CANVASES
    rule: HighResRule = "scaled"
    fixed_size: int = 768

    def __post_init__(self) -> None:
        sides = [side for canvas in self.canvases for side in canvas]
        if not all(isinstance(n, Integral) for n in (self.tile, self.patch, self.stride, self.fixed_size, *sides)):
            raise ValueError(f"expected a geometry in whole numbers, got {self!r}")
        object.__setattr__(self, "canvases", tuple((int(h), int(w)) for h, w in self.canvases))
        if self.patch <= 0 or self.tile <= 0 or self.tile % self.patch:
            raise ValueError(f"tile must be a positive multiple of patch, got tile {self.tile}, patch {self.patch}")
        if self.rule not in HIGH_RES_RULES:
            raise ValueError(f"high_res_rule must be one of {', '.join(HIGH_RES_RULES)}, got {self.rule!r}")
        if self.stride <= 0 or self.fixed_size <= 0 or self.fixed_size % self.stride:
            raise ValueError(
                f"fixed_size must be a positive multiple of the ConvNeXt's stride {self.stride}, got {self.fixed_size}"
            )
        if not self.canvases:
            raise ValueError("expected at least one canvas, got none")
        for height, width in self.canvases:
            if height <= 0 or width <= 0 or height % self.tile or width % self.tile:
                raise ValueError(f"a canvas must be a multiple of the tile ({self.tile}), got {height}x{width}")

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.tile // self.patch

    def layout(self, height: int, width: int) -> "Layout":
        """The layout of a picture of `height` x `width` image pixels."""
        height, width = int(height), int(width)
        if height < 1 or width < 1:
            raise ValueError(f"expected a picture of at least 1x1 pixels, got {height}x{width}")
        if self.rule == "direct":
            canvas = (self.tile, self.tile)
            return Layout(self, height, width, canvas, Rect(0, 0, *canvas))
        canvas = select_canvas(height, width, self.canvases)
        return Layout(self, height, width, canvas, fit(height, width, canvas))


@lru_cache(maxsize=64, typed=True)
def shared_geometry(
    tile: int, patch: int, stride: int, canvases: tuple[tuple[int, int], ...], rule: HighResRule, fixed_size: int
) -> Geometry:
    """The process's one `Geometry` of these values: configuration and image processor look it up for every picture."""
    return Geometry(tile, patch, stride, canvases, rule, fixed_size)


@dataclass(frozen=True)
class Layout:
    """Everything that follows from a `Geometry` and one picture's size.

    Views are ordered as the ViT reads them: the global view first, then the tiles row by row.
    """

    geometry: Geometry
    height: int
    width: int
    canvas: tuple[int, int]
    content: Rect

    @property
    def rows(self) -> int:
        """Tiles down the canvas; 0 under the rule "direct", which has no tiles."""
        return 0 if self.geometry.rule == "direct" else self.canvas[0] // self.geometry.tile

    @property
    def columns(self) -> int:
        """Tiles across the canvas; 0 under the rule "direct"."""
        return 0 if self.geometry.rule == "direct" else self.canvas[1] // self.geometry.tile

    @property
    def num_views(self) -> int:
        """Views the ViT encodes: the global view and every tile."""
        return 1 + self.rows * self.columns

    @cached_property
    def tiles(self) -> tuple[Rect, ...]:
        """Each tile's rectangle in canvas pixels, row by row."""
        side = self.geometry.tile
        return tuple(
            Rect(r * side, c * side, (r + 1) * side, (c + 1) * side)
            for r in range(self.rows)
            for c in range(self.columns)
        )

    @cached_property
    def raster(self) -> tuple[int, int]:
        """Height and width of the high-resolution raster, raster pixels."""
        g = self.geometry
        if g.rule == "scaled":
            return self.canvas[0] // g.patch * g.stride, self.canvas[1] // g.patch * g.stride
        return g.fixed_size, g.fixed_size

    @property
    def scale(self) -> tuple[float, float]:
        """Raster pixels per canvas pixel along y and x."""
        return self.raster[0] / self.canvas[0], self.raster[1] / self.canvas[1]

    @cached_property
    def raster_content(self) -> Rect:
        """Where the picture lies on the raster: the content rectangle times the scale, edges rounded; never empty."""
        exact = self.content.scaled(*self.scale).rounded()
        return Rect(exact.y0, exact.x0, max(exact.y1, exact.y0 + 1), max(exact.x1, exact.x0 + 1))

    def boxes(self, stride: int) -> list[list[float]]:
        """The region of every view on a feature map of the given stride.

        Args:
            stride: raster pixels per cell of the map.

        Returns:
            One [y0, x0, y1, x1] per view, in cells (cell i spans [i, i + 1)). Tiles of the rule "scaled" fall on whole
            cells at every stage; the global view's box is the content rectangle and may be fractional.
        """
        (height, width), (canvas_height, canvas_width) = self.raster, self.canvas
        # Multiplied before divided, so that an edge on a whole cell comes out as that integer.
        dy, dx = canvas_height * stride, canvas_width * stride
        return [
            [r.y0 * height / dy, r.x0 * width / dx, r.y1 * height / dy, r.x1 * width / dx]
            for r in (self.content, *self.tiles)
        ]

    @cached_property
    def token_rows(self) -> tuple[int, int]:
        """Rows and columns of tile tokens left after LLaVA-NeXT's unpadding; (0, 0) under the rule "direct".

        Follows `unpad_image` of transformers to the letter, on the token grid. Of a very long picture no tile token may
        be left (0 rows, or 0 columns).
        """
        rows, columns = self.rows * self.geometry.grid, self.columns * self.geometry.grid
        if not rows:
            return 0, 0
        if self.width / self.height > columns / rows:
            kept = int(round(self.height * (columns / self.width), 7))
            return rows - 2 * ((rows - kept) // 2), columns
        kept = int(round(self.width * (rows / self.height), 7))
        return rows, columns - 2 * ((columns - kept) // 2)

    @property
    def num_tokens(self) -> int:
        """Embeddings the language model receives for this picture, newlines included.

        Global view, then the unpadded tile tokens with one newline a row; under "direct" the one view and one newline.
        """
        base = self.geometry.grid**2
        if not self.rows:
            return base + 1
        rows, columns = self.token_rows
        return base + rows * (columns + 1)

    @property
    def tiles_reach_llm(self) -> bool:
        """Whether any tile token is left after unpadding."""
        rows, columns = self.token_rows
        return rows * columns > 0


def select_canvas(height: int, width: int, canvases: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The canvas that keeps most of the picture's resolution and, among equals, wastes least.

    Same rule as `transformers.image_processing_utils.select_best_resolution`, restated here because the geometry must
    import without the model library; a test compares the two.
    """
    best, best_effective, best_wasted = canvases[0], -1, math.inf
    for canvas_height, canvas_width in canvases:
        scale = min(canvas_width / width, canvas_height / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        wasted = canvas_height * canvas_width - effective
        if effective > best_effective or (effective == best_effective and wasted < best_wasted):
            best, best_effective, best_wasted = (canvas_height, canvas_width), effective, wasted
    return best


def fit(height: int, width: int, canvas: tuple[int, int]) -> Rect:
    """The content rectangle: the picture fitted into the canvas, aspect ratio kept, centred, on integer pixels."""
    scale_y, scale_x = canvas[0] / height, canvas[1] / width
    if scale_x < scale_y:
        new_height, new_width = min(math.ceil(height * scale_x), canvas[0]), canvas[1]
    else:
        new_height, new_width = canvas[0], min(math.ceil(width * scale_y), canvas[1])
    y0, x0 = (canvas[0] - new_height) // 2, (canvas[1] - new_width) // 2
    return Rect(y0, x0, y0 + new_height, x0 + new_width)
