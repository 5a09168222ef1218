"""Predicts the roundings of one call, in float64: what the error bound of `testing` holds in tensors of few elements.

Eager PyTorch's own error is one draw of a random number. The largest of many draws is a good measure of it; that of a
few may be zero by chance, where another order of the same sums is not exact. A prediction has no luck:

- Each stored tensor is rounded to its dtype: independent errors, of eps times its elements at most (u = eps / 2 to the
  nearest, so that an error counted as eps is 3.5 standard deviations of a uniform one, and the bound's twice that 7).
- A sum of n products is accumulated in float32 (float64 in float64): its n partial sums are rounded, which together is
  sqrt((n + 1) / 2) eps times the root of the sum of its terms' squares. Terms count, not the sum, which may cancel.
  Long sums are made of about sqrt(n) partial sums of as many terms, in one library or another: 2 sqrt(n) in n's place.
- An error goes on through the slope of what follows, and errors of different origin add by their squares.

That is first-order, probabilistic error analysis: Higham and Mary, "A new approach to probabilistic rounding error
analysis", SIAM J. Sci. Comput. 41 (2019), where roundings of mean zero replace n u by the square root of n times u.
Stored tensors are those of any plan, kept or recomputed: S or P and R(P), Z, A, M, the result; dM, dA, dZ, dS or dP.

T tiles, N patch tokens per tile; widths D, C, H; rows are T * N. Letters as in `reference` and `backends.products`.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fila_kernels import reference
from fila_kernels.call import grid_side


@dataclass(frozen=True)
class Rounded:
    """A tensor in float64 and the squares of its elements' errors."""

    value: Tensor
    square: Tensor

    @classmethod
    def exact(cls, value: Tensor) -> "Rounded":
        return cls(value, torch.zeros_like(value))

    @property
    def t(self) -> "Rounded":
        return Rounded(self.value.t(), self.square.t())

    def scaled(self, factor: Tensor | float) -> "Rounded":
        return Rounded(self.value * factor, self.square * factor**2)

    def plus(self, other: "Rounded") -> "Rounded":
        return Rounded(self.value + other.value, self.square + other.square)

    def times(self, other: "Rounded") -> "Rounded":
        return Rounded(self.value * other.value, self.square * other.value**2 + self.value**2 * other.square)

    def through(self, function: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor]) -> "Rounded":
        """The function of it; its slope is the steepest within one error, since errors need not be small."""
        error = self.square.sqrt()
        steepest = torch.stack([slope(self.value + step * error).abs() for step in (-1, 0, 1)]).amax(0)
        return Rounded(function(self.value), self.square * steepest**2)

    @property
    def largest(self) -> float:
        """The largest error of an element."""
        return math.sqrt(float(self.square.max())) if self.square.numel() else 0.0


def gelu(z: Tensor) -> Tensor:
    return torch.nn.functional.gelu(z)


def gelu_slope(z: Tensor) -> Tensor:
    return torch.special.ndtr(z) + z * _density(z)


def _gelu_curvature(z: Tensor) -> Tensor:
    return _density(z) * (2 - z**2)


def _density(z: Tensor) -> Tensor:
    return torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)


def _tanh_slope(u: Tensor) -> Tensor:
    return 1 - torch.tanh(u) ** 2


def _tanh_curvature(u: Tensor) -> Tensor:
    return -2 * torch.tanh(u) * _tanh_slope(u)


