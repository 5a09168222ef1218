"""Parts of the operation by themselves: several ways to compute one tensor, gated, timed in turns, recorded."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bench import measure, records
from bench.cases import Case
from bench.roofline import Work
from bench.settings import Settings
from bench.timing import Call, Runner, interleaved

Make = Callable[[int], Call]  # the call on one set of buffers


def judge(found: Tensor, eager: Tensor, exact: Tensor) -> tuple[bool, float]:
    """The tests' bound, and the error over eager's."""
    error = float((found.double() - exact).abs().max().nan_to_num(nan=float("inf")))
    rounding = torch.finfo(found.dtype).eps * float(exact.abs().max())
    reached = float((eager.double() - exact).abs().max())
    return error <= 2 * (reached + rounding), error / max(reached, rounding / 2, 1e-300)


class Contest:
    """One case of one part in one direction."""

    def __init__(self, settings: Settings, operation: str, case: Case, direction: str) -> None:
        self.settings, self.device, self.dtype = settings, settings.torch_device(), case.dtype
        self.here = records.environment(self.device)
        self.here |= {"operation": operation, "case": case.name, "direction": direction}
        self.here["clock"] = "events" if self.device.type == "cuda" else settings.clock

    def pending(self, names: list[str]) -> list[str]:
        """Those that the CSV does not hold."""
        if not self.settings.resume:
            return names
        done = records.done(records.read(self.settings.output()))
        return [name for name in names if records.key(self.here | {"variant": name}) not in done]

    def run(
        self,
        benchmark: Callable,
        ways: Mapping[str, Make],
        sets: int,
        own: list[str],
        results: tuple[Tensor, Tensor],
        notes: dict[str, str],
        work: Work,
        select: Callable[[Tensor], Tensor] = lambda result: result,
        ungated: tuple[str, ...] = (),
        in_double: Mapping[str, Call] | None = None,
    ) -> list[str]:
        """Gate, time and record; `results` are the definition in float64 and in the case's dtype.

        `select` takes from a result what is compared; `ungated` ways compute something else and are timed regardless.
        `in_double` has the same calls of others' ways on float64 inputs: what they compute is judged by these, their
        rounding in the case's dtype is their own, and is recorded.

        Returns the names of this package's own ways that are red: nothing is timed then.
        """
        exact, eager = results
        runners: dict[str, Runner] = {}
        errors: dict[str, float] = {}
        first: dict[str, float] = {}
        red = []
        for name, make in ways.items():
            try:
                one = make(0)
                first[name] = Runner([one], self.device).first_seconds
                green = name in ungated
                if not green:
                    green, errors[name] = judge(select(one()), eager, exact)
                    if in_double and name in in_double:
                        green, _ = judge(select(in_double[name]()), eager, exact)
            except (RuntimeError, NotImplementedError) as error:
                if name in own:
                    raise
                notes[name] = str(error).splitlines()[0][:200]
                continue
            if green:
                runners[name] = Runner([make(index) for index in range(sets)], self.device, self.settings.now())
            else:
                notes[name] = f"red: error {errors[name]:.3g} times eager's"
                red += [name] if name in own else []
        seconds: dict[str, list[float]] = {name: [] for name in runners}
        turn = interleaved(runners)
        kept = next((name for name in [*own, *runners] if name in runners), None)

        def once() -> None:
            for name, taken in turn().items():
                seconds[name].append(taken)
            measure.own_time.seconds += seconds[kept][-1] if kept else 0.0

        if not red:
            benchmark.pedantic(once, rounds=self.settings.rounds, warmup_rounds=1)
        self.record([*ways, *(name for name in notes if name not in ways)], seconds, errors, first, notes, work)
        return red

    def record(self, names: list[str], seconds, errors, first, notes, work: Work) -> None:
        roof = measure.roof_of(self.dtype, self.device)
        for name in names:
            times = seconds.get(name, [])
            row = self.here | records.times_of(times[1:] or times)
            row |= {
                "variant": name, "note": notes.get(name, ""),
                "flops": work.flops, "bytes": work.bytes, "floor_flops": work.flops, "floor_bytes": work.bytes,
                "roof_flops": f"{roof.flops:.5g}", "roof_bytes": f"{roof.bytes:.5g}",
                "error": f"{errors[name]:.4g}" if name in errors else "",
                "first_call_ms": f"{first[name] * 1e3:.5g}" if name in first else "",
            }  # fmt: skip
            records.append(self.settings.output(), row)
