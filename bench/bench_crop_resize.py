"""`crop_resize` alone, forward and backward, against slices, F.grid_sample and roi_align, and against atomics.

`backward` is the gather from dS to dF by itself; `scattered`, kept here only, adds with atomics on a GPU. The error is
held to that of the definition in the same dtype. PyTorch and torchvision compute positions in the maps' dtype or in
float32, which costs them up to 20 times that error, so that they show on float64 maps that they compute the same.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench import measure, roofline
from bench.baselines import rounded, sliced_resize, tapped_resize
from bench.cases import SUITES, Case
from bench.contest import Contest, Make
from bench.crop_resize_baselines import grid_sample, roi_align, scattered_backward, torchvision_reason
from bench.settings import Settings
from bench.timing import num_sets
from bench.variants import BACKENDS, absent
from fila_kernels import crop_resize, reference

SETTINGS = Settings.read()
CASES = list(dict.fromkeys(case for suite in SETTINGS.suites() for case in SUITES.get(suite, ())))
Function = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def backends(device: torch.device) -> list[str]:
    """Those of this package that can be timed here."""
    return [name for name in BACKENDS if absent(name, device) is None]


def contestants(inputs: dict[str, Tensor], device: torch.device) -> tuple[dict[str, Function], dict[str, str]]:
    """Functions of features, boxes, image_index and size; and who is missing, with the reason."""
    boxes = rounded(inputs["boxes"]).int().tolist()
    images = inputs["image_index"].tolist()
    found: dict[str, Function] = {
        "sliced": lambda features, _boxes, _index, size: sliced_resize(features, boxes, images, size),
        "tapped": lambda features, _boxes, _index, size: tapped_resize(features, boxes, images, size),
        "grid_sample": grid_sample,
    }
    missing = {}
    reason = torchvision_reason()
    if reason is None:
        found["roi_align"] = roi_align
    else:
        missing["roi_align"] = reason
    for name in backends(device):
        found[name] = lambda *arguments, name=name: crop_resize(*arguments, backend=name)
    return found, missing


def backward_of(function: Function, arguments: tuple, grad: Tensor) -> Callable[[], Tensor]:
    """The backward pass alone, over a graph that is kept."""
    features, *rest = arguments
    leaf = features.detach().requires_grad_()
    out = function(leaf, *rest)
    return lambda: torch.autograd.grad(out, leaf, grad, retain_graph=True)[0]


@pytest.mark.bench
@pytest.mark.benchmark(timer=measure.own_time)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_crop_resize(benchmark, case: Case, direction: str) -> None:
    device = SETTINGS.torch_device()
    if SETTINGS.time_is_up():
        pytest.skip("time is up")
    contest = Contest(SETTINGS, "crop_resize", case, direction)
    sets = [case.inputs(seed, device) for seed in range(num_sets(case.input_bytes(), device))]
    functions, notes = contestants(sets[0], device)
    if direction == "backward":
        functions["scattered"] = crop_resize
    names = contest.pending(list(functions))
    if not names:
        pytest.skip("measured before")
    arguments = [(i["features"], rounded(i["boxes"]), i["image_index"], case.grid) for i in sets]
    grads = [torch.randn(case.tiles, case.grid, case.grid, case.channels, device=device).to(a[0]) for a in arguments]

    def way(name: str) -> Make:
        def make(index: int) -> Callable[[], Tensor]:
            features, boxes, image_index, size = arguments[index]
            if direction == "forward":
                return lambda: functions[name](features, boxes, image_index, size)
            if name == "scattered":
                maps = tuple(features.shape[:3])
                return lambda: scattered_backward(grads[index], boxes, image_index, maps)
            return backward_of(functions[name], arguments[index], grads[index])

        return make

    def defined(dtype: torch.dtype) -> Tensor:
        features, *rest = arguments[0]
        if direction == "forward":
            return reference.crop_resize(features.to(dtype), *rest)
        return backward_of(reference.crop_resize, (features.to(dtype), *rest), grads[0].to(dtype))()

    def in_double(name: str) -> Callable[[], Tensor]:
        def call() -> Tensor:
            features, *rest = arguments[0]
            if direction == "forward":
                return functions[name](features.double(), *rest)
            return backward_of(functions[name], (features.double(), *rest), grads[0].double())()

        return call

    results = defined(torch.float64), defined(arguments[0][0].dtype)
    others = {name: in_double(name) for name in names if name not in (*backends(device), "scattered")}
    ways = {name: way(name) for name in names}
    work = roofline.crop_resize_work(case, direction)
    red = contest.run(benchmark, ways, len(sets), backends(device), results, notes, work, in_double=others)
    assert not red, f"{case.name}, {direction}: differs from the definition, so nothing is timed: {', '.join(red)}"
