"""A gate of zero stops a branch that is not finite: both gates, both implementations."""

from itertools import product

import pytest
import torch

from fila_kernels import cvfm, dispatch, planner, reference
from fila_kernels.call import Call, Shape
from fila_kernels.testing import DIFFERENTIABLE, Case, assert_wild_tile, gradients

GATES = ("product", "scale")
IMPLEMENTATIONS = {"reference": reference.cvfm, "planned": cvfm}
POISONS = {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf")}


def poisoned(poison, where, alpha):
    inputs = Case("gate", alpha=alpha).inputs()
    if where == "features":
        inputs["features"][:, 4, 5] = poison
    elif where == "fc2_bias":
        inputs["fc2_bias"][3] = poison
    else:
        inputs["tokens"][1, 5, 2] = poison
    return inputs


@pytest.mark.parametrize("function", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS.keys())
@pytest.mark.parametrize("poison", POISONS.values(), ids=POISONS.keys())
@pytest.mark.parametrize("where", ["features", "fc2_bias", "tokens"])
@pytest.mark.parametrize("gate", GATES)
def test_closed_gate_returns_the_tokens_and_finite_gradients(function, poison, where, gate):
    inputs = poisoned(poison, where, 0.0)
    grad = torch.randn_like(inputs["tokens"])
    out, found = gradients(function, inputs, grad, gate=gate)
    assert torch.equal(out.nan_to_num(), inputs["tokens"].nan_to_num())
    assert torch.equal(found["tokens"], grad)
    for name in DIFFERENTIABLE[1:-1]:
        assert not found[name].any(), name
    # alpha feels the entries of M that are finite: the same sum, taken by hand.
    x = inputs["tokens"][:, 1:]
    sampled = reference.crop_resize(inputs["features"], inputs["boxes"], inputs["image_index"], 4).flatten(1, 2)
    hidden = torch.nn.functional.gelu(torch.cat([x, sampled], -1) @ inputs["fc1_weight"].t() + inputs["fc1_bias"])
    m = hidden @ inputs["fc2_weight"].t() + inputs["fc2_bias"]
    assert not torch.isfinite(m).all()
    expected = (grad[:, 1:] * m)[torch.isfinite(m)].sum()
    assert expected != 0
    torch.testing.assert_close(found["alpha"][0], expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("recompute", [False, True])
def test_closed_gate_still_trains_alpha(gate, recompute):
    inputs = Case("gate", alpha=0.0).inputs()
    grad = torch.randn_like(inputs["tokens"])
    _, found = gradients(cvfm, inputs, grad, gate=gate, recompute=recompute)
    step = 1e-6

    def loss(alpha):
        return (cvfm(**(inputs | {"alpha": torch.tensor([alpha], dtype=torch.float64)}), gate=gate) * grad).sum()

    torch.testing.assert_close(found["alpha"][0], (loss(step) - loss(-step)) / (2 * step), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("function", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS.keys())
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_infinite_branch_saturates_an_open_product_gate(function, sign):
    """tanh(alpha * inf) is 1 and no longer depends on alpha, so that alpha's gradient stays finite."""
    inputs = poisoned(sign * float("inf"), "fc2_bias", 0.5)
    grad = torch.randn_like(inputs["tokens"])
    out, found = gradients(function, inputs, grad, ("tokens", "alpha"))
    torch.testing.assert_close(out[:, 1:, 3], inputs["tokens"][:, 1:, 3] + sign)
    assert torch.isfinite(found["alpha"]).all()
    silent = grad.clone()
    silent[:, :, 3] = 0
    clean = poisoned(0.0, "fc2_bias", 0.5)
    _, expected = gradients(function, clean, silent, ("tokens", "alpha"))
    torch.testing.assert_close(found["alpha"], expected["alpha"])


@pytest.mark.parametrize("gate", GATES)
def test_nan_reaches_the_output_of_an_open_gate(gate):
    """Only a closed gate silences: at any other alpha a NaN in the branch is seen."""
    inputs = poisoned(float("nan"), "fc2_bias", 0.5)
    for function in IMPLEMENTATIONS.values():
        out = function(**inputs, gate=gate)
        assert torch.isnan(out[:, 1:, 3]).all()
        assert torch.isfinite(out[:, :, :3]).all()


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_nan_box_beneath_the_public_edge(alpha):
    """Where values are not checked, a NaN box gives its own tile NaN patch tokens, and under a closed gate nothing."""
    inputs = Case("gate", tiles=3, alpha=alpha).inputs()
    inputs["boxes"][1] = float("nan")
    shape = Shape.of(inputs["tokens"].shape, inputs["features"].shape, inputs["fc1_weight"].shape[0])
    for backend, plan in product(("native", "eager"), ("sample_first", "project_first")):
        chosen = planner.choose(shape, torch.float64, torch.device("cpu"), plan, backend)
        call = Call(*inputs.values(), shape, "product", chosen)
        assert_wild_tile(dispatch.implementation(backend).forward(call, None, None), inputs)


def test_closed_gate_is_bit_for_bit_the_tokens():
    for dtype in (torch.float32, torch.bfloat16):
        inputs = Case("gate", alpha=0.0).inputs(dtype)
        assert torch.equal(cvfm(**inputs), inputs["tokens"])
        leaves = {name: inputs[name].requires_grad_() for name in DIFFERENTIABLE}
        assert torch.equal(cvfm(**(inputs | leaves)), inputs["tokens"])
