"""The compiled CUDA operators called directly on a GPU: refused arguments, layouts, streams, graphs and large maps.

test_gpu.py runs the case matrix on this backend as on all. The compiled products do not take its odd widths, so it
runs here again at widths that they take.
"""

from dataclasses import replace

import pytest
import torch
from gpu_checks import check, on_device

from fila_kernels import cvfm, dispatch, reference, rounding
from fila_kernels.backends import native, products
from fila_kernels.backends.native import library
from fila_kernels.testing import CASES, Case, assert_close, ids, in_double, options

USABLE, REASON = dispatch.available("native", torch.device("cuda", 0))
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not USABLE, reason=REASON)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


LOW = (torch.bfloat16, torch.float16)
PLANS = ("sample_first", "project_first")


def with_products(case: Case) -> Case:
    """The case at widths rounded up to what the compiled products take."""
    widths = {name: getattr(case, name) for name in ("token_width", "hidden_width", "feature_width")}
    return replace(case, **{name: -(-width // native.ALIGNMENT) * native.ALIGNMENT for name, width in widths.items()})


PRODUCTS = [with_products(case) for case in CASES]
# Rows are no multiple of the kernel's 128; channels are less than one step of its loop and a half, and many of them.
SINGLE_PASS = [
    Case(f"single_pass_{channels}", tiles=3, grid=7, token_width=1024, hidden_width=1024, feature_width=channels)
    for channels in (72, 1536)
]


@pytest.fixture
def only_compiled(monkeypatch):
    """PyTorch's composition of the forward pass must not stand in for the compiled operator."""

    def refuse(*arguments, **settings):
        raise AssertionError("the composition of the forward pass was called")

    monkeypatch.setattr(products, "forward", refuse)


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


@pytest.mark.parametrize("width", [13, 1024])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gates_derivative_of_a_float32_gradient(dtype, width):
    grad, branch = torch.randn(3000, width, device="cuda"), torch.randn(3000, width, device="cuda").to(dtype)
    alpha, out = torch.tensor([0.7], dtype=dtype, device="cuda"), torch.empty_like(branch)
    total, exact = torch.ops.fila.gate_backward(grad, branch, alpha, out), torch.empty_like(grad)
    expected = torch.ops.fila.gate_backward(grad, branch.float(), alpha.float(), exact)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5 * float((grad * branch).norm()))
    assert torch.equal(out, exact.to(dtype))


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
    build = library.build()
    assert build is not None
    assert build.runs_on(torch.cuda.get_device_capability())


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("gate", ["product", "scale"])
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("case", PRODUCTS, ids=ids)
def test_the_compiled_products_over_the_case_matrix(only_compiled, case, dtype, gate, plan):
    check(case, "native", dtype, gate, plan=plan)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("alpha", [0.7, 0.0, 0.01])
def test_the_compiled_products_keep_a_float32_residual_under_autocast(only_compiled, alpha, dtype, plan):
    for case in (FUSED, with_products(Case("sliced", layout="sliced"))):
        check(replace(case, alpha=alpha), "native", dtype, plan=plan, autocast=True)


@pytest.fixture
def single_pass():
    obstacle = dispatch._single_pass_obstacle("native", torch.device("cuda", 0), torch.bfloat16, (1024, 1024))
    if obstacle:
        pytest.skip(obstacle)


@pytest.mark.parametrize("gate", ["product", "scale"])
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("case", SINGLE_PASS, ids=ids)
def test_single_pass_and_what_it_keeps(only_compiled, single_pass, case, dtype, gate):
    inputs = case.inputs(dtype)
    gpu = on_device(inputs, "cuda")
    kept = {
        name: torch.full((case.tiles * case.grid**2, width), float("nan"), dtype=dtype, device="cuda")
        for name, width in (("hidden", case.hidden_width), ("branch", case.token_width))
    }
    call = options(case) | {"gate": gate, "plan": "single_pass"}
    out = torch.ops.fila.cvfm_forward(**gpu, **call, **kept)
    judge_forward(inputs, case.prefix, gate, out, **kept)
    assert torch.equal(torch.ops.fila.cvfm_forward(**gpu, **call), out)
    check(case, "native", dtype, gate, plan="single_pass")
    for alpha in (0.7, 0.01):
        check(replace(case, alpha=alpha), "native", dtype, gate, plan="single_pass", autocast=True)


def judge_forward(inputs, prefix, gate, out, hidden, branch):
    """All three results against the definition's, on the CPU."""

    def defined(kind):
        cast = {name: t.to(kind) if t.is_floating_point() and name != "boxes" else t for name, t in inputs.items()}
        patches = cast["tokens"][:, prefix:]
        size = round(patches.shape[1] ** 0.5)
        sampled = reference.crop_resize(cast["features"], cast["boxes"], cast["image_index"], size).flatten(1, 2)
        z = torch.nn.functional.linear(torch.cat([patches, sampled], -1), cast["fc1_weight"], cast["fc1_bias"])
        m = torch.nn.functional.linear(torch.nn.functional.gelu(z), cast["fc2_weight"], cast["fc2_bias"])
        return reference.cvfm(**cast, num_prefix_tokens=prefix, gate=gate), z.flatten(0, 1), m.flatten(0, 1)

    wide, narrow = defined(torch.float64), defined(out.dtype)
    roundings = rounding.of_cvfm(in_double(inputs), out.dtype, gate=gate, num_prefix_tokens=prefix)
    for name, found, exact, eagerly in zip(
        ("out", "hidden", "branch"), (out, hidden, branch), wide, narrow, strict=True
    ):
        assert_close(name, found.cpu(), exact, eagerly, roundings[name])


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", LOW)
def test_what_the_products_keep_is_the_definitions(dtype, plan):
    case = Case("kept", tiles=37, grid=7, token_width=48, hidden_width=64, feature_width=32)
    inputs = case.inputs(dtype)
    kept = {
        name: torch.full((case.tiles * case.grid**2, width), float("nan"), dtype=dtype, device="cuda")
        for name, width in (("hidden", case.hidden_width), ("branch", case.token_width))
    }
    out = torch.ops.fila.cvfm_forward(**on_device(inputs, "cuda"), **options(case), gate="product", plan=plan, **kept)
    judge_forward(inputs, case.prefix, "product", out, **kept)


FUSED = Case("fused", tiles=9, grid=7, token_width=64, hidden_width=128, feature_width=32)


@pytest.mark.parametrize("plan", PLANS)
def test_the_fused_pass_follows_streams_and_graphs(only_compiled, plan):
    """Late inputs on a side stream, and inputs changed after a capture: both as a plain call has them."""
    first, second = (on_device(FUSED.inputs(torch.bfloat16, seed), "cuda") for seed in (0, 1))
    settings = {"plan": plan, "backend": "native"}
    wanted = [cvfm(**inputs, **settings) for inputs in (first, second)]
    assert not torch.equal(*wanted)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = {name: torch.zeros_like(tensor) for name, tensor in first.items()}
        torch.cuda._sleep(10**7)
        for name, tensor in first.items():
            late[name].copy_(tensor)
        got = cvfm(**late, **settings)
    stream.synchronize()
    assert torch.equal(got, wanted[0]), "launched on another stream than the copies before it"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cvfm(**late, **settings)
    for inputs, want in zip((second, first), reversed(wanted), strict=True):
        for name, tensor in inputs.items():
            late[name].copy_(tensor)
        captured.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, want)


@pytest.mark.parametrize("plan", PLANS)
def test_autocast_does_not_reach_into_the_operator(plan):
    """The projection is PyTorch's own product, which autocast would hand on in its dtype."""
    inputs = on_device(FUSED.inputs(torch.bfloat16), "cuda")
    call = options(FUSED) | {"gate": "product", "plan": plan}
    want = torch.ops.fila.cvfm_forward(**inputs, **call)
    with torch.autocast("cuda", torch.float16):
        got = torch.ops.fila.cvfm_forward(**inputs, **call)
    assert got.dtype == want.dtype
    assert torch.equal(got, want)
