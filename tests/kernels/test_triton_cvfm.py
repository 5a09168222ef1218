"""`cvfm` by Triton kernels, interpreted, against the definition: every plan, output and every gradient."""

import pytest
import torch
from interpreter import ALIGNED, MATRIX, UNALIGNED, guarded, guards  # noqa: F401

from fila_kernels import cvfm, dispatch, planner, reference
from fila_kernels.call import Call, Shape
from fila_kernels.testing import (
    DIFFERENTIABLE,
    Case,
    assert_wild_tile,
    expect_cvfm,
    gradients,
    ids,
    options,
)

PLANS = ("sample_first", "project_first")
GATES = ("product", "scale")
SMALL = Case("small", tiles=2, images=2)


def check(case: Case, dtype: torch.dtype, gate: str, wanted=DIFFERENTIABLE, **settings) -> None:
    inputs = {name: guarded(tensor) for name, tensor in case.inputs(dtype).items()}
    grad = guarded(torch.randn(inputs["tokens"].shape, dtype=torch.float64).to(dtype))
    common = {"gate": gate, **options(case)}
    expected = expect_cvfm(inputs, grad, wanted, **common)
    found, found_gradients = gradients(cvfm, inputs, grad, wanted, backend="triton", **settings, **common)
    expected.check({"out": found} | found_gradients)


@pytest.mark.usefixtures("guards")
@pytest.mark.parametrize("case", MATRIX, ids=ids)
@pytest.mark.parametrize(("plan", "gate"), [("sample_first", "product"), ("project_first", "scale")])
def test_output_and_every_gradient(case, plan, gate):
    check(case, torch.float32, gate, plan=plan)


@pytest.mark.usefixtures("guards")
@pytest.mark.parametrize("case", [ALIGNED, UNALIGNED, Case("closed_gate", alpha=0.0)], ids=ids)
@pytest.mark.parametrize(("plan", "gate"), [("sample_first", "scale"), ("project_first", "product")])
def test_the_other_pairs_of_plan_and_gate(case, plan, gate):
    check(case, torch.float32, gate, plan=plan)


@pytest.mark.usefixtures("guards")
@pytest.mark.parametrize(
    "case", [c for c in MATRIX if c.name in ("odd", "border", "sliced", "closed_gate", "aligned", "unaligned")], ids=ids
)
def test_single_pass(case):
    check(case, torch.float32, "product", plan="single_pass")


def test_single_pass_is_one_launch(monkeypatch):
    from fila_kernels.backends.triton import host

    launched, run = [], host.run

    def count(kernel, *arguments, **settings):
        launched.append(kernel.__name__)
        run(kernel, *arguments, **settings)

    monkeypatch.setattr(host, "run", count)
    inputs = SMALL.inputs(torch.float32)
    cvfm(**inputs, backend="triton", plan="single_pass")
    assert launched == ["single_pass_fwd_kernel"]


@pytest.mark.usefixtures("guards")
@pytest.mark.parametrize("case", [ALIGNED, UNALIGNED], ids=ids)
@pytest.mark.parametrize("gate", GATES)
def test_float16(case, gate):
    """bfloat16 cannot be interpreted; it takes the very same path, rounded where this one is."""
    check(case, torch.float16, gate, plan="sample_first")


@pytest.mark.usefixtures("guards")
@pytest.mark.parametrize("gate", GATES)
def test_recompute_saves_nothing_and_finds_the_same(gate):
    inputs = SMALL.inputs(torch.float32)
    leaves = {
        n: t.detach().requires_grad_(n in DIFFERENTIABLE) if n != "boxes" else t
        for n, t in inputs.items()
        if t.is_floating_point()
    }
    out = cvfm(**(inputs | leaves), gate=gate, backend="triton", recompute=True)
    assert not any(tensor.numel() for tensor in out.grad_fn.saved_tensors[9:])
    check(SMALL, torch.float32, gate, recompute=True)


@pytest.mark.usefixtures("guards")
@pytest.mark.parametrize("name", DIFFERENTIABLE)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("recompute", [False, True])
def test_each_input_alone(name, gate, recompute):
    check(Case("frozen", tiles=1, images=1), torch.float32, gate, (name,), recompute=recompute)


