"""The case matrix that every operation is tested on, and the comparison that every test uses."""

from dataclasses import dataclass

import torch
from torch import Tensor

PARAMETERS = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "alpha")
DIFFERENTIABLE = ("tokens", "features", *PARAMETERS)


@dataclass(frozen=True)
class Case:
    """Sizes, where the boxes lie, and how the inputs are laid out in memory."""

    name: str
    tiles: int = 3
    prefix: int = 1
    grid: int = 4
    token_width: int = 8
    hidden_width: int = 12
    feature_width: int = 6
    images: int = 2
    height: int = 10
    width: int = 12
    boxes: str = "fractional"  # whole, fractional, overlapping, border, small, identity
    layout: str = "dense"  # dense, permuted, sliced
    alpha: float = 0.7
    scale: float = 1.0

    def make_boxes(self, generator: torch.Generator) -> Tensor:
        sides = torch.tensor([self.height, self.width], dtype=torch.float64)
        count = (self.tiles, 2)
        if self.boxes == "identity":
            start = torch.zeros(count, dtype=torch.float64)
            end = start + self.grid
        elif self.boxes == "whole":
            start = (torch.rand(count, generator=generator) * (sides - 1)).floor()
            end = start + 1 + (torch.rand(count, generator=generator) * (sides - start - 1)).round()
        elif self.boxes == "overlapping":
            start = torch.rand(count, generator=generator) * 2
            end = sides - torch.rand(count, generator=generator) * 2
        elif self.boxes == "border":
            start = torch.rand(count, generator=generator) * sides * 2 - sides
            end = start + sides * 0.9
        elif self.boxes == "small":
            start = torch.rand(count, generator=generator) * (sides - 1)
            end = start + 0.1 + torch.rand(count, generator=generator) * 0.8
        else:
            start = torch.rand(count, generator=generator) * sides * 0.6
            end = start + 1 + torch.rand(count, generator=generator) * (sides - start - 1)
        return torch.cat([start, end], dim=1).float()

    def inputs(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
        """Arguments of `cvfm` by name. The values are the same for every dtype, up to its rounding."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

        joint = self.token_width + self.feature_width
        length = self.prefix + self.grid**2
        tokens = normal(self.tiles, length, self.token_width, scale=self.scale)
        maps = normal(self.images, self.feature_width, self.height, self.width, scale=self.scale)
        if self.layout == "permuted":
            tokens = tokens.transpose(0, 1).contiguous().transpose(0, 1)
            features = maps.to(memory_format=torch.channels_last).permute(0, 2, 3, 1)
        elif self.layout == "sliced":
            wide = tokens.new_full((self.tiles, length + 3, self.token_width + 5), float("nan"))
            wide[:, 2:-1, 3:-2] = tokens
            tokens = wide[:, 2:-1, 3:-2]
            larger = maps.new_full((self.images, self.height + 3, self.width + 2, self.feature_width), float("nan"))
            larger[:, 1:-2, :-2] = maps.permute(0, 2, 3, 1)
            features = larger[:, 1:-2, :-2]
        else:
            features = maps.permute(0, 2, 3, 1).contiguous()
        return {
            "tokens": tokens,
            "features": features,
            "boxes": self.make_boxes(generator),
            "image_index": torch.randint(0, max(self.images, 1), (self.tiles,), generator=generator),
            # Large inputs meet small weights: a GELU of 1e4 is a step, whose slope no dtype but float64 can place.
            "fc1_weight": normal(self.hidden_width, joint, scale=joint**-0.5 / max(1.0, self.scale)),
            "fc1_bias": normal(self.hidden_width),
            "fc2_weight": normal(self.token_width, self.hidden_width, scale=self.hidden_width**-0.5),
            "fc2_bias": normal(self.token_width),
            "alpha": torch.tensor([self.alpha], dtype=dtype),
        }


CASES = (
    Case("plain"),
    Case("odd", tiles=5, prefix=3, grid=5, token_width=7, hidden_width=13, feature_width=3, height=9, width=17),
    Case("no_prefix", prefix=0),
    Case("one_tile", tiles=1, images=1),
    Case("one_token", grid=1, boxes="overlapping"),
    Case("one_cell", images=1, height=1, width=1, boxes="border"),
    Case("many_images", tiles=9, images=7, boxes="whole"),
    # Enough tiles for several chunks of rows, of which the last is not full. The widths are past those for which BLAS
    # has special kernels, whose longer sums round differently for 8 columns (ours) than for 14 (eager's).
    Case(
        "many_tiles",
        tiles=37,
        grid=8,
        images=2,
        boxes="whole",
        token_width=48,
        hidden_width=64,
        feature_width=32,
    ),
    Case("whole", boxes="whole"),
    Case("identity", boxes="identity"),
    Case("overlapping", tiles=6, images=1, boxes="overlapping"),
    Case("border", tiles=8, boxes="border"),
    Case("small_boxes", tiles=8, boxes="small"),
    Case("large_map", images=1, height=90, width=70, boxes="fractional"),
    Case("permuted", layout="permuted"),
    Case("sliced", layout="sliced"),
    Case("closed_gate", alpha=0.0),
    Case("negative_gate", alpha=-1.5),
    Case("tiny", scale=1e-6),
    Case("large", scale=1e4),
    Case("slight_gate", alpha=1e-4, scale=1e-3),
    Case("empty", tiles=0),
)
REAL = Case(
    "real", tiles=5, grid=24, token_width=1024, hidden_width=1024, feature_width=1536, images=1, height=24, width=24,
    boxes="whole", alpha=0.5,
)  # fmt: skip


def ids(case: Case) -> str:
    return case.name


def options(case: Case) -> dict[str, int]:
    return {"num_prefix_tokens": case.prefix}


def gradients(function, inputs: dict[str, Tensor], grad: Tensor, wanted=DIFFERENTIABLE, **settings):
    """The result of `function` and the gradients of the inputs named in `wanted`."""
    leaves = {
        name: tensor.detach().requires_grad_(name in wanted) if tensor.is_floating_point() else tensor
        for name, tensor in inputs.items()
    }
    out = function(**leaves, **settings)
    found = torch.autograd.grad(out, [leaves[name] for name in wanted], grad.to(out.dtype))
    return out.detach(), dict(zip(wanted, found, strict=True))


def assert_close(name: str, found: Tensor, exact: Tensor, eager: Tensor, largest: Tensor | None = None) -> None:
    """|found - exact| <= 2 (max |eager - exact| + eps max |exact|), `exact` in float64, `eager` in `found`'s dtype.

    In float64 itself, where eager is the definition, the bound is 1e-12 of the largest value, or of 1. `largest` stands
    in for max |exact| where the result is one sum that may cancel: it is then the size of the sum's terms.
    """
    assert found.shape == exact.shape, f"{name}: shape {list(found.shape)}, expected {list(exact.shape)}"
    assert found.dtype == eager.dtype, f"{name}: dtype {found.dtype}, expected {eager.dtype}"
    if exact.numel() == 0:
        return
    exact = exact.double()
    error = (found.double() - exact).abs()
    worst = int(error.nan_to_num(nan=float("inf")).argmax())
    where = tuple(int(index) for index in torch.unravel_index(torch.tensor(worst), exact.shape))
    largest = exact.abs().max() if largest is None else largest
    if found.dtype == torch.float64:
        bound = 1e-12 * largest.clamp(min=1)
    else:
        bound = 2 * ((eager.double() - exact).abs().max() + torch.finfo(found.dtype).eps * largest)
    assert bool(error.flatten()[worst] <= bound), (
        f"{name}: error {float(error.flatten()[worst]):.3e} above {float(bound):.3e} at {where}: "
        f"got {float(found[where]):.8g}, expected {float(exact[where]):.8g}"
    )


def assert_wild_tile(out: Tensor, inputs: dict[str, Tensor]) -> None:
    """Tile 1 of three had a NaN box: its patch tokens are NaN, all else is finite, and a closed gate shows nothing."""
    if inputs["alpha"] == 0:
        assert torch.equal(out, inputs["tokens"])
    else:
        assert torch.isnan(out[1, 1:]).all()
        assert torch.isfinite(out[[0, 2]]).all()
        assert torch.equal(out[1, 0], inputs["tokens"][1, 0])
