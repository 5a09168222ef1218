"""`cvfm` over the real shapes: this package's backends against the baselines of `bench.variants`.

`python -m bench.run` compares all of them in turns. `python -m pytest bench/bench_cvfm.py --benchmark-only` times each
backend by itself with pytest-benchmark, whose `--benchmark-save` and `--benchmark-compare` compare two versions.
"""

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import engine
from bench.baselines import rounded
from bench.engine import Comparison, Contestant
from bench.roofline import cvfm_works
from bench.variants import BACKENDS, DEFAULTS, REGISTRY, Variant, backend_obstacle, obstacle
from bench.verify import Gate, Verdict, cvfm_gate, step
from bench.workloads import SUITES, Workload, default_suite

DIRECTIONS = ("forward", "forward+backward")


def variants(device: torch.device, direction: str, names: Sequence[str] = ()) -> dict[str, str | None]:
    """The named variants, or the device's usual ones, each with the reason it cannot run, or None."""
    wanted = [REGISTRY[name] for name in names or DEFAULTS[device.type] if name in REGISTRY]
    return {v.name: obstacle(v, device) for v in wanted if direction == "forward" or not v.forward_only}


def comparison(workload: Workload, direction: str, device: torch.device, names: Sequence[str]) -> Comparison:
    """Every variant on the same random inputs and gradients; baselines get the boxes rounded, as lists."""
    if any(name.startswith("compile") for name in names):
        forget_compiled(workload)
    sets = [workload.inputs(seed, device) for seed in range(engine.num_sets(workload.input_bytes(), device))]
    torch.manual_seed(0)  # the same gradients in every process, whatever it measured before
    grads = [torch.randn_like(inputs["tokens"]) if direction != "forward" else None for inputs in sets]
    contestants = [_contestant(REGISTRY[name], workload, sets, grads) for name in names]

    def gate():
        @functools.lru_cache(maxsize=1)  # both would fill a GPU; baselines come first
        def of(ours: bool) -> Gate:
            boxes = sets[0]["boxes"]
            return cvfm_gate(workload, sets[0] | {"boxes": boxes if ours else rounded(boxes)}, grads[0])

        def verdict(contestant: Contestant, found: Any) -> Verdict:
            return of(contestant.ours)(found)

        return verdict

    passes = 1 if direction == "forward" else 3
    return Comparison(
        "cvfm", workload.name, direction, workload.dtype, contestants, gate, len(sets), workload.work(passes),
        cvfm_works(workload, direction),
    )  # fmt: skip


@functools.lru_cache(maxsize=1)
def forget_compiled(workload: Workload) -> None:
    """Forget the graphs of other workloads, once per workload: past its limit of shapes dynamo runs eager silently."""
    torch._dynamo.reset()


def _contestant(
    variant: Variant, workload: Workload, sets: Sequence[dict[str, Tensor]], grads: Sequence[Tensor | None]
) -> Contestant:
    function = functools.cache(variant.make)

    def arguments(index: int) -> dict[str, Any]:
        inputs = sets[index]
        if variant.backend:
            return inputs
        boxes, images = rounded(inputs["boxes"]).int().tolist(), inputs["image_index"].tolist()
        return inputs | {"boxes": boxes, "image_index": images}

    def kept() -> int:
        leaves = {n: t.detach().requires_grad_() if n in workload.wanted else t for n, t in arguments(0).items()}
        forward = functools.partial(function(), **leaves, num_prefix_tokens=workload.prefix)
        return engine.kept_for_backward(forward, leaves.values())

    return Contestant(
        variant.name,
        lambda index: step(
            function(), arguments(index), workload.wanted, grads[index], num_prefix_tokens=workload.prefix
        ),
        ours=bool(variant.backend), graph=variant.graph, kept=kept if grads[0] is not None else None,
    )  # fmt: skip


DEVICE = engine.default_device()


@pytest.mark.parametrize("backend", [name for name in BACKENDS if backend_obstacle(name, DEVICE) is None])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("workload", SUITES[default_suite(DEVICE)], ids=lambda workload: workload.name)
def test_cvfm(benchmark, workload: Workload, direction: str, backend: str) -> None:
    engine.run_benchmark(benchmark, comparison(workload, direction, DEVICE, [backend]), DEVICE)