class Roundings:
    """The roundings of operations whose tensors are stored in `dtype`."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.eps = torch.finfo(dtype).eps
        self.accumulated = torch.finfo(torch.promote_types(dtype, torch.float32)).eps

    def stored(self, x: Rounded, eps: float | None = None) -> Rounded:
        return Rounded(x.value, x.square + ((self.eps if eps is None else eps) * x.value) ** 2)

    def _partial_sums(self, depth: float) -> float:
        return self.accumulated**2 * (min(depth, 2 * depth**0.5) + 1) / 2

    def product(self, a: Rounded, b: Rounded) -> Rounded:
        """a b, before it is stored."""
        a_2, b_2 = a.value**2, b.value**2
        summed = self._partial_sums(a.value.shape[-1]) * (a_2 @ b_2)
        return Rounded(a.value @ b.value, a.square @ b_2 + a_2 @ b.square + summed)

    def linear(self, x: Rounded, weight: Tensor, bias: Tensor) -> Rounded:
        """x weight' + bias, before it is stored."""
        ones = Rounded.exact(torch.ones_like(x.value[..., :1]))
        joined = Rounded(torch.cat([x.value, ones.value], -1), torch.cat([x.square, ones.square], -1))
        return self.product(joined, Rounded.exact(torch.cat([weight, bias[:, None]], 1).t()))

    def total(self, x: Rounded, *axes: int) -> Rounded:
        """The sum over axes, before it is stored."""
        axes = axes or tuple(range(x.value.dim()))
        depth = math.prod(x.value.shape[axis] for axis in axes)
        return Rounded(x.value.sum(axes), (x.square + self._partial_sums(depth) * x.value**2).sum(axes))

    def sampled(self, features: Rounded, boxes: Tensor, image_index: Tensor, size: int) -> Rounded:
        """S [T, size, size, C], stored. Taps' weights are at most 1, and two of them are rounded and multiplied."""

        def sample(maps: Tensor) -> Tensor:
            return reference.crop_resize(maps, boxes, image_index, size)

        terms = sample(features.value**2) * (2 * self.accumulated) ** 2
        return self.stored(Rounded(sample(features.value), sample(features.square) + terms))

    def gathered(self, grad: Rounded, boxes: Tensor, image_index: Tensor, maps: tuple[int, int, int]) -> Rounded:
        """The transpose, [T, G, G, W] to [B, h, w, W], stored."""
        leaf = grad.value.new_zeros(*maps, grad.value.shape[3])

        def gather(rows: Tensor) -> Tensor:
            with torch.enable_grad():
                cells = leaf.detach().requires_grad_()
                samples = reference.crop_resize(cells, boxes, image_index, rows.shape[1])
            return torch.autograd.grad(samples, cells, rows)[0]

        depth = (
            float(gather(torch.ones_like(grad.value[..., :1]).expand(grad.value.shape)).max()) if leaf.numel() else 0
        )
        terms = grad.value**2 * (self._partial_sums(depth) + (2 * self.accumulated) ** 2)
        return self.stored(Rounded(gather(grad.value), gather(grad.square + terms)))

    def gate_backward(self, grad: Rounded, m: Rounded, alpha: Tensor) -> tuple[Rounded, Rounded]:
        """dM of the product gate, stored, and alpha's gradient."""
        slope = self.stored(m.scaled(alpha), self.accumulated).through(_tanh_slope, _tanh_curvature)
        branch_grad = self.stored(slope.times(grad).scaled(alpha))
        # The slope by M of tanh(alpha M) M: its factors' errors are one error.
        by_m = slope.value + alpha * m.value * _tanh_curvature(alpha * m.value)
        terms = Rounded(
            slope.value * grad.value * m.value,
            (grad.value * by_m) ** 2 * m.square + (slope.value * m.value) ** 2 * grad.square,
        )
        return branch_grad, self.stored(self.total(self.stored(terms)))


@torch.no_grad()
def of_crop_resize(
    features: Tensor, boxes: Tensor, image_index: Tensor, size: int, dtype: torch.dtype, grad: Tensor | None = None
) -> dict[str, float]:
    """The largest error of `crop_resize` by name: "out" and, with `grad`, "features"; tensors in float64."""
    roundings = Roundings(dtype)
    found = {"out": roundings.sampled(Rounded.exact(features), boxes, image_index, size).largest}
    if grad is not None:
        maps = tuple(features.shape[:3])
        found["features"] = roundings.gathered(Rounded.exact(grad), boxes, image_index, maps).largest  # type: ignore[arg-type]
    return found


