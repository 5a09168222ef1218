"""The baselines compute the definition, and the floor counts the unavoidable work."""

import dataclasses

import pytest
import torch

from bench import baselines, roofline, verify
from bench.workloads import SUITES, Work, Workload
from fila_kernels import crop_resize, reference

SMALL = [
    Workload(256, 1, "float32", images=3, hidden_width=16, token_width=8, grid=4),  # scale 8
    Workload(192, 2, "float32", images=2, hidden_width=16, token_width=8, grid=4),  # scale 3
    Workload(96, 3, "float32", hidden_width=16, token_width=8, grid=4),  # enlarged
    Workload(96, 1, "float32", hidden_width=16, token_width=8, grid=4, views=1, prefix=0),
]
BASELINES = (baselines.naive_eager, baselines.tuned_eager, baselines.tapped_eager, baselines.library)


@pytest.mark.parametrize("workload", SMALL, ids=lambda workload: workload.name)
@pytest.mark.parametrize("function", BASELINES, ids=lambda function: function.__name__)
def test_cvfm_baselines_compute_the_definition_and_its_gradients(workload, function):
    inputs = workload.inputs()
    inputs["boxes"] = baselines.rounded(inputs["boxes"])
    lists = inputs | {"boxes": inputs["boxes"].int().tolist(), "image_index": inputs["image_index"].tolist()}
    for grad in (None, torch.randn_like(inputs["tokens"])):
        found = verify.step(function, lists, workload.wanted, grad, num_prefix_tokens=workload.prefix)()
        verdict = verify.cvfm_gate(workload, inputs, grad)(found)
        assert verdict.green, verdict.worst


@pytest.mark.parametrize("workload", SMALL, ids=lambda workload: workload.name)
def test_crop_resize_baselines_compute_the_definition_and_its_transpose(workload):
    inputs = workload.inputs()
    arguments = (inputs["features"], baselines.rounded(inputs["boxes"]), inputs["image_index"], workload.grid)
    sampled = reference.crop_resize(*arguments)
    for resize in (baselines.grid_sample, baselines.sliced_resize, baselines.tapped_resize):
        assert (resize(*arguments) - sampled).abs().max() <= 1e-5, resize.__name__
    features = inputs["features"].requires_grad_()
    out = crop_resize(features, *arguments[1:])
    grad = torch.randn_like(out)
    scattered = baselines.scattered_backward(grad, *arguments[1:3], tuple(features.shape[:3]))
    assert (scattered - torch.autograd.grad(out, features, grad)[0]).abs().max() <= 1e-5


def test_the_floor_takes_the_cheaper_way_and_counts_by_hand():
    workload = Workload(768, 4, "bfloat16", images=8)
    samples, cells = 8 * 5 * 576, 8 * 24 * 24
    forward = 2 * samples * 1024 * 2048 + 2 * cells * 1536 * 1024
    assert roofline.cvfm_works(workload, "forward")[0].flops == forward < workload.work().flops
    kept, again = roofline.cvfm_works(workload, "forward+backward")
    assert (kept.flops, again.flops) == (3 * forward, 4 * forward)
    assert kept.bytes - again.bytes == 2 * 2 * samples * 2048
    assert roofline.Roof(bytes=1e15, flops=1e12).floor([kept, again]) == kept
    assert roofline.Roof(bytes=1e9, flops=1e18).floor([kept, again]) == again
    frozen = dataclasses.replace(workload, frozen=True)
    assert kept.flops - roofline.cvfm_works(frozen, "forward+backward")[0].flops == 2 * cells * 1536 * 1024
    assert roofline.Roof(bytes=8, flops=5).seconds(Work(10, 40)) == 5


def test_every_suite_has_named_workloads():
    for name, workloads in SUITES.items():
        assert len({workload.name for workload in workloads}) == len(workloads) > 0, name
