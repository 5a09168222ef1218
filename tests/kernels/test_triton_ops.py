"""The operators around interpreted kernels under opcheck and torch.compile, and the effect of a closed gate."""

import pytest
import torch

from fila_kernels import CVFM, crop_resize, cvfm, dispatch, explain
from fila_kernels.testing import DIFFERENTIABLE, Case, gradients, in_double

OPS = torch.ops.fila_kernels
CASE = Case("ops", tiles=2, images=1)


def test_opcheck():
    inputs = CASE.inputs(torch.float32)
    sampling = (inputs["boxes"], inputs["image_index"])
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS.crop_resize.default, (inputs["features"], *sampling, 3, "triton"), test_utils=checks)
    torch.library.opcheck(
        OPS.crop_resize_backward.default, (torch.randn(2, 3, 3, 6), *sampling, 1, 10, 12, "triton"), test_utils=checks
    )
    arguments = tuple(inputs.values())
    torch.library.opcheck(
        OPS.cvfm_forward.default, (*arguments, 1, "product", "", True, True, "triton"), test_utils=checks
    )
    saved = torch.randn(32, 12), torch.randn(32, 8)
    torch.library.opcheck(
        OPS.cvfm_backward.default,
        (torch.randn(2, 17, 8), *arguments, *saved, 1, "product", "sample_first", [True] * 7, "triton"),
        test_utils=checks,
    )


def test_one_graph_forward_and_backward():
    """aot_eager traces as inductor does, and leaves out only what has nothing to do with these operators."""
    module = CVFM(8, 6, 12, backend="triton")
    module.alpha.data.fill_(0.5)
    inputs = CASE.inputs(torch.float32)
    leaves = [inputs["tokens"].requires_grad_(), inputs["features"].requires_grad_(), *module.parameters()]
    arguments = (inputs["tokens"], inputs["features"], inputs["boxes"], inputs["image_index"])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected, found = module(*arguments), compiled(*arguments)
    assert torch.equal(found, expected)
    grad = torch.randn_like(expected)
    for a, b in zip(torch.autograd.grad(found, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        assert torch.equal(a, b)


def test_the_interpreter_is_a_reason_and_no_default():
    inputs = CASE.inputs(torch.float32)
    assert dispatch.resolve(device=torch.device("cpu"), dtype=torch.float32)[0] in ("native", "eager")
    assert "interpreter" in dispatch.available("triton")[1]
    assert explain((2, 17, 8), (1, 10, 12, 6), backend="triton")["backend"]["choice"] == "triton"
    torch.testing.assert_close(cvfm(**inputs, backend="triton"), cvfm(**inputs, backend="reference"))
    with pytest.raises(RuntimeError, match="take no float64"):
        cvfm(**CASE.inputs(torch.float64), backend="triton")
    with pytest.raises(RuntimeError, match="take no float64"):
        crop_resize(inputs["features"].double(), inputs["boxes"], inputs["image_index"], 2, backend="triton")


@pytest.mark.parametrize("gate", ["product", "scale"])
@pytest.mark.parametrize("where", ["features", "fc2_bias", "fc2_weight", "tokens"])
@pytest.mark.parametrize("recompute", [False, True])
def test_closed_gate_returns_the_tokens_and_finite_gradients(gate, where, recompute):
    inputs = Case("gate", tiles=2, images=1, alpha=0.0).inputs(torch.float32)
    poison = {"features": (0, 4, 5), "fc2_bias": (3,), "fc2_weight": (2, 1), "tokens": (1, 5, 2)}[where]
    inputs[where][poison] = float("inf") if where == "fc2_weight" else float("nan")
    grad = torch.randn_like(inputs["tokens"])
    out, found = gradients(cvfm, inputs, grad, gate=gate, backend="triton", recompute=recompute)
    wide = in_double(inputs)
    _, expected = gradients(cvfm, wide, grad, gate=gate, backend="reference")
    assert torch.equal(out.nan_to_num(), inputs["tokens"].nan_to_num())
    assert torch.equal(found["tokens"], grad)
    for name in DIFFERENTIABLE[1:-1]:
        assert not found[name].any(), name
    torch.testing.assert_close(found["alpha"].double(), expected["alpha"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_infinite_branch_saturates_an_open_product_gate(sign):
    inputs = Case("gate", tiles=1, images=1, alpha=0.5).inputs(torch.float32)
    inputs["fc2_bias"][3] = sign * float("inf")
    grad = torch.randn_like(inputs["tokens"])
    out, found = gradients(cvfm, inputs, grad, ("tokens", "alpha"), backend="triton")
    torch.testing.assert_close(out[:, 1:, 3], inputs["tokens"][:, 1:, 3] + sign)
    assert all(torch.isfinite(value).all() for value in found.values())
