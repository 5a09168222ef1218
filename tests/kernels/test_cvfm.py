"""`cvfm`: plans, layouts and frozen inputs against the definition, forward and backward."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from fila_kernels import cvfm, planner, reference
from fila_kernels.call import Plan
from fila_kernels.testing import (
    CASES,
    DIFFERENTIABLE,
    REAL,
    Case,
    assert_close,
    expect_cvfm,
    gradients,
    ids,
    in_double,
    options,
)

PLANS = ("sample_first", "project_first")
GATES = ("product", "scale")


def written_out(tokens, features, boxes, image_index, w1, b1, w2, b2, alpha, prefix, gate):
    """The operation on whole boxes as the paper has it: slice, F.interpolate, cat, MLP, gate."""
    x = tokens[:, prefix:]
    size = round(x.shape[1] ** 0.5)
    rows = []
    for tile, (y0, x0, y1, x1) in enumerate(boxes.int().tolist()):
        crop = features[image_index[tile], y0:y1, x0:x1].permute(2, 0, 1)[None]
        rows.append(F.interpolate(crop, size=(size, size), mode="bilinear", align_corners=False))
    sampled = torch.cat(rows).permute(0, 2, 3, 1).flatten(1, 2)
    m = F.linear(F.gelu(F.linear(torch.cat([x, sampled], -1), w1, b1)), w2, b2)
    return torch.cat([tokens[:, :prefix], x + (torch.tanh(alpha * m) if gate == "product" else alpha.tanh() * m)], 1)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["whole", "identity", "many_images", "many_tiles"])
def test_whole_boxes_equal_slice_interpolate_cat_mlp_gate(name, plan, gate):
    case = next(case for case in CASES if case.name == name)
    inputs = case.inputs()
    grad = torch.randn_like(inputs["tokens"])

    def definition(**arguments):
        return written_out(*arguments.values(), case.prefix, gate)

    expected, expected_gradients = gradients(definition, inputs, grad)
    for function, settings in ((cvfm, {"plan": plan}), (reference.cvfm, {})):
        found, found_gradients = gradients(function, inputs, grad, gate=gate, **settings, **options(case))
        assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()
        for name, value in expected_gradients.items():
            assert (found_gradients[name] - value).abs().max() <= 1e-12 * max(1.0, value.abs().max()), name


@pytest.mark.parametrize("case", CASES, ids=ids)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("gate", GATES)
def test_output_and_every_gradient(case, dtype, plan, gate):
    inputs = case.inputs(dtype)
    grad = torch.randn(inputs["tokens"].shape, dtype=torch.float64).to(dtype)
    settings = {"gate": gate, **options(case)}
    expected = expect_cvfm(inputs, grad, **settings)
    for recompute in (False, True) if dtype == torch.float64 else (False,):
        found, found_gradients = gradients(cvfm, inputs, grad, plan=plan, recompute=recompute, **settings)
        expected.check({"out": found} | found_gradients)


@pytest.mark.parametrize("chosen", list(itertools.product(PLANS, repeat=3)), ids="-".join)
def test_each_direction_has_its_own_plan(chosen, backend, monkeypatch):
    monkeypatch.setattr(planner, "choose", lambda *_: Plan(*chosen, {}, backend, backend))
    inputs = Case("mixed", tiles=5, boxes="overlapping").inputs()
    grad = torch.randn_like(inputs["tokens"])
    expected_out, expected = gradients(reference.cvfm, inputs, grad)
    out, found = gradients(cvfm, inputs, grad)
    torch.testing.assert_close(out, expected_out, rtol=1e-11, atol=1e-11)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-11, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_shape(dtype):
    inputs = REAL.inputs(dtype)
    exact_inputs = in_double(inputs)
    settings = options(REAL)
    exact, eager = reference.cvfm(**exact_inputs, **settings), reference.cvfm(**inputs, **settings)
    for plan in PLANS:
        assert_close(plan, cvfm(**inputs, plan=plan, **settings), exact, eager)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("alpha", [0.0, 0.6])
@pytest.mark.parametrize("plan", PLANS)
def test_gradcheck(gate, alpha, plan):
    case = Case(
        "gradcheck", tiles=2, grid=2, token_width=3, hidden_width=4, feature_width=2, height=5, width=4, alpha=alpha
    )
    inputs = case.inputs()
    leaves = [inputs[name].requires_grad_() for name in DIFFERENTIABLE]

    def function(tokens, features, *parameters):
        return cvfm(tokens, features, inputs["boxes"], inputs["image_index"], *parameters, gate=gate, plan=plan)

    if alpha == 0:
        # At zero the slope by alpha is a central difference of the same function; the others are exactly zero.
        assert torch.autograd.gradcheck(function, leaves, eps=1e-7, atol=1e-6)
    else:
        assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize(
    "wanted", [(name,) for name in DIFFERENTIABLE] + [("fc1_weight", "alpha"), ("tokens", "features")]
)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_each_input_alone(wanted, gate, recompute, alpha):
    """With the others frozen, the gradient that is left is the same."""
    case = Case("frozen", alpha=alpha)
    inputs = case.inputs()
    grad = torch.randn_like(inputs["tokens"])
    _, expected = gradients(reference.cvfm, inputs, grad, gate=gate)
    _, found = gradients(cvfm, inputs, grad, wanted, gate=gate, recompute=recompute)
    for name in wanted:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("stride", ["zero", "transposed"])
def test_gradient_of_any_stride(stride):
    """`sum()` sends a gradient of stride zero."""
    case = Case("stride")
    inputs = case.inputs()
    shape = inputs["tokens"].shape
    if stride == "zero":
        grad = torch.ones((), dtype=torch.float64).expand(shape)
    else:
        grad = torch.randn(shape[::-1], dtype=torch.float64).permute(2, 1, 0)
    _, expected = gradients(reference.cvfm, inputs, grad)
    _, found = gradients(cvfm, inputs, grad)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-11, atol=1e-11)


def test_bitwise_repeatable_and_saved_tensors_untouched():
    case = Case(
        "repeat", tiles=9, grid=8, images=2, boxes="overlapping", token_width=32, hidden_width=32, feature_width=16
    )
    inputs = case.inputs(torch.float32)
    grad = torch.randn_like(inputs["tokens"])
    leaves = {name: inputs[name].requires_grad_() for name in DIFFERENTIABLE}
    out = cvfm(**inputs)
    saved = [tensor.clone() for tensor in out.grad_fn.saved_tensors]
    first = torch.autograd.grad(out, list(leaves.values()), grad, retain_graph=True)
    again = torch.autograd.grad(out, list(leaves.values()), grad)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    out = cvfm(**inputs)
    torch.autograd.grad(out, list(leaves.values()), grad, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(saved, out.grad_fn.saved_tensors, strict=True))


@pytest.mark.parametrize("gate", GATES)
def test_what_is_saved(gate):
    """At most Z [T * N, H], M [T * N, D] for the product gate, and nothing when everything is recomputed or frozen."""
    case = Case("saved")
    inputs = case.inputs()
    rows = case.tiles * case.grid**2

    def saved(wanted, **settings):
        leaves = {
            name: t.detach().requires_grad_(name in wanted) if t.is_floating_point() else t
            for name, t in inputs.items()
        }
        out = cvfm(**leaves, gate=gate, **settings)
        return [list(tensor.shape) for tensor in out.grad_fn.saved_tensors[9:] if tensor.numel()]

    branch = [[rows, case.token_width]] if gate == "product" else []
    assert saved(DIFFERENTIABLE) == [[rows, case.hidden_width], *branch]
    assert saved(("fc2_bias",)) == branch
    assert saved(DIFFERENTIABLE, recompute=True) == []
    assert cvfm(**inputs).grad_fn is None


def test_inputs_are_not_written_and_output_is_new():
    case = Case("pure")
    for alpha in (0.0, 0.5):
        inputs = case.inputs()
        inputs["alpha"].fill_(alpha)
        before = {name: tensor.clone() for name, tensor in inputs.items()}
        out = cvfm(**inputs)
        assert out.data_ptr() != inputs["tokens"].data_ptr()
        assert out.is_contiguous()
        assert all(torch.equal(inputs[name], tensor) for name, tensor in before.items())


def test_prefix_tokens_pass_through_bit_for_bit():
    case = Case("prefix", prefix=3)
    inputs = case.inputs(torch.bfloat16)
    assert torch.equal(cvfm(**inputs, num_prefix_tokens=3)[:, :3], inputs["tokens"][:, :3])


@pytest.mark.parametrize("shape", [(2, 10, 12), (0, 10, 12)])
def test_zero_tiles(shape):
    case = Case("empty", tiles=0, images=shape[0])
    inputs = case.inputs(torch.float32)
    out, found = gradients(cvfm, inputs, torch.zeros_like(inputs["tokens"]))
    assert out.shape == (0, 17, 8)
    for name, gradient in found.items():
        assert gradient.shape == inputs[name].shape
        assert not gradient.any()


def test_order_of_tiles_does_not_matter():
    case = Case("order", tiles=8, images=3)
    inputs = case.inputs()
    order = torch.randperm(8)
    moved = inputs | {name: inputs[name][order] for name in ("tokens", "boxes", "image_index")}
    torch.testing.assert_close(cvfm(**moved), cvfm(**inputs)[order], rtol=1e-12, atol=1e-12)
