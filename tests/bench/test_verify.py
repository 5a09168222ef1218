"""The gate: green for the definition and for this package, red for a fault in the result or in any one gradient."""

import pytest
import torch
from torch import nn

from bench import tower, verify
from bench.workloads import SUITES
from fila_kernels import cvfm

TINY = SUITES["tiny"][0]
CPU = torch.device("cpu")


@pytest.mark.parametrize("broken", ["", "out", *TINY.wanted])
def test_a_fault_of_one_per_cent_is_red(broken):
    inputs = TINY.inputs()
    grad = None if broken == "out" else torch.randn_like(inputs["tokens"])
    found = verify.step(cvfm, inputs, TINY.wanted, grad)()
    if grad is None:
        found = found * 1.01
    else:
        found = [g * 1.01 if name == broken else g for name, g in zip(TINY.wanted, found, strict=True)]
    verdict = verify.cvfm_gate(TINY, inputs, grad)(found)
    assert verdict.green == (broken == "")
    if broken:
        assert verdict.worst.startswith(f"{broken}: error")
        assert verdict.error > 10


def test_nan_and_wrong_shapes_and_dtypes_are_red():
    inputs = TINY.inputs()
    gate, out = verify.cvfm_gate(TINY, inputs, None), cvfm(**inputs)
    assert gate(out).green
    for wrong in (out * float("nan"), out[:1], out.double()):
        assert not gate(wrong).green


class Skewed(torch.autograd.Function):
    """The identity with a gradient that is one per cent too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.01


@pytest.mark.parametrize("direction", tower.DIRECTIONS)
def test_a_tower_is_red_for_a_wrong_parameter_and_a_wrong_gradient(direction):
    (small,) = tower.SUITES["tiny"]
    gate, model = tower.gate(small, direction, CPU), tower.build(small, "fusion_eager", CPU)

    def verdict() -> verify.Verdict:
        return gate(tower.results_of(model, tower.pictures(model, 1, CPU), direction))

    assert verdict().green
    if direction != "forward":
        handle = model.fusion[0].register_forward_hook(lambda module, inputs, out: [Skewed.apply(x) for x in out])
        assert verdict().worst.startswith("gradients of ")
        handle.remove()
    nn.init.constant_(model.fusion[-1].alpha, 0.51)
    assert "above" in verdict().worst
