"""The compiled CUDA operators called directly, on a GPU: what they refuse, layouts, streams, graphs and large maps.

The case matrix runs in test_gpu.py, on this backend as on all.
"""

import pytest
import torch
from cases import Case, assert_close

from fila_kernels import dispatch, native, reference

USABLE, REASON = dispatch.available("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not USABLE, reason=REASON)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def example(dtype: torch.dtype, channels: int, size: int = 6):
    case = Case("native", tiles=7, images=3, height=21, width=18, feature_width=channels)
    inputs = case.inputs(dtype)
    return inputs["features"], inputs["boxes"], inputs["image_index"], size


def backward_of_the_definition(grad, features, boxes, image_index, size):
    leaf = features.to(grad.dtype).requires_grad_()
    return torch.autograd.grad(reference.crop_resize(leaf, boxes, image_index, size), leaf, grad)[0]


@pytest.mark.parametrize("channels", [1, 7, 8, 64, 404])
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_directions_equal_the_definition(dtype, channels):
    features, boxes, image_index, size = example(dtype, channels)
    on_gpu = boxes.cuda(), image_index.cuda()
    got = torch.ops.fila.crop_resize(features.cuda(), *on_gpu, size)
    exact = reference.crop_resize(features.double(), boxes, image_index, size)
    assert_close("out", got.cpu(), exact, reference.crop_resize(features, boxes, image_index, size))
    grad = torch.randn(exact.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    back = torch.ops.fila.crop_resize_backward(grad.cuda(), *on_gpu, *features.shape[:3])
    exact = backward_of_the_definition(grad.double(), features, boxes, image_index, size)
    eager = backward_of_the_definition(grad, features, boxes, image_index, size)
    assert_close("gradient", back.cpu(), exact, eager)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_layout_gives_the_same_bits(dtype):
    """Sliced, strided and misaligned maps, boxes and indices: vectors of 16 bytes and single elements agree."""
    features, boxes, image_index, size = example(dtype, 16)
    features, boxes, image_index = features.cuda(), boxes.cuda(), image_index.cuda()
    want = torch.ops.fila.crop_resize(features, boxes, image_index, size)
    wide = torch.full((3, 42, 19, 21), float("nan"), dtype=dtype, device="cuda")
    wide[:, ::2, 1:, 3:19] = features
    odd_boxes = torch.stack([boxes, boxes], dim=-1)[..., 1]
    for index in (image_index, image_index.int(), torch.stack([image_index, image_index], dim=1)[:, 0]):
        got = torch.ops.fila.crop_resize(wide[:, ::2, 1:, 3:19], odd_boxes, index, size)
        assert torch.equal(got, want)
    grad = torch.randn_like(want)
    back = torch.ops.fila.crop_resize_backward(grad, boxes, image_index, *features.shape[:3])
    padded = torch.full((7, 6, 6, 19), float("nan"), dtype=dtype, device="cuda")
    padded[..., 1:17] = grad
    again = torch.ops.fila.crop_resize_backward(padded[..., 1:17], odd_boxes, image_index.int(), *features.shape[:3])
    assert torch.equal(again, back)


@pytest.mark.parametrize("width", [1, 13, 64, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gates_derivative(dtype, width):
    generator = torch.Generator().manual_seed(3)
    grad, branch = (torch.randn(3000, width, generator=generator).to(dtype) for _ in range(2))
    alpha = torch.tensor([0.7], dtype=dtype)

    def derivative(kind):
        leaves = branch.to(kind).requires_grad_(), alpha.to(kind).requires_grad_()
        return torch.autograd.grad((leaves[0] * leaves[1]).tanh(), leaves, grad.to(kind))

    out = torch.full_like(branch, float("nan"), device="cuda")
    total = torch.ops.fila.gate_backward(grad.cuda(), branch.cuda(), alpha.cuda(), out)
    exact, eager = derivative(torch.float64), derivative(dtype)
    assert_close("out", out.cpu(), exact[0], eager[0])
    terms = (1 - torch.tanh(alpha.double() * branch.double()) ** 2) * grad.double() * branch.double()
    assert abs(total.item() - exact[1].item()) <= 8 * torch.finfo(torch.float32).eps * terms.norm()
    again = torch.ops.fila.gate_backward(grad.cuda(), branch.cuda(), alpha.cuda(), out)
    assert torch.equal(again, total)


def test_the_callers_stream_and_graphs_are_used():
    features, boxes, image_index, size = (t.cuda() if torch.is_tensor(t) else t for t in example(torch.float32, 8))
    want = torch.ops.fila.crop_resize(features, boxes, image_index, size)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(features)
        torch.cuda._sleep(10**7)
        late.copy_(features)
        got = torch.ops.fila.crop_resize(late, boxes, image_index, size)
    stream.synchronize()
    assert torch.equal(got, want), "launched on another stream than the copy before it"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.ops.fila.crop_resize(features, boxes, image_index, size)
    features.mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, 2 * want)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 16 * 2**30, reason="needs 16 GiB of GPU memory"
)
def test_maps_of_more_than_2_to_the_31_elements():
    side, channels = 16384, 9
    features = torch.zeros(1, side, side, channels, dtype=torch.bfloat16, device="cuda")
    corner = torch.arange(16 * channels, device="cuda", dtype=torch.bfloat16).view(4, 4, channels)
    features[0, -4:, -4:] = corner
    box = torch.tensor([[side - 4.0, side - 4.0, side, side]], device="cuda")
    index = torch.zeros(1, dtype=torch.int32, device="cuda")
    got = torch.ops.fila.crop_resize(features, box, index, 4)
    assert torch.equal(got[0], corner)
    del features
    back = torch.ops.fila.crop_resize_backward(got, box, index, 1, side, side)
    assert torch.equal(back[0, -4:, -4:], corner)
    assert int(torch.count_nonzero(back)) == int(torch.count_nonzero(corner))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": torch.zeros(7, 4)}, "expected boxes on CUDA device 0, got the CPU"),
        ({"image_index": torch.zeros(7, dtype=torch.int64)}, "expected image_index on CUDA device 0, got the CPU"),
        ({"features": torch.zeros(3, 21, 18, 8)}, "expected features on a CUDA device, got the CPU"),
        ({"size": 0}, "size between 1 and 16777216, got 0"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    features, boxes, image_index, size = example(torch.float32, 8)
    good = dict(features=features.cuda(), boxes=boxes.cuda(), image_index=image_index.cuda(), size=size)
    with pytest.raises(ValueError, match=message):
        torch.ops.fila.crop_resize(**good | change)
    double = good["features"].double()
    with pytest.raises(ValueError, match="dtype float32, bfloat16 or float16, got Double"):
        torch.ops.fila.crop_resize(**good | {"features": double})


def test_empty_input_is_no_launch():
    features, boxes, image_index, size = (t.cuda() if torch.is_tensor(t) else t for t in example(torch.float32, 8))
    assert torch.ops.fila.crop_resize(features, boxes[:0], image_index[:0], size).shape == (0, size, size, 8)
    assert torch.ops.fila.crop_resize(features[..., :0], boxes, image_index, size).shape == (7, size, size, 0)
    grad = torch.zeros(0, size, size, 8, device="cuda")
    back = torch.ops.fila.crop_resize_backward(grad, boxes[:0], image_index[:0], 3, 21, 18)
    assert torch.equal(back, torch.zeros(3, 21, 18, 8, device="cuda"))


def test_the_library_says_what_it_was_built_for():
    build = native.build()
    assert build is not None
    assert build.runs_on(torch.cuda.get_device_capability())
