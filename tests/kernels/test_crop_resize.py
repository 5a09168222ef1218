"""`crop_resize`: the definition against slices and F.interpolate, the backend against the definition."""

import pytest
import torch
import torch.nn.functional as F

from fila_kernels import crop_resize, dispatch, reference
from fila_kernels.testing import CASES, Case, assert_close, ids

IMPLEMENTATIONS = {"reference": reference.crop_resize, "planned": crop_resize}


def sliced(features, boxes, image_index, size):
    """What the operation replaces, on whole boxes inside the map."""
    tiles = []
    for (y0, x0, y1, x1), image in zip(boxes.int().tolist(), image_index.tolist(), strict=True):
        crop = features[image, y0:y1, x0:x1].permute(2, 0, 1)[None]
        tiles.append(F.interpolate(crop, size=(size, size), mode="bilinear", align_corners=False))
    return torch.cat(tiles).permute(0, 2, 3, 1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS.keys())
@pytest.mark.parametrize("size", [1, 2, 5, 24])
def test_whole_boxes_equal_slice_and_interpolate(implementation, size):
    case = Case("whole", tiles=16, images=3, height=13, width=21, boxes="whole")
    inputs = case.inputs()
    arguments = (inputs["features"], inputs["boxes"], inputs["image_index"], size)
    assert (implementation(*arguments) - sliced(*arguments)).abs().max() <= 1e-12


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS.keys())
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_cells_outside_the_crop_are_not_felt(implementation, poison, dtype):
    features = torch.randn(1, 12, 12, 3, dtype=dtype)
    inside = features.clone()
    features[:, :3], features[:, 9:], features[:, :, :2], features[:, :, 8:] = poison, poison, poison, poison
    boxes, image_index = torch.tensor([[3.0, 2.0, 9.0, 8.0]]), torch.tensor([0])
    for size in (3, 6, 7, 12):
        found = implementation(features, boxes, image_index, size)
        assert torch.equal(found, implementation(inside, boxes, image_index, size))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS.keys())
def test_every_sample_is_its_centre_or_the_clamp(implementation):
    """A map whose values are its own coordinates: interpolation gives back where each sample was taken."""
    height, width, size = 40, 30, 6
    rows, columns = torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64)
    features = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)[None]
    boxes = torch.tensor(
        [
            [0, 0, 40, 30],
            [3.25, 7.5, 21.75, 29.5],
            [8, 4, 20, 16],
            [-4, -6, 20, 20],
            [30, 20, 55, 41],
            [5.3, 2.2, 5.9, 9],
        ],
        dtype=torch.float32,
    )
    found = implementation(features, boxes, torch.zeros(len(boxes), dtype=torch.int64), size)
    for tile, (y0, x0, y1, x1) in enumerate(boxes.double().tolist()):
        for axis, (low, high, cells) in enumerate(((y0, y1, height), (x0, x1, width))):
            for i in range(size):
                centre = low + (i + 0.5) * (high - low) / size - 0.5
                clamped = min(max(centre, low), high - 1) if high - low >= 1 else (low + high - 1) / 2
                expected = min(max(clamped, 0), cells - 1)
                # The upper tap never leaves the box: beyond its last cell the sample stays on that cell.
                expected = min(expected, max(0, torch.tensor(high).ceil().item() - 1))
                line = found[tile, i, :, 0] if axis == 0 else found[tile, :, i, 1]
                assert (line - expected).abs().max() <= 1e-5, (tile, axis, i)


@pytest.mark.parametrize("case", CASES, ids=ids)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradient(case, dtype, backend):
    """Against float64 with the tolerance derived from plain PyTorch in the same dtype."""
    usable, reason = dispatch.available(backend, torch.device("cpu"), dtype)
    if not usable:
        pytest.skip(reason)
    results = {}
    for name, function, kind in (
        ("found", crop_resize, dtype),
        ("eager", reference.crop_resize, dtype),
        ("exact", reference.crop_resize, torch.float64),
    ):
        inputs = case.inputs(dtype)
        features = inputs["features"].to(kind).requires_grad_()
        out = function(features, inputs["boxes"], inputs["image_index"], case.grid)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
        results[name] = (out.detach(), torch.autograd.grad(out, features, grad.to(kind))[0])
    for index, what in enumerate(("out", "features.grad")):
        assert_close(what, results["found"][index], results["exact"][index], results["eager"][index])


