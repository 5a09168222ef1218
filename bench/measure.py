"""One case in one direction: gate every variant, then time those that are green in interleaved rounds, and record."""

import gc
from collections.abc import Callable
from typing import Any

import torch

from bench import records, roofline
from bench.baselines import rounded
from bench.cases import DTYPES, Case
from bench.memory import extra_memory, kept_for_backward
from bench.settings import Settings
from bench.timing import GraphRunner, Runner, interleaved, num_sets
from bench.variants import Variant, select
from bench.verify import Gate, Verdict, fractional_verdict, step

DIRECTIONS = ("forward", "forward+backward")
_ROOFS: dict[tuple[str, str], roofline.Roof] = {}


class OwnTime:
    """A clock that runs only while this package's own variant does, so that pytest-benchmark compares that."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


own_time = OwnTime()


def roof_of(dtype: str, device: torch.device) -> roofline.Roof:
    """Measured once in a process."""
    key = dtype, device.type
    if key not in _ROOFS:
        _ROOFS[key] = roofline.measure_roof(DTYPES[dtype], device)
    return _ROOFS[key]


def pending(settings: Settings, case: Case, direction: str) -> list[Variant]:
    """The variants of a case that the CSV does not hold yet."""
    device = settings.torch_device()
    variants, _ = select(device, [name for name in settings.variants.split(",") if name])
    variants = [v for v in variants if direction == "forward" or not v.forward_only]
    if not settings.resume:
        return variants
    here = records.environment(device) | {"operation": "cvfm", "case": case.name, "direction": direction}
    done = records.done(records.read(settings.output()))
    return [v for v in variants if records.key(here | {"variant": v.name}) not in done]


class Measurement:
    """All variants of one case in one direction on one device."""

    def __init__(self, settings: Settings, case: Case, direction: str) -> None:
        self.settings, self.case, self.direction = settings, case, direction
        self.device = settings.torch_device()
        self.variants = pending(settings, case, direction)
        sets = num_sets(case.input_bytes(), self.device)
        self.sets = [case.inputs(seed, self.device) for seed in range(sets)]
        self.grad = torch.randn_like(self.sets[0]["tokens"]) if direction != "forward" else None
        self.verdicts: dict[str, Verdict] = {}
        self.notes: dict[str, str] = {}
        self.first_seconds: dict[str, float] = {}
        self.functions: dict[str, Callable] = {}
        self.runners: dict[str, Runner] = {}

    def arguments(self, variant: Variant, inputs: dict[str, Any], whole: bool = False) -> dict[str, Any]:
        """The inputs as the variant takes them."""
        if variant.ours and not whole:
            return inputs
        boxes = rounded(inputs["boxes"])
        if variant.ours:
            return inputs | {"boxes": boxes}
        return inputs | {"boxes": boxes.int().tolist(), "image_index": inputs["image_index"].tolist()}

    def call(self, variant: Variant, inputs: dict[str, Any]) -> Callable[[], Any]:
        wanted, prefix = self.case.wanted, self.case.prefix
        return step(self.functions[variant.name], inputs, wanted, self.grad, num_prefix_tokens=prefix)

    def judge(self) -> None:
        """Fill `verdicts` and `notes`; the float64 tensors are gone afterwards."""
        inputs = self.sets[0]
        whole = inputs | {"boxes": rounded(inputs["boxes"])}
        gate = Gate(self.case, whole, self.grad)
        for variant in self.variants:
            try:
                self.functions[variant.name] = variant.make()
                call = self.call(variant, self.arguments(variant, inputs, whole=True))
                self.first_seconds[variant.name] = Runner([call], self.device).first_seconds
                verdict = gate(call)
                if verdict.green and variant.ours and self.grad is None:
                    call = self.call(variant, self.arguments(variant, inputs))
                    fractional = fractional_verdict(gate, call, inputs, self.case.prefix)
                    verdict = verdict if fractional.green else fractional
            except Exception as error:  # a baseline's own failure is a result; this package's own is not
                if variant.ours and not variant.graph:
                    raise
                self.notes[variant.name] = _one_line(error)
                continue
            self.verdicts[variant.name] = verdict
            if not verdict.green:
                self.notes[variant.name] = f"red: {verdict.worst}"
        del gate
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def red(self) -> list[str]:
        """This package's own variants that disagree with the definition."""
        names = {variant.name for variant in self.variants if variant.ours}
        return [f"{name}: {note}" for name, note in self.notes.items() if name in names and note.startswith("red")]

    def prepare(self) -> None:
        """Bind every green variant to its buffers, warm."""
        for variant in self.variants:
            if variant.name in self.notes:
                continue
            calls = [self.call(variant, self.arguments(variant, inputs)) for inputs in self.sets]
            try:
                if variant.graph:
                    self.runners[variant.name] = GraphRunner(calls, self.device)
                else:
                    self.runners[variant.name] = Runner(calls, self.device, self.settings.now())
            except Exception as error:  # what synchronises cannot be captured
                self.notes[variant.name] = _one_line(error)
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)

    def memory(self, variant: Variant) -> dict[str, object]:
        if variant.graph:
            return {}
        inputs = self.arguments(variant, self.sets[0])
        found: dict[str, object] = {"extra_memory_bytes": extra_memory(self.call(variant, inputs), self.device)}
        if self.grad is not None:
            leaves = {n: t.detach().requires_grad_() if n in self.case.wanted else t for n, t in inputs.items()}
            tensors = [t for t in leaves.values() if isinstance(t, torch.Tensor)]
            function, prefix = self.functions[variant.name], self.case.prefix
            try:
                found["kept_bytes"] = kept_for_backward(lambda: function(**leaves, num_prefix_tokens=prefix), tensors)
            except Exception as error:  # compiled functions may refuse hooks; their times stand
                self.notes[variant.name] = f"kept_bytes: {_one_line(error)}"
        return found

    def record(self, seconds: dict[str, list[float]]) -> None:
        """One row for each variant, timed or not."""
        case, settings, device = self.case, self.settings, self.device
        roof = roof_of(case.dtype, device)
        least = roofline.floor(case, self.direction, roof)
        passes = 1 if self.direction == "forward" else 3
        for variant in self.variants:
            name = variant.name
            row: dict[str, object] = {
                "clock": "events" if device.type == "cuda" else settings.clock,
                "case": case.name, "direction": self.direction, "variant": name, "operation": "cvfm",
                "flops": passes * case.flops(), "bytes": passes * case.bytes(),
                "floor_flops": least.flops, "floor_bytes": least.bytes,
                "roof_flops": f"{roof.flops:.5g}", "roof_bytes": f"{roof.bytes:.5g}",
            }  # fmt: skip
            if name in self.runners:
                row |= self.memory(variant)
                if device.type == "cuda":
                    row["host_ms"] = f"{self.runners[name].host_seconds() * 1e3:.5g}"
            if name in self.first_seconds:
                row["first_call_ms"] = f"{self.first_seconds[name] * 1e3:.5g}"
            if name in self.verdicts:
                row["error"] = f"{self.verdicts[name].error:.4g}"
            row["note"] = self.notes.get(name, "")
            times = records.times_of(seconds.get(name, []))
            records.append(settings.output(), records.environment(device) | times | row)

    def round(self) -> Callable[[], None]:
        """One interleaved round; times gather in `seconds`."""
        self.seconds: dict[str, list[float]] = {name: [] for name in self.runners}
        run = interleaved(self.runners)
        own = [v.name for v in self.variants if v.ours and v.name in self.runners] or list(self.runners)

        def once() -> None:
            for name, seconds in run().items():
                self.seconds[name].append(seconds)
            own_time.seconds += self.seconds[own[0]][-1]

        return once


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
