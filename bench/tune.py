"""Measures which configs and plans are fastest on this GPU, and writes them into the device's table.

    python -m bench.tune --suite images-8

What is timed is the operation itself, as a CUDA graph over buffers that rotate past the second-level cache, with one
launch's config or one direction's plan changed: that is what a user gets, caches and neighbours included. Configs come
from `fila_kernels.backends.triton.configs.candidates`, the table's form is `fila_kernels.tuned`'s. The default stays
where nothing beats it by more than the measurement scatters. Entries that the table has are kept, so that a second
run goes on where the first stopped. Compilation is done beforehand by other processes, into Triton's own cache.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.cases import DTYPES, SUITES, Case
from bench.run import TIME_IS_UP
from bench.timing import GraphRunner, Runner, interleaved, num_sets, quantile
from bench.verify import step
from fila_kernels import cvfm, planner, tuned
from fila_kernels.backends.triton import configs
from fila_kernels.backends.triton.configs import Config, Problem
from fila_kernels.call import DIRECTIONS, PLANS, Measured, Shape

GAIN = 0.005  # what a config or plan has to gain over the default; two measurements of one differ by less
WORKERS = 8
SHARED_IMAGES = 16  # images a call at most while processes compile side by side
Key = tuple[str, tuple[int, ...], str]  # kernel, sizes, dtype


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class TrialConfigs(Measured):
    """The trial's configs of one dtype."""

    def __init__(self, trial: "Trial", dtype: torch.dtype) -> None:
        super().__init__()
        self.trial, self.dtype = trial, dtype

    def nearest(self, subject: str, sizes: Sequence[int]) -> tuple[dict[str, Any], bool] | None:
        key = (subject, tuple(sizes), dtype_name(self.dtype))
        self.trial.asked[key] = self.dtype
        found = self.trial.tried.get(key)
        return None if found is None else (found, True)


class Trial(tuned.Table):
    """A table that answers with what is being tried, and remembers what was asked."""

    def __init__(self, entries: dict[str, Any]) -> None:
        super().__init__()
        self.tried: dict[Key, dict[str, Any]] = {
            (e["kernel"], tuple(e["problem"]), e["dtype"]): e["config"] for e in entries["configs"]
        }
        self.plans: dict[tuple[tuple[int, ...], str], dict[str, str]] = {}
        for entry in entries["plans"]:
            chosen = {direction: entry[direction] for direction in DIRECTIONS}
            self.plans[Shape(**entry["shape"]), entry["dtype"]] = chosen
        self.asked: dict[Key, torch.dtype] = {}

    def plan(self, shape: Shape, dtype: torch.dtype) -> tuple[dict[str, str], bool] | None:
        found = self.plans.get((tuple(shape), dtype_name(dtype)))
        return (found, True) if found else None

    def configs(self, dtype: torch.dtype) -> Measured:
        return TrialConfigs(self, dtype)

    @contextmanager
    def active(self) -> Iterator[None]:
        """The planner and the launchers read this table instead of the device's."""
        with mock.patch.object(tuned, "load", return_value=self):
            yield


def shape_of(case: Case) -> Shape:
    return Shape(
        tiles=case.tiles, prefix=case.prefix, grid=case.grid, token_width=case.token_width,
        hidden_width=case.hidden_width, feature_width=case.channels, images=case.images, height=case.side,
        width=case.side,
    )  # fmt: skip


def plans_for(case: Case) -> list[str]:
    wide = max(case.token_width, case.hidden_width) > configs.TRITON_SINGLE_PASS_WIDTH
    return [plan for plan in PLANS if not (plan == "single_pass" and wide)]


