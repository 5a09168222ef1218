"""The gate: nothing is timed, and no ratio is printed, that does not agree with the definition in float64.

The bound is the tests' own, `fila_kernels.testing.bound`: about the error of `eager`, the definition in the working
dtype, for the result and for every gradient. A verdict's `error` is the worst of |found - exact| / |eager - exact|: 1
is as exact as eager PyTorch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.workloads import Workload
from fila_kernels import reference, rounding
from fila_kernels.testing import bound, in_double

Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """Whether a contestant may be timed, its error over eager's, and where it passed the bound."""

    green: bool
    error: float
    worst: str


def largest_entry(tensor: Tensor) -> Tensor:
    return tensor.abs().amax() if tensor.numel() else tensor.new_zeros(())


class Gate:
    """The definition's results in float64 and in the working dtype, for any number of contestants.

    `rounding` holds, by name, what `bound` takes where eager may be exact by chance. `norm` measures an error: the
    largest entry, or for deep models the Euclidean norm.
    """

    def __init__(
        self,
        exact: Mapping[str, Tensor],
        eager: Mapping[str, Tensor],
        rounding: Mapping[str, float] | None = None,
        norm: Callable[[Tensor], Tensor] = largest_entry,
    ) -> None:
        self.exact, self.norm = exact, norm
        self.dtypes = {name: tensor.dtype for name, tensor in eager.items()}
        self.eager = {name: self._error(eager[name], tensor) for name, tensor in exact.items()}
        self.scale = {name: float(norm(tensor)) for name, tensor in exact.items()}
        self.rounding = dict(rounding or {})

    def _error(self, found: Tensor, exact: Tensor) -> float:
        return float(self.norm(found.double() - exact).nan_to_num(nan=float("inf")))

    def __call__(self, found: Tensor | Sequence[Tensor] | Mapping[str, Tensor]) -> Verdict:
        """Judge one tensor, several in the order of the definition's, or several by name."""
        if isinstance(found, Tensor):
            found = [found]
        if not isinstance(found, Mapping):
            found = dict(zip(self.exact, found, strict=True))
        if found.keys() != self.exact.keys():
            return Verdict(False, float("inf"), f"has {', '.join(found)}, expected {', '.join(self.exact)}")
        worst, error = "", 0.0
        for name, exact in self.exact.items():
            if found[name].shape != exact.shape or found[name].dtype != self.dtypes[name]:
                return Verdict(False, float("inf"), f"{name} is {list(found[name].shape)} {found[name].dtype}")
            ours, last_bit = self._error(found[name], exact), torch.finfo(self.dtypes[name]).eps * self.scale[name]
            allowed = bound(self.dtypes[name], self.eager[name], self.scale[name], self.rounding.get(name, 0.0))
            if not ours <= allowed:
                worst = f"{name}: error {ours:.2e} above {allowed:.2e}"
            # Where eager is exact to a rounding of the largest value, errors are held against that rounding.
            error = max(error, ours / max(self.eager[name], last_bit / 2, 1e-300))
        return Verdict(not worst, error, worst)


def step(function: Callable[..., Tensor], inputs: Inputs, wanted: Sequence[str], grad: Tensor | None, **settings):
    """The call of one forward pass, or of forward and backward to the inputs named in `wanted`."""
    if grad is None:

        def forward() -> Tensor:
            with torch.no_grad():
                return function(**inputs, **settings)

        return forward

    def both() -> tuple[Tensor, ...]:
        leaves = {name: t.detach().requires_grad_() if name in wanted else t for name, t in inputs.items()}
        return torch.autograd.grad(function(**leaves, **settings), [leaves[name] for name in wanted], grad)

    return both


def cvfm_gate(workload: Workload, inputs: dict[str, Tensor], grad: Tensor | None) -> Gate:
    """The definition of `cvfm` on these inputs: the result without `grad`, else the gradients of what is wanted."""
    names = ("out",) if grad is None else workload.wanted
    settings: dict[str, Any] = {"num_prefix_tokens": workload.prefix}

    def defined(values: Inputs, upstream: Tensor | None) -> dict[str, Tensor]:
        found = step(reference.cvfm, values, workload.wanted, upstream, **settings)()
        return dict(zip(names, [found] if isinstance(found, Tensor) else found, strict=True))

    wide = in_double(inputs)
    if grad is None:
        return Gate(defined(wide, None), defined(inputs, None))
    # A single number; every other gradient has so many elements that eager's error is no luck.
    single = [name for name in workload.wanted if name == "alpha"]
    predicted = rounding.of_cvfm(wide, grad.dtype, grad, single, **settings) if single else {}
    return Gate(defined(wide, grad.double()), defined(inputs, grad), predicted)
