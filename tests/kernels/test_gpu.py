"""Every backend that runs on this GPU over the case matrix, forward and backward, against the definition in float64.

`make gpu` runs the tests marked gpu before it times anything. gpu_checks.py holds the checks. FILA_TEST_DEVICE=cpu runs
them on a CPU's backends, as the rehearsal of `make gpu` does.
"""

import os
from dataclasses import replace
from functools import partial

import pytest
import torch
from gpu_checks import (
    PLANS as MATRIX_PLANS,
)
from gpu_checks import (
    aligned_slice,
    cell_id,
    channels_first,
    check_cell,
    matrix,
    on_device,
    one_image_or_several,
    unchanged,
)
from gpu_checks import (
    check as check_on,
)
from interpreter import ALIGNED, UNALIGNED

from fila_kernels import crop_resize, cvfm, dispatch
from fila_kernels.testing import CASES, DIFFERENTIABLE, REAL, Case, covering_pairs, gradients, ids

DEVICE = os.environ.get("FILA_TEST_DEVICE", "cuda")
THERE = DEVICE == "cpu" or torch.cuda.is_available()
BACKENDS = [b for b in ("eager", "native", "triton") if THERE and dispatch.available(b, torch.device(DEVICE, 0))[0]]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not THERE, reason="no CUDA device")]
check = partial(check_on, device=DEVICE)


TRITON = [name for name in BACKENDS if name == "triton"]
PLANS = ("sample_first", "project_first")
# Every row begins at a multiple of 16 bytes, as descriptors need it, and no width is past what one launch takes.
NARROW = Case(
    "narrow", tiles=6, grid=12, token_width=256, hidden_width=512, feature_width=192, images=2, height=20, width=24,
    boxes="overlapping",
)  # fmt: skip
NARROWER = replace(NARROW, name="narrower", token_width=128, hidden_width=64, feature_width=384, prefix=0)
LAYOUTS = [unchanged, channels_first, aligned_slice]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", [*CASES, ALIGNED, UNALIGNED], ids=ids)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matrix(backend, case, dtype):
    check(case, backend, dtype, "product")


LOW = {"bfloat16": torch.bfloat16, "autocast": torch.bfloat16, "float16": torch.float16}
LAYOUT_CELLS = covering_pairs(matrix(LOW | {"float32": torch.float32}, [p for p in MATRIX_PLANS if p != "single_pass"]))
FUSED_CELLS = covering_pairs(matrix(LOW, ["single_pass"]))


@pytest.mark.parametrize("grid", [2, 12])
@pytest.mark.parametrize("cell", [*LAYOUT_CELLS, *one_image_or_several(("bfloat16", torch.bfloat16))], ids=cell_id)
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_images_plans_and_frozen_inputs(backend, cell, grid):
    check_cell(cell, backend, DEVICE, grid)


@pytest.mark.parametrize("cell", FUSED_CELLS, ids=cell_id)
@pytest.mark.parametrize("backend", TRITON)
def test_layouts_through_the_single_pass(backend, cell):
    check_cell(cell, backend, DEVICE, 12)


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("plain", "closed_gate", "negative_gate")], ids=ids)
@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_gate_and_float16(backend, case):
    check(case, backend, torch.float16, "scale")


@pytest.mark.parametrize(
    "settings", [{"plan": "sample_first"}, {"plan": "project_first"}, {"recompute": True}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.bfloat16 if DEVICE == "cuda" else torch.float32], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_real_shape_by_every_plan(backend, dtype, settings):
    """A backend that is red here is not timed in this dtype."""
    check(REAL if DEVICE == "cuda" else ALIGNED, backend, dtype, "product", **settings)


@pytest.mark.parametrize("change", LAYOUTS)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("case", [NARROW, NARROWER, replace(NARROW, name="two_prefix", prefix=2)], ids=ids)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_plan_and_layout_of_whole_vectors(backend, case, plan, change):
    check(case, backend, torch.bfloat16, change=change, plan=plan)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("change", LAYOUTS)
@pytest.mark.parametrize(
    "case",
    [NARROW, NARROWER, replace(NARROW, name="widest", token_width=512), ALIGNED, UNALIGNED, *CASES[:3]],
    ids=ids,
)
@pytest.mark.parametrize("backend", TRITON)
def test_single_pass(backend, case, change, dtype):
    check(case, backend, dtype, change=change, plan="single_pass")


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_into_one_graph(backend):
    check(NARROW, backend, torch.bfloat16, function=torch.compile(cvfm, fullgraph=True))


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
    inputs = on_device(case.inputs(torch.bfloat16), DEVICE)
    grad = torch.randn_like(inputs["tokens"])
    out, found = gradients(cvfm, inputs, grad, backend=backend)
    for _ in range(10):
        again_out, again = gradients(cvfm, inputs, grad, backend=backend)
        assert torch.equal(again_out, out)
        assert all(torch.equal(again[name], value) for name, value in found.items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_wild_boxes_and_indices_stay_in_memory(backend):
    """Values are not checked on a GPU, so they must be harmless: neighbours in memory are unchanged, NaN gives NaN."""
    inputs = on_device(Case("wild", tiles=6).inputs(torch.float32), DEVICE)
    boxes = inputs["boxes"]
    boxes[0], boxes[1], boxes[2] = float("nan"), float("inf"), -1e30
    boxes[3] = torch.tensor([5.0, 5.0, 2.0, 2.0])
    inputs["image_index"][4], inputs["image_index"][5] = 10**6, -(10**6)
    guard = torch.full((1 << 20,), 7.0, device=DEVICE)
    out = cvfm(**inputs, backend=backend)
    crop_resize(inputs["features"], boxes, inputs["image_index"], 4, backend=backend)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    assert bool((guard == 7).all())
    assert bool(out[0, 1:].isnan().all())
    assert bool(out[4:].isfinite().all())
