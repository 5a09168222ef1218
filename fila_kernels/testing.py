"""Holds the error bound and the case matrix that tests, bench and fuzz share.

A result is right if it is about as exact as eager PyTorch in the same dtype, judged in float64::

    max |found - exact| <= 2 (max(max |eager - exact|, rounding) + eps max |exact|)

`rounding` is what roundings on the way may add up to (`fila_kernels.rounding`): it counts where eager was lucky.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fila_kernels import reference, rounding

PARAMETERS = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "alpha")
DIFFERENTIABLE = ("tokens", "features", *PARAMETERS)
ARGUMENTS = ("tokens", "features", "boxes", "image_index", *PARAMETERS)
LAYOUTS = ("dense", "channels_first", "sliced", "expanded")
# The frozen arguments' name, and the gradients that are left.
FROZEN = {
    "nothing": DIFFERENTIABLE,
    "inputs": PARAMETERS,
    "parameters": ("tokens", "features"),
    "all but features": ("features",),
    "all but fc1_weight": ("fc1_weight",),
    "all but fc2_bias and alpha": ("fc2_bias", "alpha"),
}


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
    layout: str = "dense"  # of tokens, maps and weights: dense, permuted, channels_first, sliced, expanded
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
        elif self.layout == "channels_first":  # maps as a convolution leaves them
            features = maps.permute(0, 2, 3, 1)
        elif self.layout == "expanded":  # one tile's tokens for all, one line of cells for all maps
            tokens = tokens[:1].expand(tokens.shape)
            features = maps[:1, :, :1].expand(maps.shape).permute(0, 2, 3, 1)
            features = features.contiguous()[:1, :1].expand(features.shape)
        elif self.layout == "sliced":
            wide = tokens.new_full((self.tiles, length + 3, self.token_width + 5), float("nan"))
            wide[:, 2:-1, 3:-2] = tokens
            tokens = wide[:, 2:-1, 3:-2]
            larger = maps.new_full((self.images, self.height + 3, self.width + 2, self.feature_width), float("nan"))
            larger[:, 1:-2, :-2] = maps.permute(0, 2, 3, 1)
            features = larger[:, 1:-2, :-2]
        else:
            features = maps.permute(0, 2, 3, 1).contiguous()
        boxes = self.make_boxes(generator)
        image_index = torch.randint(0, max(self.images, 1), (self.tiles,), generator=generator)
        # Large inputs meet small weights: a GELU of 1e4 is a step, whose slope no dtype but float64 can place.
        weight, bias = (
            normal(self.hidden_width, joint, scale=joint**-0.5 / max(1.0, self.scale)),
            normal(self.hidden_width),
        )
        fc1 = self._laid_out(weight, bias)
        weight, bias = (
            normal(self.token_width, self.hidden_width, scale=self.hidden_width**-0.5),
            normal(self.token_width),
        )
        fc2 = self._laid_out(weight, bias)
        alpha = torch.tensor([self.alpha], dtype=dtype)
        return dict(zip(ARGUMENTS, (tokens, features, boxes, image_index, *fc1, *fc2, alpha), strict=True))

    def _laid_out(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's parameters: transposed in memory, between others, or one bias for all."""
        if self.layout == "channels_first":
            return weight.t().contiguous().t(), bias
        if self.layout == "sliced":
            wide = weight.new_full((weight.shape[0] + 1, weight.shape[1] + 5), float("nan"))
            wide[1:, 3:-2] = weight
            apart = torch.stack([bias, torch.full_like(bias, float("nan"))], 1)
            return wide[1:, 3:-2], apart[:, 0]
        return weight, bias[:1].expand(bias.shape) if self.layout == "expanded" else bias


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


