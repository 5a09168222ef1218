"""Measures which configs and plans are fastest on this GPU, and writes them into the device's table.

    python -m bench.tune --suite images-8

The whole operation is timed, as a CUDA graph over buffers that rotate past the second-level cache, with one launch's
config or one direction's plan changed at a time, so that caches and neighbours are those of real use. It tries
`fila_kernels.backends.triton.configs.candidates`; `fila_kernels.tuned` has the table's form. The default stays unless
something beats it by more than the measurement scatters. Existing entries are kept, so that a second run resumes.
Other processes compile beforehand, into Triton's own cache.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.engine import GraphRunner, Runner, Step, in_turns, num_sets, quantile
from bench.run import TIME_IS_UP
from bench.verify import step
from bench.workloads import DTYPES, SUITES, Workload
from fila_kernels import cvfm, planner, tuned
from fila_kernels.backends.triton import configs
from fila_kernels.backends.triton.configs import Config, Problem
from fila_kernels.call import DIRECTIONS, PLANS, TRITON_SINGLE_PASS_WIDTH, Measured, Plan, Shape

GAIN = 0.005  # what a config or plan has to gain over the default; two measurements of one differ by less
SHARED_IMAGES = 16  # images per call at most while processes compile side by side
Key = tuple[str, tuple[int, ...]]  # kernel and sizes
Setting = Callable[[], None]  # makes a trial's next call run with one config or plan


def plans_for(workload: Workload) -> list[str]:
    wide = max(workload.token_width, workload.hidden_width) > TRITON_SINGLE_PASS_WIDTH
    return [plan for plan in PLANS if not (plan == "single_pass" and wide)]


def shortlist(problem: Problem, device: configs.Device, most: int) -> list[Config]:
    """At most `most` candidates: the likeliest half of them, then evenly spread over the rest."""
    found = configs.candidates(problem, device)
    if len(found) <= most:
        return found
    head, rest = found[: -(-most // 2)], found[-(-most // 2) :]
    count = most - len(head)
    return head + [rest[index * len(rest) // count] for index in range(count)]


class Trial(Measured):
    """The configs and the plan that are being tried for one dtype, in place of the device's table."""

    def __init__(self, entries: Mapping[str, Any], dtype: str) -> None:
        super().__init__()
        self.configs: dict[Key, dict[str, Any]] = {
            (e["kernel"], tuple(e["problem"])): e["config"] for e in entries["configs"] if e["dtype"] == dtype
        }
        self.plan: dict[str, str] | None = None
        self.asked: list[Key] = []

    def nearest(self, subject: str, sizes: Sequence[int]) -> tuple[dict[str, Any], bool] | None:
        key = (subject, tuple(sizes))
        self.asked.append(key)
        return (self.configs[key], True) if key in self.configs else None

    def call(self, call: Step) -> Any:
        """Make a call for which the planner answers with this trial."""
        choose = planner.choose

        def chosen(*arguments: Any, **settings: Any) -> Plan:
            plan = dataclasses.replace(choose(*arguments, **settings), configs=self)
            return plan if self.plan is None else dataclasses.replace(plan, **self.plan)

        with mock.patch.object(planner, "choose", chosen):
            return call()

    def asks(self, call: Step) -> list[Key]:
        """The problems whose configs a call asks for."""
        self.asked = []
        self.call(call)
        return list(dict.fromkeys(self.asked))