def test_far_boxes_are_sampled_as_finely_as_near_ones():
    """Absolute float32 coordinates would lose the fraction on a large map."""
    features = torch.randn(1, 1, 60_000, 2, dtype=torch.float64)
    near = torch.tensor([[0.0, 100.125, 1.0, 103.375]])
    far = near + torch.tensor([0.0, 59_000.0, 0.0, 59_000.0])
    shifted = features[:, :, 59_000:].contiguous()
    image_index = torch.tensor([0])
    found = crop_resize(features, far, image_index, 7)
    assert (found - reference.crop_resize(shifted, near, image_index, 7)).abs().max() <= 1e-9


def test_gradcheck():
    features = torch.randn(2, 5, 6, 2, dtype=torch.float64, requires_grad=True)
    boxes = torch.tensor([[0.0, 0.0, 5.0, 6.0], [0.5, 1.25, 4.75, 3.5], [1.2, 1.3, 1.7, 1.9]])
    image_index = torch.tensor([1, 0, 1], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda maps: crop_resize(maps, boxes, image_index, 3), features)


def test_permuted_channels_last_map_is_not_copied():
    """The operator reads the very bytes of an NCHW channels_last tensor, and of a crop of one."""
    from fila_kernels.backends.eager import map_rows

    maps = torch.randn(2, 6, 8, 9).to(memory_format=torch.channels_last)
    for features in (maps.permute(0, 2, 3, 1), maps[:, :, 1:6, 2:7].permute(0, 2, 3, 1)):
        rows, _ = map_rows(features)
        assert rows.data_ptr() == features.data_ptr()


def test_gradient_is_bitwise_repeatable():
    case = Case("overlapping", tiles=20, images=1, height=16, width=16, boxes="overlapping", feature_width=16, grid=8)
    inputs = case.inputs(torch.float32)
    grad = torch.randn(20, 8, 8, 16)
    features = inputs["features"].requires_grad_()
    first, *others = (
        torch.autograd.grad(crop_resize(features, inputs["boxes"], inputs["image_index"], 8), features, grad)[0]
        for _ in range(4)
    )
    assert all(torch.equal(first, other) for other in others)


def test_any_box_is_memory_safe_where_values_are_not_checked(backend):
    """The operator checks values on the CPU; beneath it a NaN box gives NaN, and no value faults."""
    backend = dispatch.implementation(backend)
    values = [float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e9, -5.0, 2.5]
    boxes = torch.cartesian_prod(*[torch.tensor(values)] * 4)
    image_index = torch.randint(-(2**40), 2**40, (len(boxes),))
    features = torch.randn(2, 4, 5, 3)
    found = backend.crop_resize(features, boxes, image_index, 2)
    assert torch.isnan(found[torch.isnan(boxes).any(1)]).flatten(1).any(1).all()
    # Sums of infinities are whatever they are; all other boxes are sampled as the definition does.
    sane = (boxes.abs() <= 1e9).all(1)
    torch.testing.assert_close(found[sane], reference.crop_resize(features, boxes, image_index, 2)[sane])
    nan_box = torch.full((1, 4), float("nan"))
    assert torch.isnan(backend.crop_resize(features, nan_box, image_index[:1], 2)).all()
    gradient = backend.crop_resize_backward(torch.ones_like(found), boxes, image_index, (2, 4, 5))
    assert gradient.shape == features.shape


def test_double_backward_refuses():
    features = torch.randn(1, 4, 4, 2, requires_grad=True)
    out = crop_resize(features, torch.tensor([[0.0, 0.0, 4.0, 4.0]]), torch.tensor([0]), 2)
    (gradient,) = torch.autograd.grad(out.square().sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not implemented"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", ["reference", "eager", "native"])
def test_a_sample_on_a_cells_centre_reads_no_neighbour(backend):
    """24 samples of 120 cells fall on the centres of cells 2, 7, 12, ...; all others may be anything."""
    features = torch.full((1, 120, 120, 1), float("nan"), dtype=torch.float64)
    features[:, 2::5, 2::5] = 1.0
    boxes, index = torch.tensor([[0.0, 0.0, 120.0, 120.0]]), torch.zeros(1, dtype=torch.int32)
    assert (crop_resize(features, boxes, index, 24, backend=backend) == 1.0).all()