def covering_pairs(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Few choices of one value per factor, among which every pair of values of any two factors occurs."""
    names = list(factors)
    missing = {
        (one, a, other, b)
        for one, other in itertools.combinations(names, 2)
        for a, b in itertools.product(range(len(factors[one])), range(len(factors[other])))
    }

    def pairs(chosen: Mapping[str, int]) -> set[tuple[str, int, str, int]]:
        given = [name for name in names if name in chosen]
        return {(one, chosen[one], other, chosen[other]) for one, other in itertools.combinations(given, 2)}

    found = []
    while missing:
        one, a, other, b = min(missing)
        chosen = {one: a, other: b}
        for name in names:
            if name not in chosen:
                gains = [len(pairs(chosen | {name: value}) & missing) for value in range(len(factors[name]))]
                chosen[name] = gains.index(max(gains))
        missing -= pairs(chosen)
        found.append({name: factors[name][chosen[name]] for name in names})
    return found


def refill(view: Tensor, values: Tensor) -> Tensor:
    """`view` with `values`, both of one shape; where the view names an element more than once, so do the values."""
    target = view
    for axis, stride in enumerate(view.stride()):
        if stride == 0 and view.shape[axis] > 1:
            target, values = target.narrow(axis, 0, 1), values.narrow(axis, 0, 1)
    target.copy_(values)
    return view


def ids(case: Case) -> str:
    """The name of a case, for pytest."""
    return case.name


def options(case: Case) -> dict[str, int]:
    """The settings of `cvfm` that a case's inputs go with."""
    return {"num_prefix_tokens": case.prefix}


def in_double(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Float tensors in float64, but for boxes, whose float32 is part of the definition."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() and name != "boxes" else value
        for name, value in inputs.items()
    }


def gradients(
    function: Callable[..., Tensor], inputs: Mapping[str, Tensor], grad: Tensor,
    wanted: tuple[str, ...] = DIFFERENTIABLE, **settings: Any,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The result of `function` and the gradients of the inputs named in `wanted`."""
    leaves = {
        name: tensor.detach().requires_grad_(name in wanted) if tensor.is_floating_point() else tensor
        for name, tensor in inputs.items()
    }
    out = function(**leaves, **settings)
    found = torch.autograd.grad(out, [leaves[name] for name in wanted], grad.to(out.dtype))
    return out.detach(), dict(zip(wanted, found, strict=True))


def bound(dtype: torch.dtype, eager_error: float, largest: float, rounding: float = 0.0) -> float:
    """The largest error that a result of `dtype` may have: 2 (max(eager_error, rounding) + eps largest).

    Twice, since two ways of summing one thing may err to opposite sides. Eager's error alone is fair where it is the
    largest of many elements' errors. Of a few it may be zero by chance: `rounding` then stands in. In large tensors it
    is about eager's error, and the bound what it would be without (tests/kernels/test_rounding.py).

    Args:
        eager_error: max |eager - exact|, eager PyTorch's in the same dtype.
        largest: max |exact|. In float64 itself, where eager is the definition, the bound is 1e-12 of it, or of 1.
        rounding: the error that roundings on the way may cause, as `fila_kernels.rounding` derives it.
    """
    if not math.isfinite(eager_error):
        return 0.0  # eager has nothing to say
    if dtype == torch.float64:
        return 1e-12 * max(largest, 1.0)
    return 2 * (max(eager_error, rounding) + torch.finfo(dtype).eps * largest)


def error_of(found: Tensor, exact: Tensor) -> float:
    """max |found - exact| in float64; infinite if an entry is NaN."""
    if exact.numel() == 0:
        return 0.0
    return float((found.detach().double() - exact.detach().double()).abs().max().nan_to_num(nan=float("inf")))


class Comparison(NamedTuple):
    """A result compared with the bound."""

    error: float
    bound: float
    worst: str  # where the error is largest, what was found there and what was expected

    @property
    def close(self) -> bool:
        return self.error <= self.bound


def compare(found: Tensor, exact: Tensor, eager: Tensor | float, rounding: float = 0.0) -> Comparison:
    """Hold `found` against `exact`, which is in float64.

    Args:
        eager: eager PyTorch's result in the dtype of `found`, or its error where that is known.
        rounding: as in `bound`.
    """
    if exact.numel() == 0:
        return Comparison(0.0, 0.0, "nowhere: it is empty")
    found, exact = found.detach(), exact.detach().double()
    errors = (found.double() - exact).abs().nan_to_num(nan=float("inf"))
    worst = int(errors.argmax())
    where = tuple(int(index) for index in torch.unravel_index(torch.tensor(worst), exact.shape))
    eager_error = eager if isinstance(eager, float) else error_of(eager, exact)
    allowed = bound(found.dtype, eager_error, float(exact.abs().max()), rounding)
    there = f"at {where}: got {float(found[where]):.8g}, expected {float(exact[where]):.8g}"
    return Comparison(float(errors.flatten()[worst]), allowed, there)


def assert_close(name: str, found: Tensor, exact: Tensor, eager: Tensor | float, rounding: float = 0.0) -> None:
    """Raise `AssertionError`, with the worst coordinates, unless `compare` finds the result within the bound."""
    assert found.shape == exact.shape, f"{name}: shape {list(found.shape)}, expected {list(exact.shape)}"
    if isinstance(eager, Tensor):
        assert found.dtype == eager.dtype, f"{name}: dtype {found.dtype}, expected {eager.dtype}"
    result = compare(found, exact, eager, rounding)
    assert result.close, f"{name}: error {result.error:.3e} above {result.bound:.3e} {result.worst}"


@dataclass(frozen=True)
class Expected:
    """What a call has to give, by name: exact values, eager PyTorch's, and the roundings that `bound` takes."""

    exact: Mapping[str, Tensor]
    eager: Mapping[str, Tensor]
    rounding: Mapping[str, float]

    def check(self, found: Mapping[str, Tensor]) -> None:
        """Raise `AssertionError` unless every tensor of `found` is within the bound."""
        for name, tensor in found.items():
            assert_close(name, tensor, self.exact[name], self.eager[name], self.rounding[name])


def expect_cvfm(
    inputs: Mapping[str, Tensor], grad: Tensor, wanted: tuple[str, ...] = DIFFERENTIABLE, **settings: Any
) -> Expected:
    """The result "out" of `cvfm` and its gradients; `settings` are those that the definition has.

    Tokens in float32 beside a rest of 16 bits are a call's under autocast.
    """

    def defined(arguments: Mapping[str, Tensor], upstream: Tensor) -> dict[str, Tensor]:
        out, found = gradients(reference.cvfm, arguments, upstream, wanted, **settings)
        return {"out": out} | found

    wide = in_double(inputs)
    roundings = rounding.of_cvfm(
        wide, inputs["fc1_weight"].dtype, grad, wanted, tokens_dtype=inputs["tokens"].dtype, **settings
    )
    return Expected(defined(wide, grad.double()), defined(inputs, grad), roundings)


def assert_wild_tile(out: Tensor, inputs: Mapping[str, Tensor]) -> None:
    """Tile 1 of three had a NaN box: its patch tokens are NaN, all else is finite, and a closed gate shows nothing."""
    if inputs["alpha"] == 0:
        assert torch.equal(out, inputs["tokens"])
    else:
        assert torch.isnan(out[1, 1:]).all()
        assert torch.isfinite(out[[0, 2]]).all()
        assert torch.equal(out[1, 0], inputs["tokens"][1, 0])
