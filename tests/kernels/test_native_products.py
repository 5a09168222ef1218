"""The composition that `native` uses on a GPU, run on CPU tensors, where its operators have the same schemas.

The kernels themselves are compiled by test_cuda_build.py, walked through on the host by csrc/tests, and run by
test_gpu.py where there is a GPU.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from gpu_checks import PLANS, cell_id, check_cell, matrix

from fila_kernels import crop_resize, cvfm, dispatch, reference
from fila_kernels.backends import native, products
from fila_kernels.backends.native import library
from fila_kernels.call import Plan, Shape
from fila_kernels.testing import (
    CASES,
    DIFFERENTIABLE,
    Case,
    assert_close,
    covering_pairs,
    expect_cvfm,
    gradients,
    ids,
    options,
)

pytestmark = pytest.mark.skipif(not library.load()[0], reason=f"native library {library.load()[1]}")


AUTOCAST = matrix({"autocast": torch.bfloat16}, PLANS[:3])


@pytest.fixture
def composed(monkeypatch):
    """The forward operator stands back, as it does for some tensors of a GPU."""
    monkeypatch.setattr(native, "has_forward", lambda call: False)


@pytest.mark.usefixtures("composed")
@pytest.mark.parametrize("gate", ["product", "scale"])
@pytest.mark.parametrize("plan", ["sample_first", "project_first"])
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_matrix(case, plan, gate):
    inputs = case.inputs(torch.float32)
    grad = torch.randn(inputs["tokens"].shape, generator=torch.Generator().manual_seed(1))
    settings = options(case) | {"gate": gate}
    expected = expect_cvfm(inputs, grad, **settings)
    for recompute in (False, True):
        out, found = gradients(cvfm, inputs, grad, backend="native", plan=plan, recompute=recompute, **settings)
        expected.check({"out": out} | found)


@pytest.mark.usefixtures("composed")
@pytest.mark.parametrize("cell", covering_pairs(AUTOCAST), ids=cell_id)
def test_autocast_keeps_the_residual_of_any_layout(cell):
    check_cell(cell, "native")


@pytest.mark.usefixtures("composed")
@pytest.mark.parametrize("needed", DIFFERENTIABLE)
def test_one_gradient_alone(needed):
    inputs = Case("alone").inputs(torch.float32)
    grad = torch.randn_like(inputs["tokens"])
    every = gradients(cvfm, inputs, grad, backend="native")[1]
    assert torch.equal(gradients(cvfm, inputs, grad, (needed,), backend="native")[1][needed], every[needed])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("widths", [(8, 16, 24), (7, 16, 24), (8, 12, 24), (8, 16, 6)], ids=str)
def test_low_precision_goes_through_one_operator_on_a_gpu_where_widths_fill_16_bytes(widths, dtype):
    shape = Shape.of((3, 17, widths[0]), (2, 10, 12, widths[2]), widths[1])
    plan = Plan(*["sample_first"] * 3, {})
    fitting = dtype != torch.float32 and not any(width % 8 for width in widths)
    for tokens_dtype in (dtype, torch.float32, torch.float16):  # the last two as under autocast
        tokens = SimpleNamespace(device=torch.device("cuda"), dtype=tokens_dtype)
        call = SimpleNamespace(tokens=tokens, shape=shape, plan=plan, dtype=dtype, mixed=tokens_dtype != dtype)
        taken = tokens_dtype in (dtype, torch.float32)
        assert native.has_forward(call) == (fitting and taken)
        single = SimpleNamespace(**vars(call) | {"plan": replace(plan, forward="single_pass")})
        assert native.has_forward(single) == taken


def test_on_a_cpu_everything_goes_through_one_operator(monkeypatch):
    monkeypatch.setattr(products, "forward", pytest.fail)
    for dtype in library.CPU_DTYPES:
        cvfm(**Case("odd", feature_width=7).inputs(dtype), backend="native")


def test_single_pass_is_never_another_plan(monkeypatch):
    """Widths that it does not take are refused by the operator; on the CPU it refuses the plan itself."""
    monkeypatch.setattr(dispatch, "_single_pass_obstacle", lambda *arguments: "")
    with pytest.raises(ValueError, match="got 'single_pass'"):
        cvfm(**Case("odd", feature_width=7).inputs(torch.bfloat16), backend="native", plan="single_pass")


def test_crop_resize_alone_takes_channels_of_any_stride():
    inputs = Case("alone").inputs(torch.float32)
    planar = inputs["features"].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    boxes, index = inputs["boxes"], inputs["image_index"]
    assert planar.stride(3) != 1
    got = crop_resize(planar.requires_grad_(), boxes, index, 4, backend="native")
    assert_close("out", got.detach(), reference.crop_resize(inputs["features"].double(), boxes, index, 4),
                 reference.crop_resize(inputs["features"], boxes, index, 4))  # fmt: skip
    (grad,) = torch.autograd.grad(got, planar, torch.ones_like(got).permute(0, 2, 1, 3).contiguous().transpose(1, 2))
    assert abs(grad.sum().item() - got.numel()) <= 1e-5 * got.numel()
