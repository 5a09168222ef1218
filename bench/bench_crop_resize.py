"""`crop_resize` alone: this package's backends against slices, F.grid_sample and roi_align, and against atomics.

`backward` is the gather from dS to dF by itself, `scattered` the same sum with atomics on a GPU. `..._graph` is a
kernel alone in a CUDA graph, without the host's time, for the goals that are about kernels. All take rounded boxes.
PyTorch and torchvision place samples in the map's dtype or in float32, which costs them up to 20 times the
error of the definition in the same dtype; the gate therefore judges them on float64 maps.
"""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from bench import baselines, engine
from bench.engine import Comparison, Contestant, Step
from bench.roofline import crop_resize_work
from bench.variants import BACKENDS, backend_obstacle
from bench.verify import Gate
from bench.workloads import SUITES, Workload, default_suite
from fila_kernels import crop_resize, dispatch, reference

DIRECTIONS = ("forward", "backward")
LIBRARIES = ("sliced", "tapped", "grid_sample", "roi_align")
GRAPH = "_graph"


def variants(device: torch.device, direction: str, names: Sequence[str] = ()) -> dict[str, str | None]:
    """The named contestants, or all, each with the reason it cannot run, or None."""
    scattered = ("scattered",) if direction == "backward" else ()
    found: dict[str, str | None] = dict.fromkeys((*LIBRARIES, *scattered))
    found["roi_align"] = baselines.torchvision_obstacle()
    found |= {name: backend_obstacle(name, device) for name in BACKENDS}
    no_graph = None if device.type == "cuda" else "a CUDA graph needs a CUDA device"
    found |= {name + GRAPH: no_graph or found[name] for name in (*scattered, *BACKENDS)}
    return {name: found[name] for name in found if not names or name in names}


def backward_of(function: Callable[..., Tensor], features: Tensor, grad: Tensor) -> Step:
    """The backward pass alone, over a graph that is kept."""
    leaf = features.detach().requires_grad_()
    out = function(leaf)
    return lambda: torch.autograd.grad(out, leaf, grad, retain_graph=True)[0]


def comparison(workload: Workload, direction: str, device: torch.device, names: Sequence[str]) -> Comparison:
    """All contestants on the same maps, boxes on whole cells."""
    sets = [workload.inputs(seed, device) for seed in range(engine.num_sets(workload.input_bytes(), device))]
    boxes, image_index = baselines.rounded(sets[0]["boxes"]), sets[0]["image_index"]
    edges, images, size = boxes.int().tolist(), image_index.tolist(), workload.grid
    maps = [inputs["features"] for inputs in sets]
    torch.manual_seed(0)  # the same gradients in every process, whatever it measured before
    grads = [torch.randn(workload.tiles, size, size, workload.channels, device=device).to(m.dtype) for m in maps]

    captured = [name + GRAPH for name in BACKENDS]
    whole, lists = (boxes, image_index, size), (edges, images, size)
    resizes: dict[str, Callable[[Tensor], Tensor]] = {
        "definition": lambda features: reference.crop_resize(features, *whole),
        "sliced": lambda features: baselines.sliced_resize(features, *lists),
        "tapped": lambda features: baselines.tapped_resize(features, *lists),
        "grid_sample": lambda features: baselines.grid_sample(features, *whole),
        "roi_align": lambda features: baselines.roi_align(features, *whole),
        **{name: lambda features, name=name: crop_resize(features, *whole, backend=name) for name in BACKENDS},
    }

    def call(name: str, features: Tensor, grad: Tensor) -> Step:
        if direction == "backward" and name in captured:
            # Autograd would run it on the stream of the forward pass, outside the graph.
            backend = dispatch.implementation(name.removesuffix(GRAPH))
            return lambda: backend.crop_resize_backward(grad, boxes, image_index, features.shape[:3])
        name = name.removesuffix(GRAPH)
        if name == "scattered":
            return lambda: baselines.scattered_backward(grad, boxes, image_index, tuple(features.shape[:3]))
        if direction == "forward":
            return lambda: resizes[name](features)
        return backward_of(resizes[name], features, grad)

    def in_float64(name: str) -> Tensor:
        return call(name, maps[0].double(), grads[0].double())().to(maps[0].dtype)

    def gate() -> Callable[[Contestant, Tensor], object]:
        exact, eager = (
            call("definition", features, grad)()
            for features, grad in ((maps[0].double(), grads[0].double()), (maps[0], grads[0]))
        )
        judge = Gate({"result": exact}, {"result": eager})
        return lambda _, found: judge(found)

    contestants = [
        Contestant(
            name, lambda index, name=name: call(name, maps[index], grads[index]),
            ours=name in BACKENDS or name in captured, graph=name.endswith(GRAPH),
            judged=partial(in_float64, name) if name in LIBRARIES else None,
        )
        for name in names
    ]  # fmt: skip
    work = crop_resize_work(workload, direction)
    return Comparison(
        "crop_resize", workload.name, direction, workload.dtype, contestants, gate, len(sets), work, [work]
    )


DEVICE = engine.default_device()


@pytest.mark.parametrize("backend", [name for name in BACKENDS if backend_obstacle(name, DEVICE) is None])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("workload", SUITES[default_suite(DEVICE)], ids=lambda workload: workload.name)
def test_crop_resize(benchmark, workload: Workload, direction: str, backend: str) -> None:
    engine.run_benchmark(benchmark, comparison(workload, direction, DEVICE, [backend]), DEVICE)
