"""The error bound itself: it passes what only rounds, and finds planted faults in the smallest tensors."""

from unittest import mock

import pytest
import torch
from gpu_checks import WIDTHS, check

from fila_kernels import cvfm, reference, rounding
from fila_kernels.testing import DIFFERENTIABLE, Case, bound, error_of, expect_cvfm, gradients, in_double

LOW = (torch.bfloat16, torch.float16)
SMALLEST = [
    Case(name, tiles=2, prefix=1, grid=2, token_width=d, hidden_width=h, feature_width=c, images=1, height=5, width=6,
         boxes="overlapping")
    for name, (d, h, c) in WIDTHS.items()
]  # fmt: skip


def by_definition(**arguments):
    """The definition in the dtype of its arguments, and with the settings that it knows."""
    return reference.cvfm(**{name: value for name, value in arguments.items() if name != "backend"})


def without_a_tile(**arguments):
    """The first tile is missing in the gradient of fc1's weight."""
    tile_wise = ("tokens", "boxes", "image_index")
    first = {name: value[:1] if name in tile_wise else value for name, value in arguments.items()}
    rest = {name: value[1:] if name in tile_wise else value for name, value in arguments.items()}
    first["fc1_weight"] = first["fc1_weight"].detach()
    return torch.cat([by_definition(**first), by_definition(**rest)])


def without_the_half_cell(**arguments):
    return by_definition(**arguments | {"boxes": arguments["boxes"] + 0.5})


def with_a_wrong_tap(**arguments):
    right = reference.axis_positions

    def wrong(start, end, size, cells):
        lower, upper, weight = right(start, end, size, cells)
        upper = upper.clone()
        upper[:, 0] = (lower[:, 0] + 2).clamp(max=cells - 1)  # of one row and one column of samples
        return lower, upper, weight

    with mock.patch.object(reference, "axis_positions", wrong):
        return by_definition(**arguments)


def with_a_coarse_weight(**arguments):
    """fc2's weight with the ten bits of TF32."""
    weight = arguments["fc2_weight"]
    return by_definition(**arguments | {"fc2_weight": weight + (weight.half().to(weight.dtype) - weight).detach()})


def with_a_low_residual(**arguments):
    tokens = arguments["tokens"]
    return by_definition(**arguments | {"tokens": tokens.to(arguments["fc1_weight"].dtype)}).to(tokens.dtype)


PLANTED = {
    "without a tile": (without_a_tile, torch.float32, *LOW),
    "without the half cell": (without_the_half_cell, torch.float32, *LOW),
    "a wrong tap": (with_a_wrong_tap, torch.float32, *LOW),
    "TF32": (with_a_coarse_weight, torch.float32),
}


@pytest.mark.parametrize("gate", ["product", "scale"])
@pytest.mark.parametrize("case", SMALLEST, ids=lambda case: case.name)
@pytest.mark.parametrize(
    ("planted", "dtype"),
    [(name, dtype) for name, (_, *dtypes) in PLANTED.items() for dtype in dtypes],
)
def test_a_planted_fault_is_found(planted, dtype, case, gate):
    with pytest.raises(AssertionError, match=r"error .* above"):
        check(case, "eager", dtype, gate, device="cpu", function=PLANTED[planted][0])


@pytest.mark.parametrize("gate", ["product", "scale"])
@pytest.mark.parametrize("alpha", [0.0, 0.01])
@pytest.mark.parametrize("case", SMALLEST, ids=lambda case: case.name)
def test_a_bfloat16_residual_is_found(case, alpha, gate):
    """Where the gate is wide open the branch's own rounding is as large: hence the nearly closed one in the matrix."""
    case = Case(**vars(case) | {"alpha": alpha})
    with pytest.raises(AssertionError, match=r"out: error .* above"):
        check(case, "eager", torch.bfloat16, gate, device="cpu", function=with_a_low_residual, autocast=True)


@pytest.mark.parametrize("gate", ["product", "scale"])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
def test_another_order_of_the_same_sums_passes_where_eager_is_exact(dtype, gate):
    """The worst for the bound: eager's luck taken to its end, and our sums in an order of their own."""
    worst = 0.0
    for seed in range(40):
        case = SMALLEST[seed % len(SMALLEST)]
        inputs = case.inputs(dtype, seed)
        grad = torch.randn(inputs["tokens"].shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        expected = expect_cvfm(inputs, grad, gate=gate)
        order = torch.randperm(case.hidden_width)
        for name in ("fc1_weight", "fc1_bias"):
            inputs[name] = inputs[name][order]
        inputs["fc2_weight"] = inputs["fc2_weight"][:, order]
        out, found = gradients(cvfm, inputs, grad, gate=gate)
        back = order.argsort()
        for name in ("fc1_weight", "fc1_bias"):
            found[name] = found[name][back]
        found["fc2_weight"] = found["fc2_weight"][:, back]
        for name, tensor in ({"out": out} | found).items():
            error = float((tensor.double() - expected.exact[name]).abs().max())
            allowed = bound(dtype, 0.0, float(expected.exact[name].abs().max()), expected.rounding[name])
            worst = max(worst, error / allowed)
    assert 0.1 < worst <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_large_tensors_the_prediction_is_about_eagers_error(dtype):
    """All but alpha's gradient, a single number, for which eager's error says little at any size."""
    case = Case("large", tiles=8, grid=12, token_width=64, hidden_width=96, feature_width=48, boxes="overlapping")
    inputs = case.inputs(dtype)
    grad = torch.randn(inputs["tokens"].shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = expect_cvfm(inputs, grad)
    for name in ("out", *DIFFERENTIABLE[:-1]):
        exact = expected.exact[name]
        eager, largest = error_of(expected.eager[name], exact), float(exact.abs().max())
        allowed, without = bound(dtype, eager, largest, expected.rounding[name]), bound(dtype, eager, largest)
        assert allowed <= 2.5 * without, name
        assert allowed <= (1e-1 if dtype == torch.bfloat16 else 1e-5) * largest, name


def test_crop_resize_and_the_gate_are_the_same_predictions():
    case = Case("parts")
    wide = in_double(case.inputs(torch.float32))
    sampling = {name: wide[name] for name in ("features", "boxes", "image_index")}
    grad = torch.randn(case.tiles, 4, 4, case.feature_width, dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        found = rounding.of_crop_resize(**sampling, size=4, dtype=dtype, grad=grad)
        largest = reference.crop_resize(**sampling, size=4).abs().max()
        assert 1 <= found["out"] / (torch.finfo(dtype).eps * largest) < 4
        gate = rounding.of_gate_backward(grad, grad, torch.tensor([0.5]).double(), dtype)
        assert gate["alpha"] > gate["branch"] > 0
