"""The composition of the `cuda` backend without a GPU: its operators have the same schemas on CPU tensors.

What this leaves out, the kernels themselves, is compiled by test_cuda_build.py, walked through on the host by
csrc/tests, and run by test_gpu.py where there is a GPU.
"""

import pytest
import torch
from cases import CASES, DIFFERENTIABLE, Case, assert_close, gradients, ids, options

from bench.verify import alpha_terms
from fila_kernels import crop_resize, cvfm, dispatch, native, reference
from fila_kernels.backends import cuda, eager

pytestmark = pytest.mark.skipif(not native.load()[0], reason=f"native library {native.load()[1]}")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """The resolver lets CPU tensors through to the backend, and PyTorch's own way of sampling must not be taken."""
    monkeypatch.setattr(dispatch, "_cuda_available", lambda device, dtype: (True, "for a test"))
    monkeypatch.setattr(native, "serves", lambda dtype, device: (False, "for a test"))

    def refuse(*arguments):
        raise AssertionError("the torch backend's sampling was called")

    monkeypatch.setattr(eager, "sum_bags", refuse)


@pytest.mark.parametrize("gate", ["product", "scale"])
@pytest.mark.parametrize("plan", ["sample_first", "project_first"])
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_matrix(case, plan, gate):
    inputs = case.inputs(torch.float32)
    wide = {name: t.double() if name in DIFFERENTIABLE else t for name, t in inputs.items()}
    grad = torch.randn(inputs["tokens"].shape, generator=torch.Generator().manual_seed(1))
    settings = options(case) | {"gate": gate}
    exact_out, exact = gradients(reference.cvfm, wide, grad.double(), **settings)
    eager_out, by_eager = gradients(reference.cvfm, inputs, grad, **settings)
    for recompute in (False, True):
        out, found = gradients(cvfm, inputs, grad, backend="cuda", plan=plan, recompute=recompute, **settings)
        assert_close("out", out, exact_out, eager_out)
        for name in DIFFERENTIABLE:
            largest = alpha_terms(wide, grad.double(), gate, case.prefix) if name == "alpha" else None
            assert_close(name, found[name], exact[name], by_eager[name], largest)


@pytest.mark.parametrize("needed", DIFFERENTIABLE)
def test_one_gradient_alone(needed):
    inputs = Case("alone").inputs(torch.float32)
    grad = torch.randn_like(inputs["tokens"])
    every = gradients(cvfm, inputs, grad, backend="cuda")[1]
    assert torch.equal(gradients(cvfm, inputs, grad, (needed,), backend="cuda")[1][needed], every[needed])


@pytest.mark.parametrize("widths", [(8, 16, 24), (7, 16, 24), (8, 12, 24), (8, 16, 6)], ids=str)
def test_low_precision_goes_through_one_operator_where_widths_fill_16_bytes(widths, monkeypatch):
    composed = []
    forward = eager.forward
    monkeypatch.setattr(cuda.eager, "forward", lambda *arguments: composed.append(1) or forward(*arguments))
    case = Case("fused", grid=3, token_width=widths[0], hidden_width=widths[1], feature_width=widths[2])
    inputs = case.inputs(torch.bfloat16)
    wide = {name: t.double() if name in DIFFERENTIABLE else t for name, t in inputs.items()}
    out = cvfm(**inputs, backend="cuda")
    assert_close("out", out, reference.cvfm(**wide), reference.cvfm(**inputs))
    assert bool(composed) == any(width % 8 for width in widths)


def test_single_pass_is_never_another_plan(monkeypatch):
    """Widths that it does not take are refused by the operator; on the CPU it refuses the plan itself."""
    monkeypatch.setattr(dispatch, "_single_pass_obstacle", lambda *arguments: "")
    with pytest.raises(ValueError, match="got 'single_pass'"):
        cvfm(**Case("odd", feature_width=7).inputs(torch.bfloat16), backend="cuda", plan="single_pass")


def test_crop_resize_alone_takes_channels_of_any_stride():
    inputs = Case("alone").inputs(torch.float32)
    planar = inputs["features"].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    boxes, index = inputs["boxes"], inputs["image_index"]
    assert planar.stride(3) != 1
    got = crop_resize(planar.requires_grad_(), boxes, index, 4, backend="cuda")
    assert_close("out", got.detach(), reference.crop_resize(inputs["features"].double(), boxes, index, 4),
                 reference.crop_resize(inputs["features"], boxes, index, 4))  # fmt: skip
    (grad,) = torch.autograd.grad(got, planar, torch.ones_like(got).permute(0, 2, 1, 3).contiguous().transpose(1, 2))
    assert abs(grad.sum().item() - got.numel()) <= 1e-5 * got.numel()
