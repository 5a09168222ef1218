"""`crop_resize` by Triton kernels, interpreted, against the definition: forward and the gathering transpose."""

import pytest
import torch
from interpreter import MATRIX, guarded, guards  # noqa: F401
from test_crop_resize import sliced

from fila_kernels import crop_resize, dispatch, reference
from fila_kernels.testing import Case, assert_close, ids


def run(features, boxes, image_index, size):
    return crop_resize(features, boxes, image_index, size, backend="triton")


def results(case: Case, dtype: torch.dtype, function, kind: torch.dtype, change=lambda maps: maps):
    """The samples and the map's gradient."""
    inputs = case.inputs(dtype)
    features = guarded(change(inputs["features"].to(kind))).requires_grad_()
    out = function(features, guarded(inputs["boxes"]), guarded(inputs["image_index"]), case.grid)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    return out.detach(), torch.autograd.grad(out, features, guarded(grad.to(kind)))[0]


def check(case: Case, dtype: torch.dtype, change=lambda maps: maps) -> None:
    exact = results(case, dtype, reference.crop_resize, torch.float64)
    eager = results(case, dtype, reference.crop_resize, dtype)
    found = results(case, dtype, run, dtype, change)
    for name, *compared in zip(("out", "features.grad"), found, exact, eager, strict=True):
        assert_close(name, *compared)


@pytest.mark.usefixtures("guards")
@pytest.mark.parametrize("case", MATRIX, ids=ids)
def test_values_and_gradient(case):
    check(case, torch.float32)


@pytest.mark.usefixtures("guards")
@pytest.mark.parametrize("case", [c for c in MATRIX if c.name in ("odd", "border", "sliced")], ids=ids)
def test_values_and_gradient_in_float16(case):
    """bfloat16 cannot be interpreted; it takes the very same path, widened after each load."""
    check(case, torch.float16)


@pytest.mark.usefixtures("guards")
@pytest.mark.parametrize("name", ["plain", "odd"])
def test_maps_with_channels_first_are_read_as_they_are(name):
    case = next(case for case in MATRIX if case.name == name)
    check(case, torch.float32, lambda maps: maps.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1))


@pytest.mark.usefixtures("guards")
@pytest.mark.parametrize("size", [1, 5, 24])
def test_whole_boxes_equal_slice_and_interpolate_whatever_lies_outside(size):
    case = Case("whole", tiles=4, images=2, height=13, width=21, boxes="whole")
    inputs = case.inputs(torch.float32)
    features, boxes, image_index = inputs["features"], inputs["boxes"], inputs["image_index"]
    expected = sliced(features, boxes, image_index, size)
    inside = torch.zeros(features.shape[:3], dtype=torch.bool)
    for (y0, x0, y1, x1), image in zip(boxes.int().tolist(), image_index.tolist(), strict=True):
        inside[image, y0:y1, x0:x1] = True
    found = run(features.masked_fill(~inside[..., None], float("nan")), boxes, image_index, size)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_sample_on_a_cells_centre_reads_no_neighbour():
    features = torch.full((1, 120, 120, 1), float("nan"))
    features[:, 2::5, 2::5] = 1.0
    boxes, index = torch.tensor([[0.0, 0.0, 120.0, 120.0]]), torch.zeros(1, dtype=torch.int32)
    assert (run(features, boxes, index, 24) == 1.0).all()


def test_far_boxes_are_sampled_as_finely_as_near_ones():
    features = torch.randn(1, 1, 60_000, 2)
    near = torch.tensor([[0.0, 100.125, 1.0, 103.375]])
    far = near + torch.tensor([0.0, 59_000.0, 0.0, 59_000.0])
    shifted = features[:, :, 59_000:].contiguous()
    index = torch.tensor([0])
    assert torch.equal(run(features, far, index, 7), run(shifted, near, index, 7))


@pytest.mark.usefixtures("guards")
def test_any_box_and_index_is_memory_safe():
    values = [float("nan"), float("inf"), -3e38, 1e9, 2.5]
    boxes = torch.cartesian_prod(*[torch.tensor(values)] * 4)
    image_index = torch.randint(-(2**40), 2**40, (len(boxes),))
    features = guarded(torch.randn(2, 4, 5, 3))
    found = dispatch.implementation("triton").crop_resize(features, boxes, image_index, 2)
    assert torch.isnan(found[torch.isnan(boxes).any(1)]).flatten(1).any(1).all()
    sane = (boxes.abs() <= 1e9).all(1)
    torch.testing.assert_close(found[sane], reference.crop_resize(features, boxes, image_index, 2)[sane])
    few = slice(0, len(boxes), 40)
    gradient = torch.ops.fila_kernels.crop_resize_backward(
        torch.ones_like(found[few]).fill_(1.0), boxes[few], image_index[few], 2, 4, 5, "triton"
    )
    assert gradient.shape == features.shape


def test_gradient_repeats_to_the_last_bit_in_any_order_of_images():
    case = Case("repeat", tiles=5, images=2, boxes="overlapping", grid=3)
    inputs = case.inputs(torch.float32)
    arguments = torch.randn(5, 3, 3, 6), inputs["boxes"], inputs["image_index"], 2, 10, 12, "triton"
    first, again = (torch.ops.fila_kernels.crop_resize_backward(*arguments) for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("layout", ["zero", "transposed"])
def test_gradient_of_any_stride(layout):
    case = Case("stride", tiles=2)
    inputs = case.inputs(torch.float32)
    grad = torch.ones(()).expand(2, 4, 4, 6) if layout == "zero" else torch.randn(6, 4, 4, 2).permute(3, 2, 1, 0)
    rest = inputs["boxes"], inputs["image_index"], 2, 10, 12
    found = torch.ops.fila_kernels.crop_resize_backward(grad, *rest, "triton")
    expected = torch.ops.fila_kernels.crop_resize_backward(grad.double(), *rest)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_gradient_of_channels_beyond_what_32_bits_count():
    """Only the pages that are written take memory: three planes, 2^30 elements and a few from each other."""
    case = Case("far", tiles=2)
    inputs = case.inputs(torch.float32)
    plane = 2**30 + 32
    grad = torch.empty(2 * plane + 32, dtype=torch.float16).as_strided((2, 4, 4, 3), (16, 4, 1, plane))
    grad.copy_(torch.randn(2, 4, 4, 3))
    rest = inputs["boxes"], inputs["image_index"], 2, 10, 12, "triton"
    found = torch.ops.fila_kernels.crop_resize_backward(grad, *rest)
    assert torch.equal(found, torch.ops.fila_kernels.crop_resize_backward(grad.contiguous(), *rest))
