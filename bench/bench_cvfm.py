"""`cvfm` in the torch backend against tuned eager over the real shapes; `python -m bench.run` calls it.

Every round runs all variants once, in an order that rotates, so that what disturbs one disturbs all. Before anything is
timed the variants have to agree with the definition in float64; a case that does not agree prints no ratio.
"""

import time
from collections.abc import Callable

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


def step(function: Callable[..., Tensor], inputs: dict[str, Tensor], grad: Tensor | None) -> Callable[[], object]:
    """One forward pass, or forward and backward to every input and parameter."""
    if grad is None:

        def run() -> object:
            with torch.no_grad():
                return function(**inputs)

        return run

    def run_both() -> object:
        leaves = {name: t.detach().requires_grad_() if name in DIFFERENTIABLE else t for name, t in inputs.items()}
        return torch.autograd.grad(function(**leaves), [leaves[name] for name in DIFFERENTIABLE], grad)

    return run_both


def agree(case: Case, inputs: dict[str, Tensor], whole: dict[str, Tensor]) -> bool:
    """Whether both variants' errors against float64 are within 2 x (eager's own error + eps * max)."""
    with torch.no_grad():
        exact = {name: t.double() if name in DIFFERENTIABLE else t for name, t in whole.items()}
        expected = reference.cvfm(**exact)
        eager_error = (tuned_eager(**whole).double() - expected).abs().max()
        bound = 2 * (eager_error + torch.finfo(inputs["tokens"].dtype).eps * expected.abs().max())
        if (cvfm(**whole).double() - expected).abs().max() > bound:
            return False
        # The fractional view, which eager cannot do, against the definition alone.
        expected = reference.cvfm(**(exact | {"boxes": inputs["boxes"]}))
        return bool((cvfm(**inputs).double() - expected).abs().max() <= bound)


@pytest.mark.bench
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cvfm(benchmark, case: Case, direction: str) -> None:
    inputs = case.inputs()
    whole = inputs | {"boxes": rounded(inputs["boxes"])}
    assert agree(case, inputs, whole), f"{case.name}: results differ from the definition, so nothing is timed"
    grad = torch.randn_like(inputs["tokens"]) if direction != "forward" else None
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
            start = time.perf_counter()
            variants[name]()
            seconds[name].append(time.perf_counter() - start)

    benchmark.pedantic(interleaved, rounds=records.rounds(), warmup_rounds=1)
    passes = 1 if direction == "forward" else 3
    for name, times in seconds.items():
        records.append(
            case=case.name, direction=direction, variant=name, times=times[1:] or times,
            flops=passes * case.flops(), bytes=passes * case.bytes(), extra_memory=memory[name],
        )  # fmt: skip
    benchmark.extra_info["ratio"] = records.median(seconds["tuned_eager"]) / records.median(seconds["torch"])
