"""The real shapes: four stages at two raster sizes, one image of four tiles and a global view.

D = H = 1024, G = 24, P = 1. At 768 pixels (the fixed rule) a tile is half the map, at 1536 (32/14 of the canvas) it has
192, 96, 48 and 24 cells. The global view's box is the content rectangle of a 4:3 picture on the square canvas.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

TOKEN_WIDTH = HIDDEN_WIDTH = 1024
GRID = 24
TILES = 5
STAGE_WIDTHS = (192, 384, 768, 1536)
STAGE_STRIDES = (4, 8, 16, 32)
RASTERS = (768, 1536)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Content of a 1000 x 763 picture on a square canvas, as a part of the canvas's height.
CONTENT = (0.1187, 0.8813)


@dataclass(frozen=True)
class Case:
    """One stage at one raster size and dtype."""

    raster: int
    stage: int
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.raster}-stage{self.stage}-{self.dtype}"

    @property
    def side(self) -> int:
        return self.raster // STAGE_STRIDES[self.stage - 1]

    @property
    def channels(self) -> int:
        return STAGE_WIDTHS[self.stage - 1]

    def boxes(self) -> Tensor:
        """[5, 4]: the tiles of a 2 x 2 canvas, then the global view."""
        half = self.side // 2
        corners = [(row * half, column * half) for row in (0, 1) for column in (0, 1)]
        tiles = [[y, x, y + half, x + half] for y, x in corners]
        return torch.tensor([*tiles, [CONTENT[0] * self.side, 0, CONTENT[1] * self.side, self.side]])

    def inputs(self, seed: int = 0) -> dict[str, Tensor]:
        """Arguments of `cvfm` by name, features being a permuted channels_last map."""
        generator = torch.Generator().manual_seed(seed)
        dtype = DTYPES[self.dtype]

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(dtype)

        joint = TOKEN_WIDTH + self.channels
        return {
            "tokens": normal(TILES, 1 + GRID * GRID, TOKEN_WIDTH),
            "features": normal(1, self.side, self.side, self.channels),
            "boxes": self.boxes(),
            "image_index": torch.zeros(TILES, dtype=torch.int64),
            "fc1_weight": normal(HIDDEN_WIDTH, joint, scale=joint**-0.5),
            "fc1_bias": normal(HIDDEN_WIDTH, scale=0.1),
            "fc2_weight": normal(TOKEN_WIDTH, HIDDEN_WIDTH, scale=HIDDEN_WIDTH**-0.5),
            "fc2_bias": normal(TOKEN_WIDTH, scale=0.1),
            "alpha": torch.tensor([0.5], dtype=dtype),
        }

    def flops(self) -> int:
        """Floating point operations of the definition's forward GEMMs."""
        rows = TILES * GRID * GRID
        return 2 * rows * HIDDEN_WIDTH * (TOKEN_WIDTH + self.channels) + 2 * rows * HIDDEN_WIDTH * TOKEN_WIDTH

    def bytes(self) -> int:
        """Least traffic of the forward pass: tokens in and out, the cells that are read, the parameters."""
        size = DTYPES[self.dtype].itemsize
        rows = TILES * (1 + GRID * GRID)
        cells = min(self.side**2, 4 * TILES * GRID * GRID)
        parameters = HIDDEN_WIDTH * (2 * TOKEN_WIDTH + self.channels)
        return size * (2 * rows * TOKEN_WIDTH + cells * self.channels + parameters)


CASES = [Case(raster, stage, dtype) for raster in RASTERS for stage in (1, 2, 3, 4) for dtype in DTYPES]
