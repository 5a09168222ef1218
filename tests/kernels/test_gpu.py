"""Every backend that runs on this GPU over the case matrix, forward and backward, against the definition in float64.

`make gpu` runs the tests marked gpu before it times anything. The definition runs on the CPU, so that nothing a driver
does can make both sides wrong alike.
"""

import pytest
import torch
from cases import CASES, DIFFERENTIABLE, REAL, Case, assert_close, gradients, ids, options

from bench.verify import alpha_terms
from fila_kernels import crop_resize, cvfm, dispatch, reference

BACKENDS = [name for name in dispatch.BACKENDS if name != "reference" and dispatch.available(name)[0]]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def on_gpu(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies with the same strides, what lies between sliced rows filled with NaN."""
    moved = {}
    for name, tensor in inputs.items():
        if tensor.is_contiguous() or not tensor.is_floating_point():
            moved[name] = tensor.cuda()
            continue
        size = 1 + sum((extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.stride(), strict=True))
        storage = torch.full((size,), float("nan"), dtype=tensor.dtype, device="cuda")
        moved[name] = storage.as_strided(tensor.shape, tensor.stride()).copy_(tensor)
    return moved


def check(case: Case, backend: str, dtype: torch.dtype, gate: str, wanted=DIFFERENTIABLE, **settings) -> None:
    inputs = case.inputs(dtype)
    wide = {name: t.double() if name in DIFFERENTIABLE else t for name, t in inputs.items()}
    grad = torch.randn(inputs["tokens"].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grad = grad.to(dtype)
    common = options(case) | {"gate": gate}
    exact_out, exact = gradients(reference.cvfm, wide, grad, wanted, **common)
    gpu = on_gpu(inputs)
    eager_out, eager = gradients(reference.cvfm, gpu, grad.cuda(), wanted, **common)
    out, found = gradients(cvfm, gpu, grad.cuda(), wanted, backend=backend, **common, **settings)
    assert_close("out", out.cpu(), exact_out, eager_out.cpu())
    for name in wanted:
        largest = alpha_terms(wide, grad, gate, case.prefix) if name == "alpha" else None
        assert_close(name, found[name].cpu(), exact[name], eager[name].cpu(), largest)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", CASES, ids=ids)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matrix(backend, case, dtype):
    check(case, backend, dtype, "product")


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("plain", "closed_gate", "negative_gate")], ids=ids)
@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_gate_and_float16(backend, case):
    check(case, backend, torch.float16, "scale")


@pytest.mark.parametrize(
    "settings", [{"plan": "sample_first"}, {"plan": "project_first"}, {"recompute": True}], ids=str
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_real_shape_by_every_plan(backend, settings):
    check(REAL, backend, torch.bfloat16, "product", **settings)


@pytest.mark.parametrize("frozen", DIFFERENTIABLE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_input_frozen(backend, frozen):
    wanted = tuple(name for name in DIFFERENTIABLE if name != frozen)
    check(Case("frozen"), backend, torch.bfloat16, "product", wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_are_equal_to_the_last_bit(backend):
    """No atomics anywhere: forward and backward, many tiles on one map, whose samples share cells."""
    case = Case(
        "repeat", tiles=40, grid=8, token_width=64, hidden_width=96, feature_width=32, images=1, height=16, width=16
    )
    inputs = on_gpu(case.inputs(torch.bfloat16))
    grad = torch.randn_like(inputs["tokens"])
    out, found = gradients(cvfm, inputs, grad, backend=backend)
    for _ in range(10):
        again_out, again = gradients(cvfm, inputs, grad, backend=backend)
        assert torch.equal(again_out, out)
        assert all(torch.equal(again[name], value) for name, value in found.items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_wild_boxes_and_indices_stay_in_memory(backend):
    """Values are not checked on a GPU, so they must be harmless: neighbours in memory are unchanged, NaN gives NaN."""
    inputs = on_gpu(Case("wild", tiles=6).inputs(torch.float32))
    boxes = inputs["boxes"]
    boxes[0], boxes[1], boxes[2] = float("nan"), float("inf"), -1e30
    boxes[3] = torch.tensor([5.0, 5.0, 2.0, 2.0])
    inputs["image_index"][4], inputs["image_index"][5] = 10**6, -(10**6)
    guard = torch.full((1 << 20,), 7.0, device="cuda")
    out = cvfm(**inputs, backend=backend)
    crop_resize(inputs["features"], boxes, inputs["image_index"], 4, backend=backend)
    torch.cuda.synchronize()
    assert bool((guard == 7).all())
    assert bool(out[0, 1:].isnan().all())
    assert bool(out[4:].isfinite().all())
