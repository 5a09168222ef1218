"""The vision tower end to end: forward pass and a training step, without fusion, with eager fusion, with each backend.

    python -m bench.e2e                          # fila-nano's tower on a CPU, the paper's on a GPU
    python -m bench.e2e --preset fila-llama3-8b --images 8 --rule fixed

`no_fusion` is the ViT over the same tiles and no ConvNeXt, so that its distance from the others is what the hybrid
encoder costs; `fusion_tuned_eager` has the CVFM computed as `bench.baselines` does. A training step is a forward pass,
the mean square of the result, a backward pass to every parameter and a step of SGD.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import records
from bench.baselines import rounded, tuned_eager
from bench.memory import extra_memory
from bench.run import TIME_IS_UP, table
from bench.settings import RESULTS, slug
from bench.timing import Runner, interleaved
from bench.variants import BACKENDS, absent
from fila import FilaVisionConfig, FilaVisionModel, preset
from fila.configuration import PRESETS
from fila.fusion import DeepFusion

OPERATIONS = {"tower": "forward", "tower-step": "forward+backward"}


class EagerFusion(nn.Module):
    """A CVFM's parameters in tuned eager PyTorch; boxes are read back once and kept, as a careful user does."""

    def __init__(self, fusion: DeepFusion) -> None:
        super().__init__()
        self.fusion = fusion
        self.places: dict[int, tuple[list, list]] = {}

    def forward(self, tokens: Tensor, maps: list[Tensor], boxes: list[Tensor], image_index: Tensor) -> Tensor:
        stage = self.fusion.stage
        key = len(boxes[stage])
        if key not in self.places:
            self.places[key] = rounded(boxes[stage]).int().tolist(), image_index.tolist()
        fc1: Any = self.fusion.fc1
        fc2: Any = self.fusion.fc2
        return tuned_eager(
            tokens, maps[stage], *self.places[key], fc1.weight, fc1.bias, fc2.weight, fc2.bias, self.fusion.alpha
        )


def build(config: FilaVisionConfig, device: torch.device, dtype: torch.dtype, fusion: str) -> FilaVisionModel:
    """A tower with random weights and open gates; `fusion` is "none" or "deep"."""
    torch.manual_seed(0)
    with torch.device(device):
        model = FilaVisionModel(FilaVisionConfig(**(config.to_dict() | {"fusion": fusion})))
    for module in model.fusion:
        nn.init.constant_(module.alpha, 0.5)
        module.gate = "product"  # the paper's, which is the one that tuned eager computes; fila-nano's is "scale"
    return model.to(dtype).train()


