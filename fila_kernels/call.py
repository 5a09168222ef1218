"""Types of one call: sizes (`Shape`), the plan of each direction (`Plan`), a backend's arguments (`Call`, `Needs`).

The planner makes a `Plan`, the operators make a `Call` with it, and a backend reads both. A backend never asks for a
plan or a launch config.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

PLANS = ("sample_first", "project_first", "single_pass")
DIRECTIONS = ("forward", "weight_gradient", "feature_gradient")
GATES = ("product", "scale")

# Triton's single pass keeps a block of rows of the hidden activation on one multiprocessor.
TRITON_SINGLE_PASS_WIDTH = 512
# In CUDA they stay on a cluster of four; the kernel is written for one width and one compute capability.
NATIVE_SINGLE_PASS_WIDTH = 1024
NATIVE_SINGLE_PASS_CAPABILITY = (9, 0)


def grid_side(patches: int) -> int:
    """The side of a square grid of patch tokens.

    Raises:
        ValueError: the number is not a square.
    """
    side = math.isqrt(patches) if patches > 0 else 0
    if patches < 1 or side * side != patches:
        raise ValueError(f"tokens: expected a square number of patch tokens, got {patches}")
    return side


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

    @classmethod
    def of(
        cls, tokens: Sequence[int], features: Sequence[int], hidden_width: int | None = None, prefix: int = 1
    ) -> "Shape":
        """The shape of tokens [T, P + N, D] and features [B, h, w, C]; the hidden width is D if None.

        Raises:
            ValueError: N is not a square number.
        """
        tiles, length, token_width = tokens
        images, height, width, feature_width = features
        hidden_width = token_width if hidden_width is None else hidden_width
        grid = grid_side(length - prefix)
        return cls(tiles, prefix, grid, token_width, hidden_width, feature_width, images, height, width)

    @property
    def patches(self) -> int:
        """N, patch tokens per tile."""
        return self.grid * self.grid

    @property
    def samples(self) -> int:
        """T * N."""
        return self.tiles * self.patches

    @property
    def cells(self) -> int:
        """B * h * w."""
        return self.images * self.height * self.width

    @property
    def maps(self) -> tuple[int, int, int]:
        """B, h, w."""
        return self.images, self.height, self.width


class Measured:
    """Plain values that were measured on one device for one dtype: for a subject and its sizes, the nearest entry's.

    Subjects are kernels, whose values are launch configs, and the planner's own.
    """

    def __init__(self, entries: Iterable[tuple[str, Sequence[int], Mapping[str, Any]]] = ()) -> None:
        self._entries: dict[str, list[tuple[tuple[int, ...], dict[str, Any]]]] = {}
        self._found: dict[tuple[str, tuple[int, ...]], tuple[dict[str, Any], bool] | None] = {}
        for subject, sizes, values in entries:
            self._entries.setdefault(subject, []).append((tuple(sizes), dict(values)))

    def __len__(self) -> int:
        return sum(map(len, self._entries.values()))

    def nearest(self, subject: str, sizes: Sequence[int]) -> tuple[dict[str, Any], bool] | None:
        """The values of the nearest entry and whether its sizes are the very same; None beyond a factor of two."""
        if not self._entries:
            return None
        key = (subject, tuple(sizes))
        if key not in self._found:
            near = [(distance(sizes, at), values) for at, values in self._entries.get(subject, [])]
            away, values = min(near, key=lambda entry: entry[0], default=(math.inf, {}))
            self._found[key] = (values, away == 0) if away < math.inf else None
        return self._found[key]


def distance(left: Sequence[int], right: Sequence[int]) -> float:
    """The sum of the sizes' ratios in powers of two; infinite if one ratio is beyond a factor of two."""
    total = 0.0
    for a, b in zip(left, right, strict=True):
        apart = abs(math.log2(max(a, 1) / max(b, 1)))
        if apart > 1 or (a == 0) != (b == 0):
            return math.inf
        total += apart
    return total


UNMEASURED = Measured()


@dataclass(frozen=True)
class Plan:
    """A plan for each direction and why, the backend of each pass, and the device's measured launch configs.

    The backward pass is one call to one backend, whatever its two directions' plans.
    """

    forward: str
    weight_gradient: str
    feature_gradient: str
    reasons: Mapping[str, str]
    forward_backend: str = "eager"
    backward_backend: str = "eager"
    configs: Measured = UNMEASURED


class Needs(NamedTuple):
    """The gradients that a backward pass has to return."""

    tokens: bool
    features: bool
    fc1_weight: bool
    fc1_bias: bool
    fc2_weight: bool
    fc2_bias: bool
    alpha: bool

    @property
    def inner(self) -> bool:
        """Whether anything before the activation wants a gradient."""
        return self.tokens or self.features or self.fc1_weight or self.fc1_bias


class Call(NamedTuple):
    """The validated arguments of one call, their sizes and the plan.

    `features`, weights, biases and `alpha` share `dtype`, in which the products are computed. `tokens`, and with them
    the result and its gradient, may have another under autocast: the residual is added in the tokens' own dtype.
    """

    tokens: Tensor
    features: Tensor
    boxes: Tensor
    image_index: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor
    alpha: Tensor
    shape: Shape
    gate: str
    plan: Plan

    @property
    def dtype(self) -> torch.dtype:
        """The products' dtype."""
        return self.fc1_weight.dtype

    @property
    def mixed(self) -> bool:
        """Whether the tokens have a dtype of their own."""
        return self.tokens.dtype != self.dtype

    def row_operand(self) -> Tensor:
        """The tokens as fc1 multiplies them: themselves, or a dense copy in the products' dtype."""
        return self.tokens.to(self.dtype, memory_format=torch.contiguous_format) if self.mixed else self.tokens

    @property
    def weight_x(self) -> Tensor:
        """fc1's columns for the tokens, [H, D]."""
        return self.fc1_weight[:, : self.shape.token_width]

    @property
    def weight_s(self) -> Tensor:
        """fc1's columns for the sampled features, [H, C]."""
        return self.fc1_weight[:, self.shape.token_width :]
