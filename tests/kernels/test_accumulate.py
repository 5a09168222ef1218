"""`features_grad`: the features' gradient added to a given tensor, on the `torch` backend and the definition.

Triton's kernels have the same checks in test_triton_accumulate.py.
"""

import pytest
import torch
from cases import CASES, DIFFERENTIABLE, Case, assert_close, gradients, ids, options

from fila_kernels import CVFM, crop_resize, cvfm, reference

OPS = torch.ops.fila_kernels
OTHERS = tuple(name for name in DIFFERENTIABLE if name != "features")
NAMES = ("plain", "odd", "many_images", "overlapping", "small_boxes", "sliced", "closed_gate", "empty")
FEW = [case for case in CASES if case.name in NAMES]


def check(
    case: Case, dtype: torch.dtype, backend: str, total_dtype=None, make=lambda tensor: tensor, **settings
) -> None:
    """Two calls add to one tensor, which is NaN where nothing is read; all other gradients are as without it."""
    inputs = {name: make(tensor) for name, tensor in case.inputs(dtype).items()}
    exact_inputs = {n: t.double() if t.is_floating_point() and n != "boxes" else t for n, t in inputs.items()}
    grad = torch.randn(inputs["tokens"].shape, dtype=torch.float64).to(dtype)
    common = {**options(case), "gate": settings.pop("gate", "product")}
    _, exact = gradients(reference.cvfm, exact_inputs, grad, ("features",), **common)
    _, eager = gradients(reference.cvfm, inputs, grad, ("features",), **common)
    start = torch.randn(exact["features"].shape).to(total_dtype or dtype)
    read = crop_resize_reads(exact_inputs, case.grid)
    total = make(start.masked_fill(~read, float("nan")).contiguous())
    leaves = inputs | {name: inputs[name].detach().requires_grad_() for name in DIFFERENTIABLE}
    for _ in range(2):
        out = cvfm(**leaves, backend=backend, features_grad=total, **common, **settings)
        found = torch.autograd.grad(out, [leaves[n] for n in DIFFERENTIABLE], grad, allow_unused=True)
        assert found[1] is None
    assert torch.equal(total.isnan(), ~read.expand_as(total))
    wide = start.double()
    # Rounded at each of the two additions, as eager's sums are.
    added = (start + eager["features"]).to(total.dtype) + eager["features"]
    assert_close(
        "features_grad",
        total.masked_fill(~read, 0),
        (wide + 2 * exact["features"]).masked_fill(~read, 0),
        added.to(total.dtype).masked_fill(~read, 0),
    )
    _, expected = gradients(cvfm, inputs, grad, OTHERS, backend=backend, **common, **settings)
    assert all(torch.equal(f, expected[n]) for n, f in zip(DIFFERENTIABLE, found, strict=True) if n != "features")


def crop_resize_reads(inputs, grid) -> torch.Tensor:
    """[B, h, w, 1]: the cells that some sample reads."""
    ones = torch.ones_like(inputs["features"][..., :1])
    function = lambda features: reference.crop_resize(features, inputs["boxes"], inputs["image_index"], grid)  # noqa: E731
    return torch.autograd.functional.vjp(function, ones, function(ones) + 1)[1] != 0


def check_crop_resize(case: Case, dtype: torch.dtype, backend: str) -> None:
    inputs = case.inputs(dtype)
    rest = inputs["boxes"], inputs["image_index"], case.grid
    features = inputs["features"].detach().requires_grad_()
    out = crop_resize(features, *rest, backend=backend)
    grad = torch.randn_like(out)
    (alone,) = torch.autograd.grad(out, features, grad)
    total = torch.randn(features.shape).to(dtype)
    expected = total + alone
    again = crop_resize(features, *rest, backend=backend, features_grad=total)
    assert torch.autograd.grad(again, features, grad, allow_unused=True) == (None,)
    torch.testing.assert_close(total, expected)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("plan", ["sample_first", "project_first"])
@pytest.mark.parametrize("case", FEW, ids=ids)
def test_cvfm(case, plan):
    check(case, torch.float64, "torch", plan=plan)
    check(case, torch.float32, "torch", plan=plan, gate="scale")


def test_float32_total_of_low_precision_and_the_definition():
    for case in FEW[:2]:
        check(case, torch.bfloat16, "torch", torch.float32)
        check(case, torch.float32, "reference")


@pytest.mark.parametrize("case", FEW, ids=ids)
def test_crop_resize(case):
    for backend in ("torch", "reference"):
        check_crop_resize(case, torch.float32, backend)


