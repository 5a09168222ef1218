"""The sizes of one call, and what the plans ask of them."""

from typing import NamedTuple

# Triton's single pass keeps one block of rows of the hidden activation within a multiprocessor.
SINGLE_PASS_WIDTH = 512


class Shape(NamedTuple):
    """Sizes of one call: T tiles, P prefix tokens, G grid side, D, H, C widths, B maps of h x w cells."""

    tiles: int
    prefix: int
    grid: int
    token_width: int
    hidden_width: int
    feature_width: int
    images: int
    height: int
    width: int

    @property
    def patches(self) -> int:
        return self.grid * self.grid

    @property
    def samples(self) -> int:
        return self.tiles * self.patches

    @property
    def cells(self) -> int:
        return self.images * self.height * self.width
