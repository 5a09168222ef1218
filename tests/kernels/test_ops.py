"""The operators under opcheck, torch.compile, autocast and checkpointing."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fila_kernels
from fila_kernels import CVFM, crop_resize, cvfm
from fila_kernels.testing import DIFFERENTIABLE, Case, gradients

OPS = torch.ops.fila_kernels


@pytest.mark.parametrize("tiles", [0, 3])
def test_opcheck(tiles):
    case = Case("opcheck", tiles=tiles)
    inputs = case.inputs(torch.float32)
    sampling = (inputs["boxes"], inputs["image_index"])
    torch.library.opcheck(OPS.crop_resize.default, (inputs["features"], *sampling, 3))
    torch.library.opcheck(OPS.crop_resize_backward.default, (torch.randn(tiles, 3, 3, 6), *sampling, 2, 10, 12))
    arguments = tuple(inputs.values())
    rows = tiles * 16
    saved = (torch.randn(rows, 12), torch.randn(rows, 8))
    for flags in ((True, True), (True, False), (False, False)):
        torch.library.opcheck(OPS.cvfm_forward.default, (*arguments, 1, "product", "", *flags))
    for needs in ([True] * 7, [False, True, False, False, True, False, True]):
        torch.library.opcheck(
            OPS.cvfm_backward.default,
            (torch.randn(tiles, 17, 8), *arguments, *saved, 1, "product", "sample_first", needs),
        )


@pytest.mark.slow
def test_compiles_without_a_graph_break_and_with_dynamic_shapes():
    module = CVFM(8, 6, 12)
    module.alpha.data.fill_(0.5)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for tiles, height in ((3, 10), (5, 7), (2, 12)):
        inputs = Case("compile", tiles=tiles, height=height).inputs(torch.float32)
        leaves = [inputs["tokens"].requires_grad_(), inputs["features"].requires_grad_(), *module.parameters()]
        arguments = (inputs["tokens"], inputs["features"], inputs["boxes"], inputs["image_index"])
        grad = torch.randn_like(inputs["tokens"])
        expected, found = module(*arguments), compiled(*arguments)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        for a, b in zip(
            torch.autograd.grad(found, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_fake_tensors_have_the_shapes_of_real_ones():
    from torch._subclasses.fake_tensor import FakeTensorMode

    inputs = Case("fake").inputs(torch.bfloat16)
    arguments = (*inputs.values(), 1, "scale", "", True, True)
    real = OPS.cvfm_forward(*arguments)
    with FakeTensorMode() as mode:
        faked = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        fake = OPS.cvfm_forward(*faked)
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def test_autocast_keeps_the_residual():
    """x + f(x) in PyTorch has the dtype of x, whatever autocast makes of f."""
    inputs = Case("autocast").inputs(torch.float32)
    leaves = inputs | {name: inputs[name].requires_grad_() for name in DIFFERENTIABLE}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = cvfm(**leaves)
        assert out.dtype == (leaves["tokens"] + torch.nn.functional.linear(out, torch.randn(8, 8))).dtype
    assert out.dtype == torch.float32
    assert torch.equal(out[:, 0], inputs["tokens"][:, 0])
    low = {name: t.detach().to(torch.bfloat16) if name in DIFFERENTIABLE else t for name, t in inputs.items()}
    assert not torch.equal(out, cvfm(**low).float())
    out.sum().backward()
    assert all(leaves[name].grad.dtype == torch.float32 for name in DIFFERENTIABLE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert crop_resize(inputs["features"], inputs["boxes"], inputs["image_index"], 2).dtype == torch.float32


def test_autocast_through_a_closed_gate_gives_the_tokens_to_the_last_bit():
    inputs = Case("closed", alpha=0.0).inputs(torch.float32)
    grad = torch.randn_like(inputs["tokens"])

    def autocast(**arguments):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return cvfm(**arguments)

    out, found = gradients(autocast, inputs, grad)
    assert torch.equal(out, inputs["tokens"])
    assert torch.equal(found["tokens"], grad)


def test_without_autocast_the_dtypes_are_one():
    inputs = Case("mixed").inputs(torch.bfloat16)
    with pytest.raises(ValueError, match=r"features: expected dtype torch.float32 \(as tokens\)"):
        cvfm(**inputs | {"tokens": inputs["tokens"].float()})
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(ValueError, match=r"features: expected dtype torch.bfloat16 \(autocast's\)"),
    ):
        cvfm(**inputs | {"tokens": inputs["tokens"].float(), "features": inputs["features"].double()})


def test_gradient_checkpointing():
    inputs = Case("checkpoint").inputs()
    grad = torch.randn_like(inputs["tokens"])

    def checkpointed(**arguments):
        return checkpoint(cvfm, **arguments, use_reentrant=False)

    out, found = gradients(checkpointed, inputs, grad)
    expected_out, expected = gradients(cvfm, inputs, grad)
    assert torch.equal(out, expected_out)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_double_backward_refuses_even_where_other_terms_would_carry_it():
    """A gradient penalty must not lose this operation's part in silence."""
    inputs = Case("double").inputs()
    leaves = inputs | {name: inputs[name].requires_grad_() for name in DIFFERENTIABLE}
    loss = cvfm(**leaves).square().sum() + leaves["tokens"].pow(3).sum()
    (gradient,) = torch.autograd.grad(loss, leaves["tokens"], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not implemented"):
        gradient.square().sum().backward()
    reference = fila_kernels.cvfm(**leaves, backend="reference").square().sum()
    (gradient,) = torch.autograd.grad(reference, leaves["tokens"], create_graph=True)
    gradient.square().sum().backward()