@pytest.mark.usefixtures("guards")
@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_frozen_inputs_launch_nothing_for_themselves(alpha, monkeypatch):
    """Pre-training trains the fusion alone: no gather, no input gradient."""
    from fila_kernels.backends.triton import cvfm as operation
    from fila_kernels.backends.triton import gemm

    def refuse(*_, **__):
        raise AssertionError("computed for a frozen input")

    monkeypatch.setattr(operation, "crop_resize_bwd", refuse)
    monkeypatch.setattr(gemm, "input_gradient", refuse)
    wanted = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "alpha")
    check(Case("frozen", tiles=1, images=1, alpha=alpha), torch.float32, "product", wanted)


@pytest.mark.parametrize("layout", ["zero", "transposed"])
def test_gradient_of_any_stride(layout):
    inputs = SMALL.inputs(torch.float32)
    shape = inputs["tokens"].shape
    grad = torch.ones(()).expand(shape) if layout == "zero" else torch.randn(shape[::-1]).permute(2, 1, 0)
    _, expected = gradients(reference.cvfm, inputs, grad)
    _, found = gradients(cvfm, inputs, grad, backend="triton")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", ["weights", "features"])
def test_operands_of_any_stride(where):
    inputs = SMALL.inputs(torch.float32)
    expected = reference.cvfm(**inputs)
    if where == "weights":
        for name in ("fc1_weight", "fc2_weight"):
            inputs[name] = inputs[name].t().contiguous().t()
    else:
        inputs["features"] = inputs["features"].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    for plan in PLANS:
        torch.testing.assert_close(cvfm(**inputs, backend="triton", plan=plan), expected, rtol=1e-5, atol=1e-5)


def test_repeats_to_the_last_bit_and_leaves_what_it_saved():
    inputs = ALIGNED.inputs(torch.float32)
    grad = torch.randn_like(inputs["tokens"])
    leaves = {name: inputs[name].requires_grad_() for name in DIFFERENTIABLE}
    out = cvfm(**inputs, num_prefix_tokens=ALIGNED.prefix, backend="triton")
    saved = [tensor.clone() for tensor in out.grad_fn.saved_tensors]
    first, again = (torch.autograd.grad(out, list(leaves.values()), grad, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(saved, out.grad_fn.saved_tensors, strict=True))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_nan_box_and_wild_index_beneath_the_public_edge(plan, alpha):
    inputs = Case("wild", tiles=3, alpha=alpha).inputs(torch.float32)
    inputs["boxes"][1] = float("nan")
    inputs["image_index"][2] = 2**40
    shape = Shape.of(inputs["tokens"].shape, inputs["features"].shape, inputs["fc1_weight"].shape[0])
    chosen = planner.choose(shape, torch.float32, torch.device("cpu"), plan, "triton")
    call = Call(*inputs.values(), shape, "product", chosen)
    assert_wild_tile(dispatch.implementation("triton").forward(call, None, None), inputs)


def test_prefix_tokens_pass_and_are_not_felt():
    """Whatever a class token holds: its own row gets it back, and no gradient but its own sees it."""
    inputs = Case("prefix", tiles=2, prefix=2).inputs(torch.float32)
    inputs["tokens"][0, 0] = float("nan")
    grad = torch.randn_like(inputs["tokens"])
    out, found = gradients(cvfm, inputs, grad, num_prefix_tokens=2, backend="triton")
    assert torch.equal(out[:, :2].nan_to_num(), inputs["tokens"][:, :2].nan_to_num())
    assert torch.equal(found["tokens"][:, :2], grad[:, :2])
    assert all(torch.isfinite(found[name]).all() for name in DIFFERENTIABLE)


def test_zero_tiles():
    inputs = Case("empty", tiles=0).inputs(torch.float32)
    out, found = gradients(cvfm, inputs, torch.zeros_like(inputs["tokens"]), backend="triton")
    assert out.shape == (0, 17, 8)
    assert not any(gradient.any() for gradient in found.values())
