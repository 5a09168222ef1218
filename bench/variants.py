"""Who takes part: the baselines and this package's backends, and why one that is absent cannot.

| name | what |
| --- | --- |
| `naive_eager` | E0: a loop over tiles |
| `tuned_eager` | E1: slices of equal size resized as one channels-last batch, one `cat`, two `linear` |
| `tapped_eager` | E1, but whole scales read only the cells that count, for all images in one call |
| `tuned_eager_graph` | E2: E1 in a CUDA graph |
| `compile` | C: E1 through `torch.compile(mode="max-autotune")` |
| `compile_no_graphs` | the same without CUDA graphs, which copy inputs that move |
| `compile_tapped` | `tapped_eager` through `torch.compile(mode="max-autotune-no-cudagraphs")` |
| `library` | L: tapped crop-resize, cuBLASLt's epilogues, alpha folded into fc2; see `bench.library` |
| `quack` | L with quack's CuTe GEMMs and their GELU and tanh epilogues; forward only |
| `eager`, `native`, `triton` | this package's backends; older rows have `torch_calls`, `torch` and `cuda` |
| ..`_graph` | that backend in a CUDA graph |
| ..`_recompute` | with `recompute=True`: nothing kept for the backward pass |
| ..`_sample_first`, .. | with that plan instead of the planner's |
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.baselines import Boxes, Indices, naive_eager, tapped_resize, tuned_eager
from bench.library import library
from fila_kernels import cvfm, dispatch
from fila_kernels.call import PLANS

Function = Callable[..., Tensor]
BACKENDS = ("eager", "native", "triton")


@dataclass(frozen=True)
class Variant:
    """One contestant; `make` gives a function with the arguments of `cvfm`, anew for every case."""

    name: str
    make: Callable[[], Function]
    ours: bool = False  # else it takes boxes on whole cells, as lists
    graph: bool = False
    forward_only: bool = False


def tapped_eager(
    tokens: Tensor, features: Tensor, boxes: Boxes, image_index: Indices, fc1_weight: Tensor, fc1_bias: Tensor,
    fc2_weight: Tensor, fc2_bias: Tensor, alpha: Tensor, *, num_prefix_tokens: int = 1,
) -> Tensor:  # fmt: skip
    """E1 with `tapped_resize`, and differentiable."""
    patches = tokens[:, num_prefix_tokens:]
    sampled = tapped_resize(features, boxes, image_index, int(patches.shape[1] ** 0.5)).flatten(1, 2)
    hidden = F.gelu(F.linear(torch.cat([patches, sampled], dim=-1), fc1_weight, fc1_bias))
    fused = patches + torch.tanh(alpha * F.linear(hidden, fc2_weight, fc2_bias))
    return torch.cat([tokens[:, :num_prefix_tokens], fused], dim=1)


def quack(
    tokens: Tensor, features: Tensor, boxes: Boxes, image_index: Indices, fc1_weight: Tensor, fc1_bias: Tensor,
    fc2_weight: Tensor, fc2_bias: Tensor, alpha: Tensor, *, num_prefix_tokens: int = 1,
) -> Tensor:  # fmt: skip
    """`library` with quack's GEMMs: tanh-form GELU in the first epilogue, the gate's tanh in the second."""
    from quack.gemm_interface import gemm_act

    patches = tokens[:, num_prefix_tokens:]
    sampled = tapped_resize(features, boxes, image_index, int(patches.shape[1] ** 0.5)).flatten(1, 2)
    joint = torch.cat([patches, sampled], dim=-1).flatten(0, 1)
    _, hidden = gemm_act(joint, fc1_weight.t(), bias=fc1_bias, activation="gelu_tanh_approx", store_preact=False)
    weight, bias = (fc2_weight * alpha).t(), fc2_bias * alpha
    _, branch = gemm_act(hidden, weight, bias=bias, activation="tanh", store_preact=False)
    fused = patches + branch.view(patches.shape)
    return torch.cat([tokens[:, :num_prefix_tokens], fused], dim=1)


def _compiled(function: Function, mode: str) -> Callable[[], Function]:
    def make() -> Function:
        # Each case is a new shape; past its limit of shapes dynamo would run eager without a word.
        torch._dynamo.reset()
        return torch.compile(function, mode=mode, fullgraph=True, dynamic=False)

    return make


def _ours(backend: str) -> list[Variant]:
    def make(**settings) -> Callable[[], Function]:
        return lambda: functools.partial(cvfm, backend=backend, **settings)

    return [
        Variant(backend, make(), ours=True),
        Variant(f"{backend}_graph", make(), ours=True, graph=True),
        Variant(f"{backend}_recompute", make(recompute=True), ours=True),
        *(Variant(f"{backend}_{plan}", make(plan=plan), ours=True) for plan in PLANS),
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
_OURS = tuple(f"{backend}{suffix}" for backend in BACKENDS for suffix in ("", "_graph", "_recompute"))
# torch.compile takes a minute a case to choose its kernels, so that it is asked for by name.
DEFAULTS = {
    "cpu": ("tuned_eager", "native", "eager"),
    "cuda": ("naive_eager", "tuned_eager", "tapped_eager", "tuned_eager_graph", "library", "quack", *_OURS),
}
NEVER = {"liger": "Liger has no kernel of this: its MLPs (SwiGLU, GEGLU) multiply two halves"}


def absent(name: str, device: torch.device) -> str | None:
    """Why the variant cannot take part on this device, or None."""
    variant = REGISTRY[name]
    if variant.graph and device.type != "cuda":
        return "a CUDA graph needs a CUDA device"
    if name == "quack":
        if device.type != "cuda":
            return "its kernels need a CUDA device"
        try:
            from quack.gemm_interface import gemm_act  # noqa: F401
        except (ImportError, RuntimeError, AttributeError) as error:  # absent, or not fit for this torch
            return f"cannot be imported ({error})"
    if variant.ours:
        backend = name.split("_")[0]
        plan = "single_pass" if name.endswith("single_pass") else None
        try:
            dispatch.resolve(backend, plan, device)
        except RuntimeError as error:
            return str(error)
        if backend == "triton" and device.type != "cuda":
            return "its kernels need a CUDA device; an interpreter's time says nothing"
    return None


def select(device: torch.device, names: Iterable[str] = ()) -> tuple[list[Variant], dict[str, str]]:
    """The variants that run, and for those that were wanted and do not, why.

    Raises:
        ValueError: for an unknown name.
    """
    wanted = tuple(names) or DEFAULTS[device.type]
    unknown = [name for name in wanted if name not in REGISTRY]
    if unknown:
        raise ValueError(f"variants: expected some of {', '.join(REGISTRY)}, got {', '.join(unknown)}")
    reasons = {name: absent(name, device) for name in wanted}
    missing = {name: reason for name, reason in reasons.items() if reason}
    return [REGISTRY[name] for name in wanted if not reasons[name]], missing | (NEVER if not names else {})
