"""The contestants for `cvfm`: its baselines and this package's backends, and why one that is absent cannot run.

| name | what |
| --- | --- |
| `naive_eager` | E0: a loop over tiles |
| `tuned_eager` | E1: slices of equal size resized as one channels-last batch, one `cat`, two `linear` |
| `tapped_eager` | E1 that at whole scales reads only the cells that count, for all images in one call |
| `tuned_eager_graph` | E2: E1 in a CUDA graph |
| `compile` | C: E1 through `torch.compile(mode="max-autotune")` |
| `compile_no_graphs` | the same without CUDA graphs, which copy inputs that move |
| `compile_tapped` | `tapped_eager` through `torch.compile(mode="max-autotune-no-cudagraphs")` |
| `library` | L: tapped crop-resize, cuBLASLt's epilogues, alpha folded into fc2 |
| `quack` | L with quack's CuTe GEMMs and their GELU and tanh epilogues; forward only |
| `eager`, `native`, `triton` | this package's backends |
| ..`_graph` | that backend in a CUDA graph |
| ..`_recompute` | with `recompute=True`: nothing kept for the backward pass |
| ..`_sample_first`, .. | with that plan instead of the planner's |
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.baselines import library, naive_eager, quack, tapped_eager, tuned_eager
from fila_kernels import cvfm, dispatch
from fila_kernels.call import PLANS

Function = Callable[..., Tensor]
BACKENDS = ("eager", "native", "triton")
TOWER_PREFIX = "fusion_"  # before a backend's name, in the names of the vision tower's variants


@dataclass(frozen=True)
class Variant:
    """One contestant; `make` gives a function with the arguments of `cvfm`, anew for every workload."""

    name: str
    make: Callable[[], Function]
    backend: str = ""  # of this package; a baseline takes boxes on whole cells, as lists
    graph: bool = False
    forward_only: bool = False


def _compiled(function: Function, mode: str) -> Callable[[], Function]:
    return lambda: torch.compile(function, mode=mode, fullgraph=True, dynamic=False)


def _ours(backend: str) -> list[Variant]:
    def make(**settings) -> Callable[[], Function]:
        return lambda: functools.partial(cvfm, backend=backend, **settings)

    return [
        Variant(backend, make(), backend),
        Variant(f"{backend}_graph", make(), backend, graph=True),
        Variant(f"{backend}_recompute", make(recompute=True), backend),
        *(Variant(f"{backend}_{plan}", make(plan=plan), backend) for plan in PLANS),
    ]


REGISTRY = {
    variant.name: variant
    for variant in (
        Variant("naive_eager", lambda: naive_eager),
        Variant("tuned_eager", lambda: tuned_eager),
        Variant("tapped_eager", lambda: tapped_eager),
        Variant("tuned_eager_graph", lambda: tuned_eager, graph=True),
        Variant("compile", _compiled(tuned_eager, "max-autotune")),
        Variant("compile_no_graphs", _compiled(tuned_eager, "max-autotune-no-cudagraphs")),
        Variant("compile_tapped", _compiled(tapped_eager, "max-autotune-no-cudagraphs")),
        Variant("library", lambda: library),
        Variant("quack", lambda: quack, forward_only=True),
        *(variant for backend in BACKENDS for variant in _ours(backend)),
    )
}
# torch.compile takes a minute per workload to choose its kernels, so that it is asked for by name.
DEFAULTS = {
    "cpu": ("tuned_eager", "eager", "native"),
    "cuda": (
        "naive_eager", "tuned_eager", "tapped_eager", "tuned_eager_graph", "library", "quack",
        *(f"{backend}{suffix}" for backend in BACKENDS for suffix in ("", "_graph", "_recompute")),
    ),
}  # fmt: skip


def obstacle(variant: Variant, device: torch.device) -> str | None:
    """Why the variant cannot take part on this device, or None."""
    if variant.graph and device.type != "cuda":
        return "a CUDA graph needs a CUDA device"
    if variant.name == "quack":
        return _quack_obstacle(device)
    return backend_obstacle(variant.backend, device) if variant.backend else None


def _quack_obstacle(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "its kernels need a CUDA device"
    try:
        from quack.gemm_interface import gemm_act  # noqa: F401
    except (ImportError, RuntimeError, AttributeError) as error:  # absent, or not fit for this torch
        return f"cannot be imported ({error})"
    return None


def backend_of(name: str) -> str:
    """The backend of this package that a variant of any operation runs on, or ""."""
    first = name.removeprefix(TOWER_PREFIX).split("_")[0]
    return first if first in BACKENDS else ""


def backend_obstacle(backend: str, device: torch.device) -> str | None:
    """Why a backend of this package cannot take part on this device, or None.

    Interpreted kernels take part where they are asked for by name: their times say nothing.
    """
    usable, reason = dispatch.available(backend, device)
    return None if usable else reason
