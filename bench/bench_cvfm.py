"""`cvfm` in the torch backend against tuned eager over the real shapes; `python -m bench.run` calls it.

Every round runs all variants once, in an order that rotates, so that what disturbs one disturbs all. Before anything is
timed the variants have to agree with the definition in float64; a case that does not agree prints no ratio.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import records
from bench.baselines import rounded, tuned_eager
from bench.cases import CASES, Case
from bench.memory import extra_memory
from fila_kernels import cvfm, reference

DIFFERENTIABLE = ("tokens", "features", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "alpha")
DIRECTIONS = ("forward", "forward+backward")


def step(function: Callable[..., Tensor], inputs: dict[str, Tensor], grad: Tensor | None) -> Callable[[], Any]:
    """One forward pass, or forward and backward to every input and parameter."""
    if grad is None:

        def run() -> Any:
            with torch.no_grad():
                return function(**inputs)

        return run

    def run_both() -> Any:
        leaves = {name: t.detach().requires_grad_() if name in DIFFERENTIABLE else t for name, t in inputs.items()}
        return torch.autograd.grad(function(**leaves), [leaves[name] for name in DIFFERENTIABLE], grad)

    return run_both


def within(found: Tensor, eager: Tensor, exact: Tensor) -> bool:
    """|found - exact| <= 2 (max |eager - exact| + eps max |exact|)."""
    bound = 2 * ((eager.double() - exact).abs().max() + torch.finfo(found.dtype).eps * exact.abs().max())
    return bool((found.double() - exact).abs().max() <= bound)


def agree(inputs: dict[str, Tensor], whole: dict[str, Tensor], grad: Tensor | None) -> bool:
    """Whether results, or gradients (but alpha's, one sum that cancels), are as near to float64 as eager's are."""
    exact = {name: t.double() if name in DIFFERENTIABLE else t for name, t in whole.items()}
    if grad is not None:
        found = (step(cvfm, whole, grad)(), step(tuned_eager, whole, grad)(), step(tuned_eager, exact, grad.double())())
        return all(within(*gradients) for gradients in list(zip(*found, strict=True))[:-1])
    with torch.no_grad():
        eager = tuned_eager(**whole)
        expected = reference.cvfm(**exact)
        # The fractional view, which eager cannot do, is held to the error that eager makes on the rounded one.
        fractional = reference.cvfm(**(exact | {"boxes": inputs["boxes"]}))
        bound = 2 * ((eager.double() - expected).abs().max() + torch.finfo(eager.dtype).eps * expected.abs().max())
        near = (cvfm(**inputs).double() - fractional).abs().max() <= bound
        return within(cvfm(**whole), eager, expected) and bool(near)


@pytest.mark.bench
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cvfm(benchmark, case: Case, direction: str) -> None:
    now = records.clock()
    inputs = case.inputs()
    whole = inputs | {"boxes": rounded(inputs["boxes"])}
    grad = torch.randn_like(inputs["tokens"]) if direction != "forward" else None
    assert agree(inputs, whole, grad), f"{case.name}: {direction} differs from the definition, so nothing is timed"
    variants = {
        "tuned_eager": step(tuned_eager, whole, grad),
        "torch": step(cvfm, inputs, grad),
    }
    memory = {name: extra_memory(run) for name, run in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)

    def interleaved() -> None:
        order.append(order.pop(0))
        for name in order:
            start = now()
            variants[name]()
            seconds[name].append(now() - start)

    benchmark.pedantic(interleaved, rounds=records.rounds(), warmup_rounds=1)
    passes = 1 if direction == "forward" else 3
    for name, times in seconds.items():
        records.append(
            case=case.name, direction=direction, variant=name, times=times[1:] or times,
            flops=passes * case.flops(), bytes=passes * case.bytes(), extra_memory=memory[name],
        )  # fmt: skip
    benchmark.extra_info["ratio"] = records.median(seconds["tuned_eager"]) / records.median(seconds["torch"])
