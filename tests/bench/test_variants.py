"""What the bench compares: its shapes, baselines, floors, and the gate before any time is taken."""

import dataclasses
from pathlib import Path

import pytest
import torch

from bench import baselines, roofline, variants, verify
from bench.cases import SUITES, Case
from bench.crop_resize_baselines import grid_sample, scattered_backward
from bench.library import library
from fila_kernels import crop_resize, cvfm, reference

ROOT = Path(__file__).resolve().parents[2]
TINY = SUITES["tiny"][0]
SMALL = [
    Case(256, 1, "float32", images=3, hidden_width=16, token_width=8, grid=4),  # scale 8
    Case(192, 2, "float32", images=2, hidden_width=16, token_width=8, grid=4),  # scale 3
    Case(96, 3, "float32", hidden_width=16, token_width=8, grid=4),  # enlarged
    Case(96, 1, "float32", hidden_width=16, token_width=8, grid=4, views=1, prefix=0),
]


def whole(case: Case) -> dict[str, torch.Tensor]:
    inputs = case.inputs()
    return inputs | {"boxes": baselines.rounded(inputs["boxes"])}


def test_every_suite_has_named_cases_and_the_registry_holds_what_the_issue_asks():
    for name, cases in SUITES.items():
        assert len({case.name for case in cases}) == len(cases) > 0, name
    for images in (1, 8, 32):
        for hidden, suite in ((1024, f"images-{images}"), (4096, f"hidden-4096-images-{images}")):
            assert {(c.raster, c.stage) for c in SUITES[suite]} == {(r, s) for r in (768, 1536) for s in (1, 2, 3, 4)}
            assert all((c.images, c.hidden_width, c.dtype) == (images, hidden, "bfloat16") for c in SUITES[suite])
    assert [case.name for case in SUITES["frozen"]] == [
        "1536-stage1-bfloat16-b8-frozen", "1536-stage4-bfloat16-b8-frozen",
    ]  # fmt: skip


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_baselines_compute_the_definition(case):
    inputs = whole(case)
    expected = reference.cvfm(**inputs, num_prefix_tokens=case.prefix)
    lists = inputs | {"boxes": inputs["boxes"].int().tolist(), "image_index": inputs["image_index"].tolist()}
    for function in (baselines.naive_eager, baselines.tuned_eager, library, variants.tapped_eager):
        found = function(**lists, num_prefix_tokens=case.prefix)
        assert (found - expected).abs().max() <= 1e-5, function.__name__
    arguments = (inputs["features"], inputs["boxes"], inputs["image_index"], case.grid)
    sampled = reference.crop_resize(*arguments)
    for resize in (grid_sample, baselines.sliced_resize, baselines.tapped_resize):
        assert (resize(*arguments) - sampled).abs().max() <= 1e-5, resize.__name__
    features = inputs["features"].requires_grad_()
    out = crop_resize(features, *arguments[1:])
    grad = torch.randn_like(out)
    scattered = scattered_backward(grad, arguments[1], arguments[2], tuple(features.shape[:3]))
    assert (scattered - torch.autograd.grad(out, features, grad)[0]).abs().max() <= 1e-5


@pytest.mark.parametrize("case", SMALL[:3], ids=lambda case: case.name)
def test_the_library_baseline_passes_the_gate_in_both_directions(case):
    inputs = whole(case)
    lists = inputs | {"boxes": inputs["boxes"].int().tolist(), "image_index": inputs["image_index"].tolist()}
    for grad in (None, torch.randn_like(inputs["tokens"])):
        gate = verify.Gate(case, inputs, grad)
        verdict = gate(verify.step(library, lists, case.wanted, grad, num_prefix_tokens=case.prefix))
        assert verdict.green, verdict.worst


def test_the_floor_takes_the_cheaper_way_and_counts_by_hand():
    case = Case(768, 4, "bfloat16", images=8)
    samples, cells = 8 * 5 * 576, 8 * 24 * 24
    forward = 2 * samples * 1024 * 2048 + 2 * cells * 1536 * 1024
    assert roofline.works(case, "forward")[0].flops == forward < case.flops()
    kept, again = roofline.works(case, "forward+backward")
    assert kept.flops == 3 * forward
    assert again.flops == 4 * forward
    assert kept.bytes - again.bytes == 2 * 2 * samples * 2048
    fast_memory, slow_memory = roofline.Roof(bytes=1e15, flops=1e12), roofline.Roof(bytes=1e9, flops=1e18)
    assert roofline.floor(case, "forward+backward", fast_memory) == kept
    assert roofline.floor(case, "forward+backward", slow_memory) == again
    frozen = dataclasses.replace(case, frozen=True)
    assert kept.flops - roofline.works(frozen, "forward+backward")[0].flops == 2 * cells * 1536 * 1024
    assert roofline.Work(10, 40).seconds(roofline.Roof(bytes=8, flops=5)) == 5
    roof = roofline.measure_roof(torch.float32, torch.device("cpu"), sizes=(2**16, 32), rounds=2)
    assert min(roof.bytes, roof.flops) > 0


@pytest.mark.parametrize("broken", ["", "out", *TINY.wanted])
def test_the_gate_lets_the_definition_through_and_nothing_else(broken):
    """A fault of one part in a hundred in the result or any one gradient turns it red."""
    inputs = whole(TINY)
    grad = None if broken == "out" else torch.randn_like(inputs["tokens"])
    gate = verify.Gate(TINY, inputs, grad)
    call = verify.step(cvfm, inputs, TINY.wanted, grad)

    def faulty():
        found = call()
        if grad is None:
            return found * 1.01
        return [g * 1.01 if name == broken else g for name, g in zip(TINY.wanted, found, strict=True)]

    verdict = gate(faulty)
    assert verdict.green == (broken == "")
    if broken:
        assert verdict.worst.startswith(f"{broken}: error")
        assert verdict.error > 10


def test_nan_and_wrong_shapes_are_red():
    inputs = whole(TINY)
    gate = verify.Gate(TINY, inputs, None)
    out = cvfm(**inputs)
    assert not gate(lambda: out * float("nan")).green
    assert not gate(lambda: out[:1]).green
    assert not gate(lambda: out.double()).green


def test_absent_variants_have_reasons():
    cpu = torch.device("cpu")
    found, missing = variants.select(cpu, variants.REGISTRY)
    assert {v.name for v in found} >= {"naive_eager", "tuned_eager", "tapped_eager", "compile", "library", "native"}
    assert "native_single_pass" in missing
    assert "CUDA" in missing["tuned_eager_graph"]
    assert all(missing.values())
    assert "liger" in variants.select(cpu)[1]
    with pytest.raises(ValueError, match=r"expected some of .* got fast"):
        variants.select(cpu, ["fast"])