@torch.no_grad()
def of_gate_backward(grad: Tensor, branch: Tensor, alpha: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """The largest error of the product gate's backward pass: "branch" and "alpha"; tensors in float64."""
    exact = Rounded.exact
    branch_grad, alpha_grad = Roundings(dtype).gate_backward(exact(grad), exact(branch), alpha)
    return {"branch": branch_grad.largest, "alpha": alpha_grad.largest}


@torch.no_grad()
def of_cvfm(
    wide: Mapping[str, Any],
    dtype: torch.dtype,
    grad: Tensor | None = None,
    wanted: Collection[str] = (),
    *,
    gate: str = "product",
    num_prefix_tokens: int = 1,
    tokens_dtype: torch.dtype | None = None,
) -> dict[str, float]:
    """The largest error by name: "out", "hidden" (Z), "branch" (M), and the gradients named in `wanted`.

    Args:
        wide: the arguments of `cvfm` in float64. dtype: the products'.
        grad: dY, in float64, for the gradients.
        tokens_dtype: of the residual, where it has one of its own.
    """
    r = Roundings(dtype)
    residual_eps = torch.finfo(tokens_dtype or dtype).eps
    mixed = tokens_dtype not in (None, dtype)
    prefix, alpha = num_prefix_tokens, wide["alpha"]
    patches = wide["tokens"][:, prefix:]
    size, width = grid_side(patches.shape[1]), patches.shape[2]
    maps = tuple(wide["features"].shape[:3])
    sampling = wide["boxes"], wide["image_index"]
    weight_x, weight_s = wide["fc1_weight"][:, :width], wide["fc1_weight"][:, width:]
    exact = Rounded.exact

    def multiplied(rows: Tensor) -> Rounded:
        """Tokens or their gradient as the products read them."""
        return r.stored(exact(rows)) if mixed else exact(rows)

    x = multiplied(patches.flatten(0, 1))
    features = exact(wide["features"])
    s = r.sampled(features, *sampling, size)
    samples = Rounded(s.value.flatten(0, 2), s.square.flatten(0, 2))
    joined = Rounded(torch.cat([x.value, samples.value], 1), torch.cat([x.square, samples.square], 1))
    z = r.linear(joined, wide["fc1_weight"], wide["fc1_bias"])
    projected = r.sampled(r.stored(r.linear(features, weight_s, wide["fc1_bias"])), *sampling, size)
    z = r.stored(Rounded(z.value, z.square + projected.square.flatten(0, 2)))
    a = r.stored(z.through(gelu, gelu_slope))
    m = r.stored(r.linear(a, wide["fc2_weight"], wide["fc2_bias"]))
    if gate == "product":
        gated = r.stored(m.scaled(alpha), r.accumulated).through(torch.tanh, _tanh_slope)
    else:
        gated = m.scaled(torch.tanh(alpha))
    out = Rounded(patches.flatten(0, 1), torch.zeros_like(gated.square)).plus(r.stored(gated))
    found = {"out": r.stored(out, residual_eps).largest, "hidden": z.largest, "branch": m.largest}
    if grad is None:
        return found

    dy = multiplied(grad[:, prefix:].flatten(0, 1).double())
    weight_2, factor = exact(wide["fc2_weight"]), torch.tanh(alpha)
    if gate == "product":
        dm, alpha_grad = r.gate_backward(dy, m, alpha)
        da = r.stored(r.product(dm, weight_2))
    else:
        # sum dY M = sum (dY W2) A + sum dY b2, whichever of both is computed.
        dm = r.stored(dy.scaled(factor))
        da = r.stored(r.product(dy, weight_2))
        terms = r.stored(r.total(dy, 0)).times(exact(wide["fc2_bias"]))
        sums = r.total(r.stored(da.times(a))).plus(r.total(r.stored(terms)))
        sums = Rounded(sums.value, sums.square + r.total(r.stored(dy.times(m))).square)
        alpha_grad = r.stored(sums.scaled(_tanh_slope(alpha)))
        da = r.stored(da.scaled(factor))
    dz = r.stored(z.through(gelu_slope, _gelu_curvature).times(da))
    gathered = r.gathered(Rounded(*(part.unflatten(0, s.value.shape[:3]) for part in (dz.value, dz.square))),
                          *sampling, maps)  # type: ignore[arg-type]  # fmt: skip
    cells = Rounded(gathered.value.flatten(0, 2), gathered.square.flatten(0, 2))  # dP

    def gradient(name: str) -> float:
        if name == "alpha":
            return alpha_grad.largest
        if name == "tokens":
            inner = r.stored(r.product(dz, exact(weight_x)))
            return r.stored(exact(grad[:, prefix:].flatten(0, 1).double()).plus(inner), residual_eps).largest
        if name == "features":
            ds = r.stored(r.product(dz, exact(weight_s)))
            rows = Rounded(*(part.unflatten(0, s.value.shape[:3]) for part in (ds.value, ds.square)))
            by_samples = r.gathered(rows, *sampling, maps).largest  # type: ignore[arg-type]
            return max(by_samples, r.stored(r.product(cells, exact(weight_s))).largest)
        if name == "fc1_weight":
            of_x = r.stored(r.product(dz.t, x)).largest
            by_cells = r.stored(r.product(cells.t, exact(wide["features"].flatten(0, 2)))).largest
            return max(of_x, r.stored(r.product(dz.t, samples)).largest, by_cells)
        if name == "fc2_weight":
            return r.stored(r.product(dm.t, a)).largest
        return r.stored(r.total(dz if name == "fc1_bias" else dm, 0)).largest

    return found | {name: gradient(name) for name in wanted}