class Tuner:
    """The table of one device, filled workload by workload."""

    def __init__(
        self, device: torch.device, paths: Sequence[Path], kernels: Sequence[str], most: int, rounds: int,
        deadline: float = float("inf"),
    ) -> None:  # fmt: skip
        self.device, self.paths, self.kernels = device, paths, kernels
        self.most, self.rounds, self.deadline = most, rounds, deadline
        self.limits = configs.device_of(device)
        self.entries: dict[str, Any] = {
            "schema": tuned.SCHEMA, "device": self.limits.name, "plans": [], "configs": [],
        }  # fmt: skip
        found = next((path for path in paths if path.exists()), None)
        if found is not None:
            self.entries = json.loads(found.read_text())
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def time_is_up(self) -> bool:
        return time.monotonic() > self.deadline

    def add(self, kind: str, entry: dict[str, Any]) -> None:
        """Put an entry into the table, which is written at once."""
        self.entries[kind].append(entry)
        for path in self.paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.entries, indent=1) + "\n")
        print(f"  {entry}", flush=True)

    def call(self, workload: Workload, inputs: dict[str, Tensor], plan: str | None, backward: bool) -> Step:
        grad = torch.randn_like(inputs["tokens"]) if backward else None
        settings = {"num_prefix_tokens": workload.prefix, "plan": plan, "backend": "triton"}
        return step(cvfm, inputs, workload.wanted, grad, **settings)

    def calls(self, workload: Workload, plan: str | None, backward: bool) -> list[Step]:
        """One per set of buffers."""
        sets = range(num_sets(workload.input_bytes(), self.device))
        return [self.call(workload, workload.inputs(seed, self.device), plan, backward) for seed in sets]

    def fastest(self, trial: Trial, settings: dict[Any, Setting], calls: Sequence[Step], default: Any) -> Any:
        """The name of the setting with the lowest median, or the default's where that is within the scatter.

        A setting that does not compile or does not fit drops out; None if all do.
        """

        def under(setting: Setting, call: Step) -> Step:
            def tried() -> None:
                setting()
                trial.call(call)

            return tried

        runners: dict[Any, Runner] = {}
        for name, setting in settings.items():
            bound = [under(setting, call) for call in calls]
            try:
                graph = self.device.type == "cuda"
                runners[name] = GraphRunner(bound, self.device, self.pool) if graph else Runner(bound, self.device)
            except Exception as error:
                print(f"  {name}: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
        medians = {name: quantile(taken, 0.5) for name, taken in in_turns(runners, self.rounds).items()}
        best = min(medians, key=medians.__getitem__, default=None)
        near = default in medians and medians[best] > (1 - GAIN) * medians[default]
        return default if near else best

    def candidates(self, trial: Trial, key: Key, dtype: str) -> dict[Config, Setting]:
        """The configs to try for a problem, each with the function that puts it to the trial."""

        def setting(config: Config) -> Setting:
            return lambda: trial.configs.update({key: configs.plain(config)})

        problem = Problem(key[0], *key[1], DTYPES[dtype])  # type: ignore[arg-type]
        return {config: setting(config) for config in shortlist(problem, self.limits, self.most)}

    def missing(self, trial: Trial, call: Step) -> Iterator[Key]:
        """The problems that a call asks for and the table lacks."""
        for key in trial.asks(call):
            if key not in trial.configs and key[0] in self.kernels and not self.time_is_up():
                yield key

    def tune_configs(self, workload: Workload, plan: str) -> None:
        """Every launch of one plan, those of the forward pass by the forward pass alone."""
        trial = Trial(self.entries, workload.dtype)
        for backward in (False, True):
            calls = self.calls(workload, plan, backward)
            for key in self.missing(trial, calls[0]):
                tried = self.candidates(trial, key, workload.dtype)
                best = self.fastest(trial, tried, calls, next(iter(tried)))
                if best is None:
                    trial.configs.pop(key, None)
                    continue
                tried[best]()
                entry = {"kernel": key[0], "problem": list(key[1]), "dtype": workload.dtype}
                self.add("configs", entry | {"config": configs.plain(best)})

    def tune_plan(self, workload: Workload) -> None:
        """One direction after the other, the forward plan by the forward pass alone."""
        shape, plans = workload.shape, plans_for(workload)
        known = [(Shape(**entry["shape"]), entry["dtype"]) for entry in self.entries["plans"]]
        if (shape, workload.dtype) in known or self.time_is_up():
            return
        trial = Trial(self.entries, workload.dtype)
        start = planner.choose(shape, DTYPES[workload.dtype], self.device, None, "triton")
        chosen = {direction: getattr(start, direction) for direction in DIRECTIONS}
        for direction in DIRECTIONS:

            def setting(plan: str, direction: str = direction) -> Setting:
                attempt = chosen | {direction: plan}
                return lambda: setattr(trial, "plan", attempt)

            tried = {plan: setting(plan) for plan in (plans if direction == "forward" else plans[:2])}
            calls = self.calls(workload, None, direction != "forward")
            chosen[direction] = self.fastest(trial, tried, calls, chosen[direction]) or chosen[direction]
        self.add("plans", {"shape": shape._asdict(), "dtype": workload.dtype} | chosen)

    def tune(self, workload: Workload) -> None:
        print(workload.name, flush=True)
        for plan in plans_for(workload):
            self.tune_configs(workload, plan)
        self.tune_plan(workload)

    def compile_share(self, workloads: Sequence[Workload], share: int, of: int) -> None:
        """Run every `of`-th candidate once, so that Triton's cache holds it when its time is taken."""
        number = 0
        for workload in workloads:
            # Triton compiles anew where a size becomes 1 or a multiple of 16, in which 16 images agree with 32; the
            # device has room for no more than these in all processes.
            few = dataclasses.replace(workload, images=min(workload.images, SHARED_IMAGES))
            inputs = few.inputs(0, self.device)
            for plan in plans_for(workload):
                trial, call = Trial(self.entries, few.dtype), self.call(few, inputs, plan, True)
                for key in self.missing(trial, call):
                    for setting in self.candidates(trial, key, few.dtype).values():
                        number += 1
                        if number % of == share:
                            setting()
                            try:
                                trial.call(call)
                            except Exception as error:  # told when its turn comes to be measured
                                print(f"{key[0]}: {type(error).__name__}", file=sys.stderr)
                    trial.configs.pop(key, None)


def compile_ahead(arguments: Sequence[str], workers: int, seconds: float) -> None:
    """Let other processes compile what this one is going to measure."""
    command = [sys.executable, "-m", "bench.tune", *arguments]
    processes = [
        subprocess.Popen([*command, "--compile-share", f"{share}/{workers}"], stderr=subprocess.DEVNULL)
        for share in range(workers)
    ]
    end = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main(arguments: list[str] | None = None) -> int:
    """Tune every workload of the suites; exit 75 where time was up first, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--suite", default="images-8", help=f"some of {', '.join(SUITES)}, separated by commas")
    parser.add_argument("--out", type=Path, help="folder for a second copy of the table, read where there is no first")
    parser.add_argument("--table", type=Path, help="the file to write; fila_kernels/tables/DEVICE.json if not given")
    parser.add_argument("--most", type=int, default=16, help="configs tried per launch")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds per choice")
    parser.add_argument("--seconds", type=float, default=0.0, help=f"stop after that; exit {TIME_IS_UP} then")
    parser.add_argument("--workers", type=int, default=8, help="processes that compile; 0 to compile here")
    parser.add_argument("--compile-share", help=argparse.SUPPRESS)
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.tune: no CUDA device; a table is measured on the device it is for", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    workloads = list(dict.fromkeys(workload for suite in options.suite.split(",") for workload in SUITES[suite]))
    table = options.table or tuned.path_of(configs.device_of(device).name)
    paths = [table, *([options.out / table.name] if options.out else [])]
    deadline = time.monotonic() + options.seconds if options.seconds else float("inf")
    tuner = Tuner(device, paths, configs.KERNELS, options.most, options.rounds, deadline)
    if options.compile_share:
        share, of = map(int, options.compile_share.split("/"))
        tuner.compile_share(workloads, share, of)
        return 0
    if options.workers:
        compile_ahead(given, options.workers, options.seconds / 2 if options.seconds else 600.0)
    for workload in workloads:
        tuner.tune(workload)
    if tuner.time_is_up():
        print(f"time is up after {options.seconds:.0f} s; run again to go on")
        return TIME_IS_UP
    print(f"{table}: {len(tuner.entries['configs'])} configs, {len(tuner.entries['plans'])} plans")
    return 0


if __name__ == "__main__":
    sys.exit(main())
