"""The compiled library of csrc/: its CPU kernel against the definition, what it refuses, and what it links to."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fuzz_native
import pytest
import torch

from fila_kernels import reference, rounding
from fila_kernels.backends import eager, native
from fila_kernels.backends.native import library
from fila_kernels.testing import Case, assert_close, in_double

LOADED, REASON = library.load()
needs_library = pytest.mark.skipif(not LOADED, reason=f"native library {REASON}")

# Tiles, map height and width, channels, samples a side.
SHAPES = [
    (1, 1, 1, 1, 1),
    (1, 24, 24, 32, 24),
    (5, 48, 72, 33, 24),
    (3, 17, 9, 7, 5),
    (4, 96, 64, 192, 8),
    (2, 5, 40, 16, 13),
]


def make_case(tiles: int, height: int, width: int, channels: int, dtype: torch.dtype, images: int = 3):
    features = torch.randn(images, height, width, channels).to(dtype)
    corners = torch.rand(tiles, 2, 2) * torch.tensor([height, width]) * 1.4 - torch.tensor([height, width]) * 0.2
    low, high = corners.amin(1), corners.amax(1)
    boxes = torch.cat([low, high], dim=1)
    boxes[::2] = boxes[::2].floor() + torch.tensor([0, 0, 1, 1])  # whole cells in every other tile
    return features, boxes, torch.randint(images, (tiles,))


@needs_library
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_crop_resize_equals_the_definition(shape, dtype):
    tiles, height, width, channels, size = shape
    features, boxes, image_index = make_case(tiles, height, width, channels, dtype)
    got = torch.ops.fila.crop_resize(features, boxes, image_index, size)
    assert got.shape == (tiles, size, size, channels)
    assert got.dtype == dtype
    exact = reference.crop_resize(features.double(), boxes, image_index, size)
    assert_close("out", got, exact, reference.crop_resize(features, boxes, image_index, size))


@needs_library
@pytest.mark.parametrize("scale", [1, 2, 3, 8])
def test_whole_cells_equal_interpolate_of_the_slice(scale):
    """Also when everything outside the crop is NaN."""
    size, channels = 6, 5
    side = size * scale
    features = torch.full((2, side + 4, side + 7, channels), float("nan"))
    features[1, 3 : 3 + side, 5 : 5 + side] = torch.randn(side, side, channels)
    got = torch.ops.fila.crop_resize(
        features, torch.tensor([[3.0, 5.0, 3.0 + side, 5.0 + side]]), torch.tensor([1], dtype=torch.int32), size
    )
    crop = features[1:, 3 : 3 + side, 5 : 5 + side].permute(0, 3, 1, 2)
    want = torch.nn.functional.interpolate(crop, size=(size, size), mode="bilinear", align_corners=False)
    torch.testing.assert_close(got, want.permute(0, 2, 3, 1), rtol=0, atol=4 * torch.finfo().eps)


@needs_library
def test_neighbours_that_do_not_count_are_not_read():
    features = torch.full((1, 9, 9, 4), float("inf"))
    features[:, 1::3, 1::3] = torch.arange(9.0).view(3, 3, 1)
    got = torch.ops.fila.crop_resize(features, torch.tensor([[0.0, 0.0, 9.0, 9.0]]), torch.tensor([0]), 3)
    assert torch.equal(got[0, :, :, 0], torch.arange(9.0).view(3, 3))


@needs_library
def test_boxes_off_the_map_read_the_border_cell():
    features = torch.randn(1, 4, 6, 3)
    far = [[-9e8, -9e8, -8e8, -8e8], [8e8, 8e8, 9e8, 9e8], [-1e30, 2.0, -1e29, 3.0]]
    got = torch.ops.fila.crop_resize(features, torch.tensor(far), torch.zeros(3, dtype=torch.long), 2)
    for tile, (row, column) in enumerate([(0, 0), (3, 5), (0, 2)]):
        assert torch.equal(got[tile], features[0, row, column].expand(2, 2, 3))


@needs_library
@pytest.mark.parametrize("backend", [native, eager])
def test_boxes_of_any_finite_size_equal_the_definition(backend):
    """They start beyond any map, where the box's own frame has no digits left for the map's cells; forward and back."""
    edges = torch.tensor([[-3e38, 3e38], [-1e30, 2e30], [-1e17, 1e17], [-1e12, 1e12], [-1e9, 1e9], [2.5, 1e25]])
    boxes = torch.stack([edges, edges.flip(0)], dim=-1).flatten(1)
    features = torch.randn(1, 4, 9, 3, dtype=torch.float64, requires_grad=True)
    index, grad = torch.zeros(len(boxes), dtype=torch.long), torch.randn(len(boxes), 5, 5, 3, dtype=torch.float64)
    want = reference.crop_resize(features, boxes, index, 5)
    torch.testing.assert_close(backend.crop_resize(features.detach(), boxes, index, 5), want, rtol=0, atol=1e-12)
    got = backend.crop_resize_backward(grad, boxes, index, (1, 4, 9))
    torch.testing.assert_close(got, torch.autograd.grad(want, features, grad)[0], rtol=0, atol=1e-12)


@needs_library
def test_views_need_no_copy():
    features, boxes, image_index = make_case(4, 12, 10, 8, torch.float32)
    nchw = features.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    wide = torch.randn(3, 24, 30, 8)
    wide[:, ::2, ::3] = features
    strided_boxes = torch.stack([boxes, boxes], dim=-1)[..., 0]
    want = torch.ops.fila.crop_resize(features, boxes, image_index, 5)
    for view in (nchw.permute(0, 2, 3, 1), wide[:, ::2, ::3], features.repeat(1, 2, 1, 1)[:, :12]):
        assert torch.equal(torch.ops.fila.crop_resize(view, strided_boxes, image_index, 5), want)


@needs_library
def test_threads_do_not_change_the_result():
    features, boxes, image_index = make_case(5, 96, 96, 64, torch.bfloat16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = torch.ops.fila.crop_resize(features, boxes, image_index, 24)
        torch.set_num_threads(2)
        two = torch.ops.fila.crop_resize(features, boxes, image_index, 24)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, two)


@needs_library
@pytest.mark.parametrize(("tiles", "channels"), [(0, 4), (2, 0), (0, 0)])
def test_empty_input_gives_an_empty_result(tiles, channels):
    features = torch.randn(1, 3, 3, channels)
    boxes = torch.tensor([[0.0, 0.0, 3.0, 3.0]]).repeat(tiles, 1)
    got = torch.ops.fila.crop_resize(features, boxes, torch.zeros(tiles, dtype=torch.long), 3)
    assert got.shape == (tiles, 3, 3, channels)


def backward_of_the_definition(grad, features, boxes, image_index, size):
    leaf = features.to(grad.dtype).requires_grad_()
    out = reference.crop_resize(leaf, boxes, image_index, size)
    return torch.autograd.grad(out, leaf, grad)[0]


@needs_library
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["dense", "sliced", "zero_stride"])
def test_backward_equals_the_definitions(shape, dtype, layout):
    tiles, height, width, channels, size = shape
    features, boxes, image_index = make_case(tiles, height, width, channels, dtype)
    grad = torch.randn(tiles, size, size, channels).to(dtype)
    if layout == "sliced":
        grad = torch.randn(tiles, 2 * size, size + 3, channels + 5).to(dtype)[:, ::2, 3:, 2:-3]
    elif layout == "zero_stride":
        grad = grad[:, :, :1].expand(-1, -1, size, -1)
    got = torch.ops.fila.crop_resize_backward(grad, boxes, image_index, 3, height, width)
    exact = backward_of_the_definition(grad.double(), features.double(), boxes, image_index, size)
    eager = backward_of_the_definition(grad, features, boxes, image_index, size)
    assert (got.shape, got.dtype) == (features.shape, dtype)
    assert got.is_contiguous()
    assert_close("gradient", got, exact, eager)


@needs_library
@pytest.mark.parametrize("channels", [1, 192])
def test_cells_that_no_sample_reads_get_zero(channels):
    """Small and dense gradients are filled, large and sparse ones come zeroed: 2.4 and 452 million bytes here."""
    features = torch.zeros(1, 768, 768, channels)
    boxes = torch.tensor([[0.0, 0.0, 384.0, 384.0], [384.0, 384.0, 768.0, 768.0]])
    grad = torch.ones(2, 24, 24, channels)
    index = torch.zeros(2, dtype=torch.int32)
    got = torch.ops.fila.crop_resize_backward(grad, boxes, index, *features.shape[:3])
    # 24 samples of 384 cells lie half way between cells 7 and 8, 23 and 24, ...
    read = torch.zeros(768, 768, dtype=torch.bool)
    for corner in (0, 384):
        lines = torch.arange(corner + 7, corner + 384, 16)
        lines = torch.cat([lines, lines + 1])
        read[lines[:, None], lines] = True
    assert torch.equal(got[0, :, :, 0], read * 0.25)
    assert torch.equal(got[0, :, :, -1], read * 0.25)
    assert got.data_ptr() % 64 == 0


@needs_library
def test_backward_is_the_same_for_any_number_of_threads():
    _, boxes, image_index = make_case(7, 96, 96, 64, torch.float32)
    grad = torch.randn(7, 24, 24, 64)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(torch.ops.fila.crop_resize_backward(grad, boxes, image_index, 3, 96, 96))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@needs_library
def test_unchecked_values_are_safe():
    """What the backends call where values were not looked at: indices are clamped, a NaN box gives NaN."""
    features = torch.randn(2, 4, 5, 3)
    boxes = torch.tensor([[float("nan"), 0, 4, 5], [-3e38, -3e38, 3e38, 3e38], [0, 0, 4, 5], [3, 3, 1, 1]])
    index = torch.tensor([0, 1, 2**62, -(2**62)])
    got = torch.ops.fila.crop_resize(features, boxes, index, 4, check_values=False)
    assert torch.isnan(got[0]).all()
    assert torch.equal(got[2], torch.ops.fila.crop_resize(features, boxes[2:3], torch.tensor([1]), 4)[0])
    torch.ops.fila.crop_resize_backward(torch.ones_like(got), boxes, index, 2, 4, 5, check_values=False)


SHARED = torch.zeros(18)
GOOD = {
    "features": torch.zeros(2, 4, 4, 3),
    "boxes": torch.tensor([[0.0, 0.0, 4.0, 4.0]]),
    "image_index": torch.tensor([1]),
    "size": 2,
}


@needs_library
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(4, 4, 3)}, r"expected features of shape \[B, h, w, C\], got \[4, 4, 3\]"),
        ({"features": torch.zeros(2, 4, 4, 3).half()}, "dtype float32, bfloat16 or float64, got Half"),
        ({"features": torch.zeros(2, 3, 4, 4).permute(0, 2, 3, 1)}, "unit stride over channels, got 16"),
        ({"features": torch.zeros(2, 0, 4, 3)}, "at least one map of at least one cell, got 2 of 0 x 4"),
        ({"boxes": torch.zeros(1, 5)}, r"boxes of shape \[T, 4\], got \[1, 5\]"),
        ({"boxes": torch.zeros(1, 4).double()}, "boxes of dtype float32, got Double"),
        ({"boxes": torch.tensor([[0.0, float("nan"), 1.0, 1.0]])}, r"finite boxes .* got \[0, nan, 1, 1\] at tile 0"),
        ({"boxes": torch.tensor([[2.0, 0.0, 1.0, 1.0]])}, r"y0 < y1 .* got \[2, 0, 1, 1\] at tile 0"),
        ({"boxes": torch.tensor([[1.0, 0.0, 1.0, 1.0]])}, r"y0 < y1 .* got \[1, 0, 1, 1\] at tile 0"),
        ({"image_index": torch.tensor([0, 1])}, r"image_index of shape \[1\] .* got \[2\]"),
        ({"image_index": torch.tensor([1.0])}, "dtype int32 or int64, got Float"),
        ({"image_index": torch.tensor([2])}, "image_index between 0 and 1, got 2 at tile 0"),
        ({"image_index": torch.tensor([-1], dtype=torch.int32)}, "between 0 and 1, got -1 at tile 0"),
        (
            {"boxes": torch.zeros(1, 4).expand(2**40, 4), "image_index": torch.zeros(1).int().expand(2**40)},
            "at most 16777216 boxes, got 1099511627776",
        ),
        ({"size": 0}, "size between 1 and 16777216, got 0"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        torch.ops.fila.crop_resize(**{**GOOD, **change})


@needs_library
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": torch.zeros(1, 2, 3, 3)}, r"grad of shape \[T, size, size, C\], got \[1, 2, 3, 3\]"),
        ({"grad": torch.zeros(1, 2, 2)}, r"grad of shape \[T, size, size, C\], got \[1, 2, 2\]"),
        ({"grad": torch.zeros(1, 2, 2, 3, dtype=torch.int32)}, "grad of dtype float32, bfloat16 or float64, got Int"),
        ({"grad": torch.zeros(1, 3, 2, 2).permute(0, 2, 3, 1)}, "unit stride over channels, got 4"),
        ({"boxes": torch.zeros(2, 4)}, r"boxes of shape \[1, 4\] .one a tile of grad., got \[2, 4\]"),
        ({"image_index": torch.tensor([2])}, "image_index between 0 and 1, got 2 at tile 0"),
        ({"height": -1}, "images, height and width between 0 and 16777216, got 2, -1 and 4"),
        ({"width": 0}, "at least one map of at least one cell, got 2 of 4 x 0"),
        ({"images": 2**24, "height": 2**24, "width": 2**24}, "a gradient of fewer than 2.60 elements"),
    ],
)
def test_bad_input_of_the_backward_is_refused_by_name(change, message):
    good = {"grad": torch.zeros(1, 2, 2, 3), "boxes": GOOD["boxes"], "image_index": GOOD["image_index"]}
    with pytest.raises(ValueError, match=message):
        torch.ops.fila.crop_resize_backward(**{**good, "images": 2, "height": 4, "width": 4, **change})


def cvfm_arguments(**change):
    arguments = {
        "tokens": torch.zeros(1, 5, 6), "features": torch.zeros(2, 4, 4, 3), "boxes": GOOD["boxes"],
        "image_index": GOOD["image_index"], "fc1_weight": torch.zeros(7, 9), "fc1_bias": torch.zeros(7),
        "fc2_weight": torch.zeros(6, 7), "fc2_bias": torch.zeros(6), "alpha": torch.ones(1), "num_prefix_tokens": 1,
        "gate": "product", "plan": "sample_first",
    }  # fmt: skip
    return {**arguments, **change}


@needs_library
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": "open"}, "gate 'product' or 'scale', got 'open'"),
        ({"plan": "single_pass"}, "plan 'sample_first' or 'project_first', got 'single_pass'"),
        ({"tokens": torch.zeros(5, 6)}, r"tokens of shape \[T, P \+ N, D\], got \[5, 6\]"),
        ({"tokens": torch.zeros(1, 6, 6)}, "a square number of patch tokens, got .1, 6, 6. and 1"),
        ({"num_prefix_tokens": -4}, "num_prefix_tokens of 0 or more"),
        ({"tokens": torch.zeros(1, 6, 5).transpose(1, 2)}, "tokens with a last stride of 1, got 5"),
        ({"tokens": torch.zeros(1, 5, 6).double()}, "tokens of dtype Float .as features., got Double"),
        ({"boxes": torch.zeros(2, 4)}, r"boxes of shape \[1, 4\] .as tokens., got \[2, 4\]"),
        ({"fc1_weight": torch.zeros(7, 8)}, r"fc1_weight of shape \[H, D \+ C\] = \[7, 9\], got \[7, 8\]"),
        ({"fc1_bias": torch.zeros(6)}, r"fc1_bias of shape \[H\] = \[7\], got \[6\]"),
        ({"fc2_weight": torch.zeros(7, 6)}, r"fc2_weight of shape \[D, H\] = \[6, 7\], got \[7, 6\]"),
        ({"fc2_bias": torch.zeros(6).double()}, "fc2_bias of dtype Float .as features., got Double"),
        ({"tokens": torch.zeros(1, 5, 6).bfloat16()}, "tokens of dtype Float .as features., got BFloat16"),
        ({"alpha": torch.ones(())}, r"alpha of shape \[1\] = \[1\], got \[\]"),
        ({"hidden": torch.zeros(4, 6)}, r"hidden of shape .T \* N, width. = \[4, 7\], got \[4, 6\]"),
        ({"branch": torch.zeros(6, 4).t()}, "a contiguous branch"),
        ({"image_index": torch.tensor([2])}, "image_index between 0 and 1, got 2 at tile 0"),
    ],
)
def test_bad_input_of_the_fused_forward_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        torch.ops.fila.cvfm_forward(**cvfm_arguments(**change))


@needs_library
@pytest.mark.parametrize("read", ["tokens", "features", "fc1_weight", "fc2_bias"])
@pytest.mark.parametrize("written", ["hidden", "branch"])
def test_what_is_written_to_lies_in_memory_of_its_own(read, written):
    shared = torch.zeros(1000)
    arguments = cvfm_arguments(hidden=torch.zeros(4, 7), branch=torch.zeros(4, 6))
    # The last element of the one is the first of the other.
    arguments[read] = shared[: arguments[read].numel()].view(arguments[read].shape)
    begin = arguments[read].numel() - 1
    arguments[written] = shared[begin : begin + arguments[written].numel()].view(arguments[written].shape)
    with pytest.raises(ValueError, match=f"{written}, which is written to, in other memory than {read}"):
        torch.ops.fila.cvfm_forward(**arguments)
    begin += 1
    arguments[written] = shared[begin : begin + arguments[written].numel()].view(arguments[written].shape)
    torch.ops.fila.cvfm_forward(**arguments)


@needs_library
@pytest.mark.parametrize("elsewhere", ["tokens", "boxes", "image_index", "fc1_weight", "alpha", "hidden"])
def test_tensors_of_two_devices_are_refused(elsewhere):
    arguments = cvfm_arguments(hidden=torch.zeros(4, 7))
    arguments[elsewhere] = arguments[elsewhere].to("meta")
    with pytest.raises(ValueError, match="expected all tensors on one device, got cpu, meta"):
        torch.ops.fila.cvfm_forward(**arguments)


@needs_library
def test_the_kept_tensors_do_not_overlap():
    shared = torch.zeros(1000)
    arguments = cvfm_arguments(hidden=shared[:28].view(4, 7), branch=shared[27:51].view(4, 6))
    with pytest.raises(ValueError, match="branch, which is written to, in other memory than hidden"):
        torch.ops.fila.cvfm_forward(**arguments)


@needs_library
@pytest.mark.parametrize("plan", ["sample_first", "project_first"])
@pytest.mark.parametrize("gate", ["product", "scale"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fused_forward_keeps_what_the_backward_pass_needs_and_changes_no_bit(plan, gate, dtype):
    """Tiles of 24 x 24 tokens in several blocks of rows; weights that are no dense matrices are taken too."""
    tiles, width, channels, hidden_width = 5, 320, 48, 1024
    wide = torch.randn(hidden_width, width + channels + 3).to(dtype) / 20
    arguments = cvfm_arguments(
        tokens=torch.randn(tiles, 577, width).to(dtype), features=torch.randn(2, 30, 40, channels).to(dtype),
        boxes=torch.tensor([[0.0, 0.0, 24.0, 24.0], [3.5, 4.25, 29.0, 38.5]])[[0, 1, 1, 0, 1]],
        image_index=torch.randint(2, (tiles,)), fc1_weight=wide[:, :-3], fc1_bias=torch.randn(hidden_width).to(dtype),
        fc2_weight=torch.randn(width, hidden_width).to(dtype) / 30, fc2_bias=torch.randn(width).to(dtype),
        alpha=torch.tensor([0.7], dtype=dtype), gate=gate, plan=plan,
    )  # fmt: skip
    hidden = torch.full((tiles * 576, hidden_width), float("nan"), dtype=dtype)
    branch = torch.full((tiles * 576, width), float("nan"), dtype=dtype)
    kept = torch.ops.fila.cvfm_forward(**arguments, hidden=hidden, branch=branch)
    assert torch.equal(kept, torch.ops.fila.cvfm_forward(**arguments))
    arguments["fc1_weight"] = arguments["fc1_weight"].contiguous()
    named = {name: arguments[name] for name in list(arguments)[:9]}
    exact = reference.cvfm(**in_double(named),
                           gate=gate)  # fmt: skip
    eager = reference.cvfm(**named, gate=gate)
    assert_close("kept", kept, exact, eager)
    assert_close("out", torch.ops.fila.cvfm_forward(**arguments), exact, eager)
    torch.testing.assert_close(
        branch, torch.nn.functional.linear(torch.nn.functional.gelu(hidden), named["fc2_weight"], named["fc2_bias"])
    )


@needs_library
@pytest.mark.parametrize("plan", ["sample_first", "project_first"])
@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_float32_tokens_of_a_bfloat16_call_are_rounded_for_the_products_alone(plan, alpha):
    case = Case("mixed", tiles=5, token_width=150, alpha=alpha)
    arguments = case.inputs(torch.bfloat16) | {"num_prefix_tokens": 1, "gate": "product", "plan": plan}
    wide = case.inputs(torch.float32)["tokens"]
    low = torch.ops.fila.cvfm_forward(**arguments)
    # What bfloat16 holds exactly, it only adds up without rounding; prefix tokens and a closed gate change nothing.
    same = torch.ops.fila.cvfm_forward(**arguments | {"tokens": arguments["tokens"].float()})
    assert same.dtype == torch.float32
    assert torch.equal(same.bfloat16(), low)
    out = torch.ops.fila.cvfm_forward(**arguments | {"tokens": wide})
    passing = None if alpha == 0 else 1
    assert torch.equal(out[:, :passing], wide[:, :passing])
    torch.testing.assert_close(out - wide, same - arguments["tokens"].float(), rtol=0, atol=1e-6)


@needs_library
def test_gate_backward_reads_a_float32_gradient_of_a_bfloat16_call():
    m, alpha = torch.randn(37, 150).bfloat16(), torch.tensor([0.7]).bfloat16()
    grad, out = torch.randn(37, 150), torch.empty_like(m)
    total = torch.ops.fila.gate_backward(grad, m, alpha, out)
    exact = torch.empty(37, 150)
    expected = torch.ops.fila.gate_backward(grad, m.float(), alpha.float(), exact)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-6 * float((grad * m).norm()))
    assert torch.equal(out, exact.bfloat16())


@needs_library
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_gate_backward_is_the_derivative_of_the_gate(dtype, scale):
    m, grad = (torch.randn(37, 150) * scale).to(dtype), torch.randn(37, 155).to(dtype)[:, 3:-2]
    alpha = torch.tensor([0.7], dtype=dtype)

    def derivative(kind):
        leaves = m.to(kind).requires_grad_(), alpha.to(kind).requires_grad_()
        return torch.autograd.grad((leaves[0] * leaves[1]).tanh(), leaves, grad.to(kind))

    out = torch.full_like(m, float("nan"))
    total = torch.ops.fila.gate_backward(grad, m, alpha, out)
    exact, eager = derivative(torch.float64), derivative(dtype)
    assert_close("out", out, exact[0], eager[0])
    roundings = rounding.of_gate_backward(grad.double(), m.double(), alpha.double(), dtype)
    assert_close("alpha", total.to(dtype), exact[1], eager[1], roundings["alpha"])


@needs_library
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": torch.zeros(4)}, r"grad of shape \[rows, D\], got \[4\]"),
        ({"grad": torch.zeros(4, 3).bfloat16()}, "grad of dtype Float .as branch., got BFloat16"),
        ({"grad": torch.zeros(4, 3).half()}, "dtype float32, bfloat16 or float64, got Half"),
        ({"branch": torch.zeros(4, 2)}, r"branch of shape \[4, 3\] .as grad., got \[4, 2\]"),
        ({"out": torch.zeros(4, 3).double()}, "out of dtype Float .as branch., got Double"),
        ({"out": torch.zeros(4, 6)[:, :3]}, "a contiguous out"),
        ({"branch": torch.zeros(3, 4).t()}, "branch with a last stride of 1, got 4"),
        ({"alpha": torch.zeros(2)}, r"alpha of shape \[1\], got \[2\]"),
        ({"grad": SHARED[:12].view(4, 3), "out": SHARED[6:18].view(4, 3)}, "out, .* in other memory than grad"),
        ({"branch": SHARED[:12].view(4, 3), "out": SHARED[:12].view(4, 3)}, "out, .* in other memory than branch"),
        ({"alpha": SHARED[2:3], "out": SHARED[:12].view(4, 3)}, "out, .* in other memory than alpha"),
    ],
)
def test_bad_input_of_the_gate_is_refused_by_name(change, message):
    good = {"grad": torch.zeros(4, 3), "branch": torch.zeros(4, 3), "alpha": torch.ones(1), "out": torch.zeros(4, 3)}
    with pytest.raises(ValueError, match=message):
        torch.ops.fila.gate_backward(**{**good, **change})


@needs_library
def test_ten_thousand_mutated_calls_are_refused_or_right():
    """In a process of its own: a crash is a failure here, not the end of the tests."""
    script = Path(__file__).resolve().parent / "fuzz_native.py"
    root = script.parents[2]
    done = subprocess.run(
        [sys.executable, str(script), "10000", "0"], capture_output=True, text=True, check=False, cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr[-3000:]}"
    ran, refused, judged = (int(word) for word in re.findall(r"\d+", done.stdout))
    assert ran > 1000
    assert refused > 1000
    assert judged > 1000


@needs_library
@pytest.mark.parametrize("name", fuzz_native.FUZZED)
def test_a_fuzzed_result_one_percent_off_is_found(name, monkeypatch):
    honest = fuzz_native.operator
    monkeypatch.setattr(fuzz_native, "FUZZED", (name,))
    fuzz_native.fuzz(100, 0)
    monkeypatch.setattr(fuzz_native, "operator", lambda name: lambda **arguments: honest(name)(**arguments) * 1.01)
    with pytest.raises(AssertionError, match=f"{name} result: error"):
        fuzz_native.fuzz(100, 0)


@needs_library
@pytest.mark.parametrize("name", ["hidden", "branch"])
def test_a_kept_tensor_that_is_not_written_is_found(name, monkeypatch):
    honest = fuzz_native.operator
    monkeypatch.setattr(fuzz_native, "FUZZED", ("cvfm_forward",))
    monkeypatch.setattr(fuzz_native, "operator", lambda op: lambda **given: honest(op)(**given | {name: None}))
    with pytest.raises(AssertionError, match=f"{name}: error inf"):
        fuzz_native.fuzz(100, 0)


@needs_library
@pytest.mark.parametrize("name", ["fc1_bias", "fc2_bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_bias_of_any_stride(name, dtype):
    """oneDNN reads a bias as if it were dense."""
    arguments = {n: torch.randn_like(t) if t.is_floating_point() and n != "boxes" else t
                 for n, t in cvfm_arguments().items() if isinstance(t, torch.Tensor)}  # fmt: skip
    arguments = {n: t.to(dtype) if t.is_floating_point() and n != "boxes" else t for n, t in arguments.items()}
    call = {"num_prefix_tokens": 1, "gate": "product", "plan": "sample_first"}
    for bias in (arguments[name][:1].expand_as(arguments[name]), arguments[name].repeat_interleave(2)[::2]):
        want = torch.ops.fila.cvfm_forward(**arguments | {name: bias.contiguous()}, **call)
        assert torch.equal(torch.ops.fila.cvfm_forward(**arguments | {name: bias}, **call), want)


@needs_library
def test_opcheck():
    features, boxes, image_index = make_case(2, 6, 7, 4, torch.float32)
    torch.library.opcheck(torch.ops.fila.crop_resize.default, (features, boxes, image_index, 3))
    grad = torch.randn(2, 3, 3, 4)
    torch.library.opcheck(torch.ops.fila.crop_resize_backward.default, (grad, boxes, image_index, 3, 6, 7))
    gate = (torch.randn(4, 3), torch.randn(4, 3), torch.ones(1), torch.empty(4, 3))
    torch.library.opcheck(torch.ops.fila.gate_backward.default, gate)
    fused = tuple(cvfm_arguments().values())
    torch.library.opcheck(torch.ops.fila.cvfm_forward.default, fused)
    torch.library.opcheck(torch.ops.fila.cvfm_forward.default, (*fused, torch.empty(4, 7), torch.empty(4, 6)))


@needs_library
def test_only_stable_symbols_are_used():
    """One binary for every torch from 2.11 on: nothing of torch but its C functions, besides the C and C++ runtimes."""
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    listing = subprocess.check_output(["nm", "-D", "--undefined-only", str(library.LIBRARY)], text=True)
    symbols = [line.split()[-1] for line in listing.splitlines()]
    of_torch = [name for name in symbols if "@" not in name and not name.startswith(("_ITM_", "__gmon_start__"))]
    assert "torch_library_impl" in of_torch
    strange = [name for name in of_torch if not name.startswith(("aoti_torch_", "torch_"))]
    assert not strange, f"symbols outside the stable ABI: {strange}"
    of_runtime = [name for name in symbols if "@" in name]
    versions = {name.split("@")[1].strip("@").split("_")[0] for name in of_runtime}
    assert versions <= {"GLIBC", "GLIBCXX", "CXXABI", "GCC"}, versions


def test_a_missing_library_is_reported_with_its_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "libfila_kernels.so")
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    assert library.load.__wrapped__()[0] is False
    (tmp_path / "not_built.txt").write_text("no C++ compiler was found\n")
    assert library.load.__wrapped__() == (False, "not built: no C++ compiler was found")


@needs_library
def test_a_library_of_older_sources_is_reported(monkeypatch):
    monkeypatch.setattr(library, "OPERATORS", (*library.OPERATORS, "of_a_later_version"))
    loaded, reason = library.load.__wrapped__()
    assert not loaded
    assert "built from older sources and lacks of_a_later_version" in reason


def test_a_broken_library_is_reported_not_raised(monkeypatch, tmp_path):
    (tmp_path / "libfila_kernels.so").write_bytes(b"not a library")
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "libfila_kernels.so")
    loaded, reason = library.load.__wrapped__()
    assert not loaded
    assert "cannot load it" in reason