def shortlist(problem: Problem, device: configs.Device, most: int) -> list[Config]:
    """At most so many candidates: the likeliest half of them, then evenly spread over the rest."""
    found = configs.candidates(problem, device)
    if len(found) <= most:
        return found
    head, rest = found[: -(-most // 2)], found[-(-most // 2) :]
    count = most - len(head)
    return head + [rest[index * len(rest) // count] for index in range(count)]


class Tuner:
    """The table of one device, filled case by case."""

    def __init__(
        self,
        device: torch.device,
        paths: Sequence[Path],
        kernels: Sequence[str],
        most: int,
        rounds: int,
        deadline: float,
    ) -> None:
        self.device, self.paths, self.kernels = device, paths, kernels
        self.most, self.rounds, self.deadline = most, rounds, deadline
        self.limits = configs.device_of(device)
        self.entries: dict[str, Any] = {
            "schema": tuned.SCHEMA, "device": self.limits.name, "plans": [], "configs": [],
        }  # fmt: skip
        for path in paths:
            if path.exists():
                self.entries = json.loads(path.read_text())
                break
        self.trial = Trial(self.entries)
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def time_is_up(self) -> bool:
        return time.monotonic() > self.deadline

    def save(self) -> None:
        text = json.dumps(self.entries, indent=1) + "\n"
        for path in self.paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def calls(self, case: Case, plan: str | None, backward: bool) -> list[Callable[[], object]]:
        sets = [case.inputs(seed, self.device) for seed in range(num_sets(case.input_bytes(), self.device))]
        grad = torch.randn_like(sets[0]["tokens"]) if backward else None
        return [self.call(case, inputs, grad, plan) for inputs in sets]

    def call(
        self, case: Case, inputs: dict[str, Tensor], grad: Tensor | None, plan: str | None
    ) -> Callable[[], object]:
        settings = {"num_prefix_tokens": case.prefix, "plan": plan, "backend": "triton"}
        return step(cvfm, inputs, case.wanted, grad, **settings)

    def problems(self, call: Callable[[], object]) -> dict[Key, torch.dtype]:
        """What a call asks the table for."""
        self.trial.asked = {}
        with self.trial.active():
            call()
        return dict(self.trial.asked)

    def runner(self, calls: list[Callable[[], object]]) -> Runner:
        with self.trial.active():
            if self.device.type == "cuda":
                return GraphRunner(calls, self.device, self.pool)
            return Runner(calls, self.device)

    def fastest(self, runners: dict[Any, Runner], default: Any) -> Any:
        """The name with the lowest median, unless the default is within the scatter of it."""
        seconds: dict[Any, list[float]] = {name: [] for name in runners}
        run = interleaved(runners)
        for _ in range(self.rounds):
            with self.trial.active():
                for name, taken in run().items():
                    seconds[name].append(taken)
        medians = {name: quantile(taken, 0.5) for name, taken in seconds.items()}
        best = min(medians, key=medians.__getitem__)
        near = default in medians and medians[best] > (1 - GAIN) * medians[default]
        return default if near else best

    def tune_configs(self, case: Case, plan: str) -> None:
        """Every launch of one plan, the forward pass's by the forward pass alone."""
        settled: set[Key] = set()
        for backward in (False, True):
            calls = self.calls(case, plan, backward)
            asked = self.problems(calls[0])
            for key, dtype in asked.items():
                if key in self.trial.tried or key in settled or key[0] not in self.kernels:
                    continue
                if self.time_is_up():
                    return
                self.tune_problem(key, dtype, calls)
            settled |= asked.keys()

    def tune_problem(self, key: Key, dtype: torch.dtype, calls: list[Callable[[], object]]) -> None:
        kernel, sizes, name = key
        problem = Problem(kernel, *sizes, dtype)
        runners: dict[Any, Runner] = {}
        for config in shortlist(problem, self.limits, self.most):
            self.trial.tried[key] = configs.plain(config)
            try:
                runners[config] = self.runner(calls)
            except Exception as error:  # one that does not compile or does not fit is not a candidate
                print(f"  {kernel} {sizes}: {config}: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
        if not runners:
            del self.trial.tried[key]
            return
        # A captured graph keeps its config; without graphs every round has to ask for it again.
        for config, runner in runners.items():
            if not isinstance(runner, GraphRunner):
                runner.calls = [self.with_config(key, config, call) for call in runner.calls]
        best = self.fastest(runners, configs.default(problem, self.limits))
        self.trial.tried[key] = configs.plain(best)
        self.entries["configs"].append(
            {"kernel": kernel, "problem": list(sizes), "dtype": name, "config": configs.plain(best)}
        )
        self.save()
        print(f"  {kernel} {list(sizes)} {name}: {best}, of {len(runners)}", flush=True)

    def with_config(self, key: Key, config: Config, call: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            self.trial.tried[key] = configs.plain(config)
            return call()

        return run

    def tune_plans(self, case: Case) -> None:
        """One direction after the other, the forward plan by the forward pass alone."""
        shape, name = shape_of(case), case.dtype
        if (tuple(shape), name) in self.trial.plans or self.time_is_up():
            return
        start = planner.choose(shape, DTYPES[case.dtype], self.device, None, "triton")
        chosen = {direction: getattr(start, direction) for direction in DIRECTIONS}
        plans = plans_for(case)
        for direction in DIRECTIONS:
            runners: dict[Any, Runner] = {}
            calls = self.calls(case, None, direction != "forward")
            for plan in plans if direction == "forward" else plans[:2]:
                attempt = chosen | {direction: plan}
                self.trial.plans[tuple(shape), name] = attempt
                runner = self.runner(calls)
                if not isinstance(runner, GraphRunner):
                    runner.calls = [self.with_plan(shape, name, attempt, call) for call in runner.calls]
                runners[plan] = runner
            chosen[direction] = self.fastest(runners, chosen[direction])
        self.trial.plans[tuple(shape), name] = chosen
        self.entries["plans"].append({"shape": shape._asdict(), "dtype": name} | chosen)
        self.save()
        print(f"  plan of {case.name}: {chosen}", flush=True)

    def with_plan(
        self, shape: Shape, name: str, attempt: dict[str, str], call: Callable[[], object]
    ) -> Callable[[], object]:
        def run() -> object:
            self.trial.plans[tuple(shape), name] = attempt
            return call()

        return run

    def tune(self, case: Case) -> None:
        print(case.name, flush=True)
        for plan in plans_for(case):
            self.tune_configs(case, plan)
        self.tune_plans(case)

    def compile_share(self, cases: Sequence[Case], share: int, of: int) -> None:
        """Run every `of`-th candidate once, so that Triton's cache holds it when its time is taken."""
        number = 0
        for case in cases:
            # Of its sizes a kernel knows whether they are 1 or multiples of 16, and 16 images agree with 32 in that; no
            # more than these leave room on the device for all processes.
            inputs = (case := dataclasses.replace(case, images=min(case.images, SHARED_IMAGES))).inputs(0, self.device)
            grad = torch.randn_like(inputs["tokens"])
            for plan in plans_for(case):
                call = self.call(case, inputs, grad, plan)
                for key, dtype in self.problems(call).items():
                    if key in self.trial.tried or key[0] not in self.kernels:
                        continue
                    for config in shortlist(Problem(key[0], *key[1], dtype), self.limits, self.most):
                        number += 1
                        if number % of == share and not self.time_is_up():
                            self.trial.tried[key] = configs.plain(config)
                            try:
                                self.problems(call)
                            except Exception as error:  # said when its turn comes to be measured
                                print(f"{key[0]}: {type(error).__name__}", file=sys.stderr)
                    self.trial.tried.pop(key, None)


def compile_ahead(arguments: list[str], workers: int, seconds: float) -> None:
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
    """Tune every case of the suites; exit 75 where time was up first, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    parser.add_argument("--suite", default="images-8", help=f"some of {', '.join(SUITES)}, separated by commas")
    parser.add_argument(
        "--out", type=Path, help="a folder for a second copy of the table, read where there is no first"
    )
    parser.add_argument("--table", type=Path, help="the file to write; fila_kernels/tables/DEVICE.json if not given")
    parser.add_argument("--kernels", default="", help=f"some of {', '.join(configs.KERNELS)}; all if not given")
    parser.add_argument("--most", type=int, default=16, help="configs tried for a launch")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds a choice")
    parser.add_argument("--seconds", type=float, default=0.0, help=f"stop after that; exit {TIME_IS_UP} then")
    parser.add_argument("--workers", type=int, default=WORKERS, help="processes that compile; 0 to compile here")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="cpu needs TRITON_INTERPRET=1")
    parser.add_argument("--compile-share", help=argparse.SUPPRESS)
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench.tune: no CUDA device; a table is measured on the device it is for", file=sys.stderr)
        return 2
    device = torch.device(options.device)
    cases = list(dict.fromkeys(case for suite in options.suite.split(",") for case in SUITES[suite]))
    table = options.table or tuned.path_of(configs.device_of(device).name)
    paths = [table, *([options.out / table.name] if options.out else [])]
    deadline = time.monotonic() + options.seconds if options.seconds else float("inf")
    kernels = options.kernels.split(",") if options.kernels else configs.KERNELS
    unknown = [name for name in kernels if name not in configs.KERNELS]
    if unknown:
        parser.error(f"--kernels: expected some of {', '.join(configs.KERNELS)}, got {', '.join(unknown)}")
    tuner = Tuner(device, paths, kernels, options.most, options.rounds, deadline)
    if options.compile_share:
        share, of = map(int, options.compile_share.split("/"))
        tuner.compile_share(cases, share, of)
        return 0
    if options.workers:
        compile_ahead(list(given), options.workers, options.seconds / 2 if options.seconds else 600.0)
    for case in cases:
        tuner.tune(case)
    if tuner.time_is_up():
        print(f"time is up after {options.seconds:.0f} s; run again to go on")
        return TIME_IS_UP
    print(f"{table}: {len(tuner.entries['configs'])} configs, {len(tuner.entries['plans'])} plans")
    return 0


if __name__ == "__main__":
    sys.exit(main())
