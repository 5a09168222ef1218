"""The gate: nothing is timed, and no ratio printed, that does not agree with the definition in float64.

The bound is the tests' own, |found - exact| <= 2 (max |eager - exact| + eps max |exact|), for the result and for every
gradient. `error` is the worst of max |found - exact| / max |eager - exact|: 1 is as exact as eager PyTorch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.baselines import tuned_eager
from bench.cases import Case
from fila_kernels import reference
from fila_kernels.testing import alpha_terms

Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """Whether a variant may be timed, its error over eager's, and where it was worst."""

    green: bool
    error: float
    worst: str


def step(function: Callable[..., Tensor], inputs: Inputs, wanted: tuple[str, ...], grad: Tensor | None, **settings):
    """A call of one forward pass, or of forward and backward to the inputs named in `wanted`."""
    if grad is None:

        def run() -> Any:
            with torch.no_grad():
                return function(**inputs, **settings)

        return run

    def run_both() -> Any:
        leaves = {name: t.detach().requires_grad_() if name in wanted else t for name, t in inputs.items()}
        return torch.autograd.grad(function(**leaves, **settings), [leaves[name] for name in wanted], grad)

    return run_both


def doubled(inputs: Inputs) -> dict[str, Any]:
    """Float64, but for boxes, whose float32 is part of the definition."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() and name != "boxes" else value
        for name, value in inputs.items()
    }


class Gate:
    """The definition's and eager's results for one case and direction, computed once, for any number of variants.

    `whole` are the inputs with boxes on whole cells, the only ones that every variant can take.
    """

    def __init__(self, case: Case, whole: dict[str, Tensor], grad: Tensor | None) -> None:
        self.names = case.wanted if grad is not None else ("out",)
        wide = doubled(whole)
        settings = {"num_prefix_tokens": case.prefix}
        self.dtype = whole["tokens"].dtype
        wide_grad = None if grad is None else grad.double()
        self.exact = self._list(step(reference.cvfm, wide, case.wanted, wide_grad, **settings)())
        self.largest = {name: float(tensor.abs().max()) for name, tensor in zip(self.names, self.exact, strict=True)}
        if wide_grad is not None:
            self.largest["alpha"] = float(alpha_terms(wide, wide_grad, "product", case.prefix))
        eager = self._list(step(tuned_eager, whole, case.wanted, grad, **settings)())
        self.eager = [self._error(found, exact) for found, exact in zip(eager, self.exact, strict=True)]

    def _list(self, found: Any) -> list[Tensor]:
        return [found] if isinstance(found, Tensor) else list(found)

    @staticmethod
    def _error(found: Tensor, exact: Tensor) -> float:
        return float((found.double() - exact).abs().max().nan_to_num(nan=float("inf")))

    def __call__(self, call: Callable[[], Any]) -> Verdict:
        """Judge what `call` returns: the result, or the gradients in the order of the case's `wanted`."""
        error, worst, green = 0.0, "", True
        for name, found, exact, eager in zip(
            self.names, self._list(call()), self.exact, self.eager, strict=True
        ):  # fmt: skip
            if found.shape != exact.shape or found.dtype != self.dtype:
                return Verdict(False, float("inf"), f"{name} is {list(found.shape)} {found.dtype}")
            ours, eps = self._error(found, exact), torch.finfo(self.dtype).eps
            bound = 2 * (eager + eps * self.largest[name])
            if ours > bound:
                green, worst = False, f"{name}: error {ours:.2e} above {bound:.2e}"
            # Where eager is exact to a rounding of the largest value, that rounding is what errors are held against.
            error = max(error, ours / max(eager, eps * self.largest[name] / 2, torch.finfo(torch.float64).tiny))
        return Verdict(green, error, worst)


def fractional_verdict(gate: Gate, call: Callable[[], Tensor], inputs: Inputs, prefix: int) -> Verdict:
    """The result on the fractional view, which eager cannot make, held to the error that eager makes on the rounded."""
    exact = reference.cvfm(**doubled(inputs), num_prefix_tokens=prefix)
    with torch.no_grad():
        found = call()
    ours = gate._error(found, exact)
    bound = 2 * (gate.eager[0] + torch.finfo(found.dtype).eps * float(exact.abs().max()))
    return Verdict(ours <= bound, ours / max(gate.eager[0], 1e-300), f"fractional view: error {ours:.2e}, {bound:.2e}")
