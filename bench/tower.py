"""The vision tower end to end: forward pass and training step, without fusion, with eager fusion, with each backend.

    python -m bench.run --operation tower                          # fila-nano's on a CPU, the paper's on a GPU
    python -m bench.run --operation tower --suite fila-llama3-8b --only fixed

`no_fusion` is the ViT over the same tiles without a ConvNeXt, so that its distance from the others is what the hybrid
encoder costs. In `fusion_tuned_eager` the CVFM is `bench.baselines.tuned_eager`. A training step is a forward pass, the
mean square of the result, a backward pass to every parameter and a step of SGD.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.baselines import rounded, tuned_eager
from bench.engine import Comparison, Contestant, Step
from bench.variants import BACKENDS, TOWER_PREFIX, backend_obstacle
from bench.verify import Gate
from bench.workloads import DTYPES
from fila import FilaVisionConfig, FilaVisionModel, preset
from fila.fusion import DeepFusion, Fusion

DIRECTIONS = ("forward", "forward+backward")


@dataclass(frozen=True)
class Tower:
    """A preset's tower with random weights; the rule says how large rasters are: 1536 pixels in the paper, or 768."""

    preset: str
    rule: str
    dtype: str = "bfloat16"
    images: int = 1

    @property
    def name(self) -> str:
        return f"{self.preset}-{self.rule}-{self.dtype}-b{self.images}"


RULES = ("scaled", "fixed")
SUITES = {
    "fila-nano": tuple(Tower("fila-nano", rule) for rule in RULES),
    "fila-llama3-8b": tuple(Tower("fila-llama3-8b", rule, images=images) for rule in RULES for images in (1, 8)),
    # A second's work, for tests of the bench itself.
    "tiny": (Tower("fila-nano", "fixed", "float32"),),
}


def default_suite(device: torch.device) -> str:
    return "fila-llama3-8b" if device.type == "cuda" else "fila-nano"


def variants(device: torch.device, direction: str, names: Sequence[str] = ()) -> dict[str, str | None]:
    """The named towers, or all, each with the reason it cannot run, or None."""
    found: dict[str, str | None] = {"no_fusion": None, "fusion_tuned_eager": None}
    found |= {TOWER_PREFIX + name: backend_obstacle(name, device) for name in BACKENDS}
    return {name: found[name] for name in found if not names or name in names}


class EagerFusion(Fusion):
    """A CVFM's parameters in tuned eager PyTorch; boxes are read back once and kept, as a careful user does."""

    def __init__(self, fusion: DeepFusion) -> None:
        super().__init__()
        self.fusion = fusion
        self.places: dict[int, tuple[list, list]] = {}

    def fuse(self, tokens: Tensor, maps: Sequence[Tensor], boxes: Sequence[Tensor], image_index: Tensor) -> Tensor:
        stage = self.fusion.stage
        key = len(boxes[stage])
        if key not in self.places:
            self.places[key] = rounded(boxes[stage]).int().tolist(), image_index.tolist()
        fc1: Any = self.fusion.fc1
        fc2: Any = self.fusion.fc2
        return tuned_eager(
            tokens, maps[stage], *self.places[key], fc1.weight, fc1.bias, fc2.weight, fc2.bias, self.fusion.alpha
        )


def build(tower: Tower, variant: str, device: torch.device) -> FilaVisionModel:
    """A tower with random weights and open gates, fused as the variant says."""
    torch.manual_seed(0)
    config = preset(tower.preset).vision_config
    fusion = "none" if variant == "no_fusion" else "deep"
    with torch.device(device):
        model = FilaVisionModel(
            FilaVisionConfig(**(config.to_dict() | {"high_res_rule": tower.rule, "fusion": fusion}))
        )
    for module in model.fusion:
        nn.init.constant_(module.alpha, 0.5)
        module.gate = "product"  # the paper's, the one that tuned eager computes; fila-nano's is "scale"
        module.backend = variant.removeprefix(TOWER_PREFIX)
    if variant == "fusion_tuned_eager":
        model.fusion = nn.ModuleList(EagerFusion(module) for module in model.fusion)
    return model.to(DTYPES[tower.dtype]).train()


def pictures(model: FilaVisionModel, images: int, device: torch.device) -> dict[str, Tensor]:
    """Random square pictures on the 2 x 2 canvas: every box is on whole cells, so that eager computes the same."""
    torch.manual_seed(1)
    tile, dtype = model.config.image_size, model.dtype
    size = (2 * tile, 2 * tile)
    layout = model.config.geometry().layout(*size)
    return {
        "pixel_values": torch.randn(images, layout.num_views, 3, tile, tile, device=device, dtype=dtype),
        "high_res_pixel_values": torch.randn(images, 3, *layout.raster, device=device, dtype=dtype),
        "image_sizes": torch.tensor([size] * images),
    }


def step_of(model: FilaVisionModel, inputs: dict[str, Tensor], direction: str) -> Step:
    if direction == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return model(**inputs).last_hidden_state

        return forward
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def step() -> None:
        try:
            model(**inputs).last_hidden_state.float().square().mean().backward()
            optimizer.step()
        finally:  # also after an out-of-memory error: gradients would stay
            optimizer.zero_grad()

    return step


def results_of(model: FilaVisionModel, inputs: dict[str, Tensor], direction: str) -> dict[str, Tensor]:
    """The tower's result, or the gradients of a training step, those of each part of the model as one vector."""
    if direction == "forward":
        with torch.no_grad():
            return {"result": model(**inputs).last_hidden_state}
    model(**inputs).last_hidden_state.to(torch.promote_types(torch.float32, model.dtype)).square().mean().backward()
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            parts.setdefault(name.split(".")[0], []).append(parameter.grad.flatten())
    model.zero_grad()
    return {f"gradients of {part}": torch.cat(found) for part, found in parts.items()}


def gate(tower: Tower, direction: str, device: torch.device) -> Gate:
    """Eager fusion in float64 with the same parameters, on one picture, errors in the Euclidean norm.

    Single operations are held to their largest error. In a deep tower roundings are multiplied, and the largest says
    nothing.
    """
    model = build(tower, "fusion_tuned_eager", device)
    inputs = pictures(model, 1, device)
    eager = results_of(model, inputs, direction)
    wide = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    return Gate(results_of(model.double(), wide, direction), eager, norm=torch.linalg.vector_norm)


def comparison(tower: Tower, direction: str, device: torch.device, names: Sequence[str]) -> Comparison:
    """Towers of one configuration with the same weights on the same pictures."""

    def contestant(name: str) -> Contestant:
        @functools.cache
        def step() -> Step:
            model = build(tower, name, device)
            return step_of(model, pictures(model, tower.images, device), direction)

        def judged() -> dict[str, Tensor]:
            untrained = build(tower, name, device)  # a step changes the weights
            return results_of(untrained, pictures(untrained, 1, device), direction)

        return Contestant(
            name,
            lambda _: step(),
            ours=name.removeprefix(TOWER_PREFIX) in BACKENDS,
            gated=name != "no_fusion",
            judged=judged,
        )

    def make_gate() -> Callable[[Contestant, Any], Any]:
        judge = gate(tower, direction, device)
        return lambda _, found: judge(found)

    contestants = [contestant(name) for name in names]
    return Comparison("tower", tower.name, direction, tower.dtype, contestants, make_gate)