def pictures(model: FilaVisionModel, images: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random square pictures on the 2 x 2 canvas: every box is on whole cells, so that eager computes the same."""
    tile = model.config.image_size
    size = (2 * tile, 2 * tile)
    layout = model.config.geometry().layout(*size)
    return {
        "pixel_values": torch.randn(images, layout.num_views, 3, tile, tile, device=device, dtype=dtype),
        "high_res_pixel_values": torch.randn(images, 3, *layout.raster, device=device, dtype=dtype),
        "image_sizes": torch.tensor([size] * images),
    }


def towers(
    config: FilaVisionConfig, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, Callable[[], FilaVisionModel]], dict[str, str]]:
    """Functions that build each contestant, and who is absent and why."""

    def with_backend(name: str) -> Callable[[], FilaVisionModel]:
        def make() -> FilaVisionModel:
            model = build(config, device, dtype, "deep")
            for module in model.fusion:
                module.backend = name
            return model

        return make

    def eager() -> FilaVisionModel:
        model = build(config, device, dtype, "deep")
        model.fusion = nn.ModuleList(EagerFusion(module) for module in model.fusion)
        return model

    found: dict[str, Callable[[], FilaVisionModel]] = {
        "no_fusion": lambda: build(config, device, dtype, "none"),
        "fusion_tuned_eager": eager,
    }
    missing = {}
    for name in BACKENDS:
        reason = absent(name, device)
        if reason is None:
            found[f"fusion_{name}"] = with_backend(name)
        else:
            missing[f"fusion_{name}"] = reason
    return found, missing


def step_of(model: FilaVisionModel, inputs: dict[str, Tensor], operation: str) -> Callable[[], object]:
    if operation == "tower":

        def forward() -> object:
            with torch.no_grad():
                return model(**inputs).last_hidden_state

        return forward
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def step() -> None:
        model(**inputs).last_hidden_state.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def results_of(model: FilaVisionModel, inputs: dict[str, Tensor], operation: str) -> dict[str, Tensor]:
    """The tower's result, or the gradients of a training step, those of one part of the model as one vector."""
    if operation == "tower":
        with torch.no_grad():
            return {"result": model(**inputs).last_hidden_state}
    model(**inputs).last_hidden_state.to(torch.promote_types(torch.float32, model.dtype)).square().mean().backward()
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            parts.setdefault(name.split(".")[0], []).append(parameter.grad.flatten())
    model.zero_grad()
    return {f"gradients of {part}": torch.cat(found) for part, found in parts.items()}


class Gate:
    """|found - exact| <= 2 (|eager - exact| + eps |exact|) in the Euclidean norm, on one picture.

    `exact` is eager fusion in float64 with the same parameters. The norm stands where single operations are held to
    their largest error: roundings that a deep tower has multiplied have no largest one to speak of.
    """

    def __init__(self, eager: Callable[[], FilaVisionModel], device: torch.device, operation: str) -> None:
        self.operation, model = operation, eager()
        torch.manual_seed(1)
        self.inputs = pictures(model, 1, device, model.dtype)
        self.eps = torch.finfo(model.dtype).eps
        self.eager = results_of(model, self.inputs, operation)
        wide = {name: t.double() if t.is_floating_point() else t for name, t in self.inputs.items()}
        self.exact = results_of(model.double(), wide, operation)

    def __call__(self, model: FilaVisionModel) -> tuple[float, str]:
        """The worst error over eager's, and where the bound is passed, if it is."""
        found, worst, red = results_of(model, self.inputs, self.operation), 0.0, ""
        if found.keys() != self.exact.keys():
            return float("inf"), f"has {', '.join(found)}, expected {', '.join(self.exact)}"
        for name, exact in self.exact.items():
            ours, eager = (float((each.double() - exact).norm()) for each in (found[name], self.eager[name]))
            rounding = self.eps * float(exact.norm())
            worst = max(worst, ours / max(eager, rounding / 2))
            if not ours <= 2 * (eager + rounding):
                red = f"{name}: error {ours:.2e} above {2 * (eager + rounding):.2e}"
        return worst, red


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.e2e", description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, help="the paper's on a GPU, fila-nano on a CPU, if not given")
    parser.add_argument("--images", default="", help="1,8 on a GPU and 1 on a CPU if not given")
    parser.add_argument(
        "--rule", default="scaled,fixed", help="rasters: scaled (1536 pixels in the paper) and fixed (768)"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="a GPU where there is one, if not given")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--csv", type=Path, help="bench/results/e2e_DEVICE.csv if not given")
    parser.add_argument("--resume", action="store_true", help="leave out what the CSV holds")
    parser.add_argument("--seconds", type=float, default=0.0, help=f"begin no case after that; exit {TIME_IS_UP} then")
    return parser.parse_args(arguments)


def measure_case(
    config: FilaVisionConfig, images: int, operation: str, name: str, options: argparse.Namespace, path: Path
) -> list[str]:
    """All towers of one configuration, gated, in interleaved rounds.

    Returns what is red of this package's own: nothing is timed or recorded then.
    """
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    makers, notes = towers(config, device, dtype)
    runners: dict[str, Runner] = {}
    steps: dict[str, Callable[[], object]] = {}
    errors: dict[str, float] = {}
    red: list[str] = []
    gate = Gate(makers["fusion_tuned_eager"], device, operation)
    for variant, make in makers.items():
        model = make()
        try:
            torch.manual_seed(1)
            inputs = pictures(model, images, device, dtype)
            if variant != "no_fusion":
                errors[variant], reason = gate(model)
                if reason:
                    red.append(f"{name}, {operation}, {variant}: red: {reason}")
                    continue
            steps[variant] = step_of(model, inputs, operation)
            runners[variant] = Runner([steps[variant]], device)
        except torch.OutOfMemoryError:
            notes[variant] = "out of memory"
            # A step that was cut off leaves gradients behind.
            model.zero_grad()
            torch.cuda.empty_cache()
    if red:
        return red
    seconds: dict[str, list[float]] = {variant: [] for variant in runners}
    run = interleaved(runners)
    for _ in range(options.rounds + 1):
        for variant, taken in run().items():
            seconds[variant].append(taken)
    for variant in [*makers, *(v for v in notes if v not in makers)]:
        row: dict[str, object] = {
            "clock": "events" if device.type == "cuda" else "wall", "case": name, "direction": OPERATIONS[operation],
            "variant": variant, "operation": operation, "note": notes.get(variant, ""),
        }  # fmt: skip
        if variant in runners:
            row["extra_memory_bytes"] = extra_memory(steps[variant], device)
            row["first_call_ms"] = f"{runners[variant].first_seconds * 1e3:.5g}"
        if variant in errors:
            row["error"] = f"{errors[variant]:.3g}"
        records.append(path, records.environment(device) | records.times_of(seconds.get(variant, [])[1:]) | row)
    return []


def main(arguments: list[str] | None = None) -> int:
    """Measure every configuration, print the table; exit 1 without it where an own backend is red."""
    options = parse(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    gpu = options.device == "cuda"
    options.preset = options.preset or ("fila-llama3-8b" if gpu else "fila-nano")
    path = options.csv or RESULTS / f"e2e_{slug(torch.device(options.device))}.csv"
    if not options.resume:
        path.unlink(missing_ok=True)
    deadline = time.monotonic() + options.seconds if options.seconds else float("inf")
    here = records.environment(torch.device(options.device))
    print(f"{here['device']}: vision tower of {options.preset}, into {path}", flush=True)
    unfinished = False
    for rule in options.rule.split(","):
        for images in map(int, (options.images or ("1,8" if gpu else "1")).split(",")):
            config = preset(options.preset).vision_config
            config.high_res_rule = rule
            name = f"{options.preset}-{rule}-{options.dtype}-b{images}"
            for operation, direction in OPERATIONS.items():
                key = here | {"operation": operation, "case": name, "direction": direction, "variant": "no_fusion"}
                if records.key(key) in records.done(records.read(path)):
                    continue
                if time.monotonic() > deadline:
                    unfinished = True
                    continue
                red = measure_case(config, images, operation, name, options, path)
                if red:
                    print("\n".join(red))
                    return 1
    print(table(records.read(path)))
    return TIME_IS_UP if unfinished else 0


if __name__ == "__main__":
    sys.exit(main())