@pytest.mark.parametrize("tiles", [0, 3])
def test_opcheck(tiles):
    inputs = Case("opcheck", tiles=tiles).inputs(torch.float32)
    total = torch.randn(2, 10, 12, 6)
    rest = inputs["boxes"], inputs["image_index"]
    torch.library.opcheck(OPS.crop_resize_backward_.default, (total, torch.randn(tiles, 3, 3, 6), *rest))
    saved = torch.randn(tiles * 16, 12), torch.randn(tiles * 16, 8)
    arguments = torch.randn(tiles, 17, 8), *inputs.values(), *saved, 1, "product", "sample_first", [True] * 7
    torch.library.opcheck(OPS.cvfm_backward_.default, (total, *arguments))


@pytest.mark.parametrize("replaced", [False, True])
def test_module_and_the_gradient_handed_on(replaced):
    """The way of the docstring: two calls on detached maps, whose gradient then goes on as a whole."""
    module = CVFM(8, 6, 12)
    module.alpha.data.fill_(0.5)
    if replaced:
        module.fc1.register_forward_hook(lambda *_: None)
    inputs = Case("module", tiles=4).inputs(torch.float32)
    source = inputs["features"].clone().requires_grad_()
    parts = [slice(0, 1), slice(1, 4)]

    def run(maps, **settings):
        per_tile = inputs["tokens"], inputs["boxes"], inputs["image_index"]
        for tokens, boxes, image_index in (tuple(tensor[part] for tensor in per_tile) for part in parts):
            yield module(tokens, maps, boxes, image_index, **settings).square().sum()

    (expected,) = torch.autograd.grad(sum(run(source * 2)), source)
    features = source * 2
    maps, total = features.detach().requires_grad_(), torch.zeros_like(features)
    sum(run(maps, features_grad=total)).backward()
    assert maps.grad is None
    features.backward(total)
    torch.testing.assert_close(source.grad, expected)


@pytest.mark.slow
def test_compiles_into_one_graph():
    inputs = Case("compile").inputs(torch.float32)
    leaves = inputs | {name: inputs[name].requires_grad_() for name in DIFFERENTIABLE}
    wanted = [leaves[name] for name in OTHERS]
    results = []
    for function in (cvfm, torch.compile(cvfm, fullgraph=True)):
        total = torch.ones_like(inputs["features"]).detach()
        out = function(**leaves, features_grad=total)
        results.append([total, *torch.autograd.grad(out.square().sum(), wanted)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert not bool((results[0][0] == 1).all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[:1], r"expected shape \[2, 10, 12, 6\] \(as features\), got \[1, 10, 12, 6\]"),
        (lambda t: t.half(), "expected dtype torch.float32 or torch.float32, got torch.float16"),
        (lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), "expected a contiguous tensor, got strides"),
        (lambda t: t.requires_grad_(), "expected a tensor that requires no gradient itself"),
        (lambda t: None if t is None else [t], "expected a tensor, got list"),
    ],
)
def test_what_cannot_be_added_to_is_refused(change, message):
    inputs = Case("refused").inputs(torch.float32)
    inputs["features"].requires_grad_()
    total = change(torch.zeros(2, 10, 12, 6))
    with pytest.raises(ValueError, match=f"features_grad: {message}"):
        cvfm(**inputs, features_grad=total)
    with pytest.raises(ValueError, match=f"features_grad: {message}"):
        crop_resize(inputs["features"], inputs["boxes"], inputs["image_index"], 4, features_grad=total)


@pytest.mark.parametrize("shift", [0, 7])
def test_a_total_in_the_features_own_memory_is_refused(shift):
    """The backward pass reads features after it has written to the total."""
    inputs = Case("refused").inputs(torch.float32)
    features = inputs["features"]
    memory = torch.zeros(features.numel() + shift)
    inputs["features"] = memory[shift:].view(features.shape).copy_(features).detach().requires_grad_()
    total = memory[: features.numel()].view(features.shape)
    with pytest.raises(ValueError, match="features_grad: expected no memory in common with features, got an overlap"):
        cvfm(**inputs, features_grad=total)
    with pytest.raises(ValueError, match="features_grad: expected no memory in common with features, got an overlap"):
        crop_resize(inputs["features"], inputs["boxes"], inputs["image_index"], 4, features_grad=total)


def test_features_without_a_gradient_are_refused():
    inputs = Case("refused").inputs(torch.float32)
    with pytest.raises(ValueError, match="features: expected to require the gradient that features_grad is for"):
        cvfm(**inputs, features_grad=torch.zeros(2, 10, 12, 6))
