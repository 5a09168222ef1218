"""The shapes that are measured: four stages at two raster sizes, and what is varied around them.

G = 24, P = 1, D = H = 1024 unless a case says otherwise; an image is four tiles of a 2 x 2 canvas and a global view. At
768 pixels (the fixed rule) a tile is half the map; at 1536 (32/14 of the canvas) it has 192, 96, 48 and 24 cells. The
global view's box is the content rectangle of a 4:3 picture on the square canvas.

All images' tiles come before all global views, so that boxes of one size are neighbours: the order that suits eager
PyTorch best. The order makes no difference to this package.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from fila_kernels.call import Shape
from fila_kernels.testing import DIFFERENTIABLE

STAGE_WIDTHS = (192, 384, 768, 1536)
STAGE_STRIDES = (4, 8, 16, 32)
STAGES = (1, 2, 3, 4)
RASTERS = (768, 1536)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Content of a 1000 x 763 picture on a square canvas, as a part of the canvas's height.
CONTENT = (0.1187, 0.8813)


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes of one way to compute something."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Workload:
    """One stage at one raster size and dtype; the name lists the fields after `dtype` that are not the default."""

    raster: int
    stage: int
    dtype: str
    images: int = 1
    hidden_width: int = 1024
    token_width: int = 1024
    grid: int = 24
    prefix: int = 1
    views: int = 5  # of an image: four tiles and the global view, or 1, the global view alone
    frozen: bool = False  # features need no gradient, as in pre-training with a frozen ConvNeXt

    @property
    def name(self) -> str:
        letters = {"images": "b", "hidden_width": "h", "token_width": "d", "grid": "g", "prefix": "p", "views": "v"}
        varied = [
            f"-{letters[field.name]}{getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if field.name in letters and getattr(self, field.name) != field.default
        ]
        frozen = "-frozen" if self.frozen else ""
        return f"{self.raster}-stage{self.stage}-{self.dtype}{''.join(varied)}{frozen}"

    @property
    def side(self) -> int:
        return self.raster // STAGE_STRIDES[self.stage - 1]

    @property
    def channels(self) -> int:
        return STAGE_WIDTHS[self.stage - 1]

    @property
    def tiles(self) -> int:
        return self.images * self.views

    @property
    def samples(self) -> int:
        return self.tiles * self.grid**2

    @property
    def rows(self) -> int:
        """Rows of the products over whole tiles, prefix tokens included."""
        return self.tiles * (self.prefix + self.grid**2)

    @property
    def shape(self) -> Shape:
        """The sizes as the planner takes them."""
        return Shape(
            self.tiles, self.prefix, self.grid, self.token_width, self.hidden_width, self.channels, self.images,
            self.side, self.side,
        )  # fmt: skip

    @property
    def wanted(self) -> tuple[str, ...]:
        """Inputs that get a gradient."""
        return tuple(name for name in DIFFERENTIABLE if not (self.frozen and name == "features"))

    def boxes(self) -> Tensor:
        """[T, 4]: the tiles of a 2 x 2 canvas for every image, then every image's global view."""
        half = self.side // 2
        corners = [(row * half, column * half) for row in (0, 1) for column in (0, 1)]
        tiles = [[y, x, y + half, x + half] for y, x in corners] * (self.images if self.views > 1 else 0)
        view = [CONTENT[0] * self.side, 0, CONTENT[1] * self.side, self.side]
        return torch.tensor([*tiles, *([view] * self.images)], dtype=torch.float32)

    def image_index(self) -> Tensor:
        """[T] int64, in the order of `boxes`."""
        images = torch.arange(self.images)
        return torch.cat([images.repeat_interleave(self.views - 1), images])

    def inputs(self, seed: int = 0, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Random arguments of `cvfm` by name."""
        generator = torch.Generator(device).manual_seed(seed)
        dtype = DTYPES[self.dtype]

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device).mul_(scale).to(dtype)

        joint = self.token_width + self.channels
        return {
            "tokens": normal(self.tiles, self.prefix + self.grid**2, self.token_width),
            "features": normal(self.images, self.side, self.side, self.channels),
            "boxes": self.boxes().to(device),
            "image_index": self.image_index().to(device),
            "fc1_weight": normal(self.hidden_width, joint, scale=joint**-0.5),
            "fc1_bias": normal(self.hidden_width, scale=0.1),
            "fc2_weight": normal(self.token_width, self.hidden_width, scale=self.hidden_width**-0.5),
            "fc2_bias": normal(self.token_width, scale=0.1),
            "alpha": torch.tensor([0.5], dtype=dtype, device=device),
        }

    def input_bytes(self) -> int:
        """Memory of one set of inputs."""
        features = self.images * self.side**2 * self.channels
        return DTYPES[self.dtype].itemsize * (features + self.rows * self.token_width + self.parameters)

    @property
    def parameters(self) -> int:
        """Elements of the two weights."""
        return self.hidden_width * (2 * self.token_width + self.channels)

    @property
    def cells_read(self) -> int:
        """The most cells of the maps that the samples can read: four per sample, and no more than there are."""
        return min(self.images * self.side**2, 4 * self.samples)

    def work(self, passes: int = 1) -> Work:
        """The definition's forward GEMMs, and their least traffic: tokens in and out, cells read, the parameters."""
        elements = 2 * self.rows * self.token_width + self.cells_read * self.channels + self.parameters
        return Work(passes * 2 * self.samples * self.parameters, passes * DTYPES[self.dtype].itemsize * elements)


def _stages(**settings) -> tuple[Workload, ...]:
    return tuple(
        Workload(raster, stage, **({"dtype": "bfloat16"} | settings)) for raster in RASTERS for stage in STAGES
    )


def _ends(**settings) -> tuple[Workload, ...]:
    """The first and the last stage at 1536: the largest map and the widest."""
    return tuple(Workload(1536, stage, **({"dtype": "bfloat16", "images": 8} | settings)) for stage in (1, 4))


SUITES: dict[str, tuple[Workload, ...]] = {
    # bench/results/cvfm_cpu.csv.
    "cpu": tuple(
        Workload(raster, stage, dtype) for raster in RASTERS for stage in STAGES for dtype in ("float32", "bfloat16")
    ),
    # A second's work, for tests of the bench itself, and one of its workloads, for the rehearsal of `make gpu`.
    "tiny": tuple(Workload(64, stage, "float32", hidden_width=16, token_width=8, grid=2) for stage in (1, 4)),
    "rehearsal": (Workload(64, 1, "float32", hidden_width=16, token_width=8, grid=2),),
    # bfloat16, hidden 1024: the goals of docs/benchmarks.md are read from these three.
    "images-1": _stages(images=1),
    "images-8": _stages(images=8),
    "images-32": _stages(images=32),
    "hidden-4096-images-1": _stages(images=1, hidden_width=4096),
    "hidden-4096-images-8": _stages(images=8, hidden_width=4096),
    "hidden-4096-images-32": _stages(images=32, hidden_width=4096),
    # Widths at which the triton backend has the plan `single_pass`.
    "narrow": _stages(images=8, token_width=512, hidden_width=512),
    "float32": _ends(dtype="float32"),
    "float16": _ends(dtype="float16"),
    "widths": _ends(token_width=768, hidden_width=768) + _ends(token_width=1280, hidden_width=1280),
    "grids": _ends(grid=16) + _ends(grid=27),
    "no-prefix": _ends(prefix=0),
    "one-tile": _ends(images=1, views=1),
    "frozen": _ends(frozen=True),
}


def default_suite(device: torch.device) -> str:
    return "images-8" if device.type == "cuda" else "cpu"
