"""Measures which configs and plans are fastest on this GPU, and writes them into the device's table.

    python -m bench.tune --suite images-8

The whole operation is timed, as a CUDA graph over buffers that rotate past the second-level cache, with one launch's
config or one direction's plan changed at a time, so that caches and neighbours are those of real use. It tries
`fila_kernels.backends.triton.configs.candidates`; `fila_kernels.tuned` has the table's form. What differs from the
definition is not timed. The default stays unless something beats it by more than the measurement scatters. The table
is replaced at every entry and its entries are kept, so that a second run resumes. Other processes compile beforehand,
each its own part of the kernels, into Triton's cache.
"""

import argparse
import dataclasses
import functools
import json
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from bench import files
from bench.engine import GraphRunner, Runner, Step, alive, in_turns, num_sets, quantile
from bench.files import LONGEST, TIME_IS_UP, UnderWay
from bench.verify import Gate, cvfm_gate, step
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
        deadline: float = float("inf"), under_way: UnderWay | None = None, longest: float = LONGEST,
    ) -> None:  # fmt: skip
        self.device, self.paths, self.kernels = device, paths, kernels
        self.most, self.rounds, self.deadline = most, rounds, deadline
        self.under_way, self.longest = under_way or UnderWay(), longest
        self.limits = configs.device_of(device)
        self.entries: dict[str, Any] = {
            "schema": tuned.SCHEMA, "device": self.limits.name, "plans": [], "configs": [], "refused": [],
        }  # fmt: skip
        found = next((path for path in paths if path.exists()), None)
        if found is not None:
            self.entries |= json.loads(found.read_text())
        blamed = self.under_way.blamed()
        if blamed is not None:
            self.refuse(*blamed)
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def time_is_up(self) -> bool:
        return time.monotonic() > self.deadline

    def add(self, kind: str, entry: dict[str, Any]) -> None:
        """Put an entry into the table, which is written at once."""
        self.entries[kind].append(entry)
        for path in self.paths:
            files.replace(path, json.dumps(self.entries, indent=1) + "\n")
        print(f"  {entry}", flush=True)

    def refuse(self, step: dict[str, Any], reason: str) -> None:
        """Leave a config or plan out from now on: it is wrong, or it ended a process."""
        self.add("refused", step | {"reason": reason})

    def watch(self, step: dict[str, Any]) -> None:
        self.under_way.begin(", ".join(map(str, step.values())), step, self.longest)

    def refused(self, step: dict[str, Any]) -> bool:
        return any(step.items() <= entry.items() for entry in self.entries["refused"])

    @staticmethod
    def gradient(inputs: dict[str, Tensor], backward: bool, seed: int) -> Tensor | None:
        tokens = inputs["tokens"]
        generator = torch.Generator(tokens.device).manual_seed(seed)
        drawn = torch.randn(tokens.shape, generator=generator, device=tokens.device)
        return drawn.to(tokens.dtype) if backward else None

    def call(self, workload: Workload, seed: int, plan: str | None, backward: bool) -> Step:
        """The operation on one set of buffers."""
        inputs = workload.inputs(seed, self.device)
        settings = {"num_prefix_tokens": workload.prefix, "plan": plan, "backend": "triton"}
        return step(cvfm, inputs, workload.wanted, self.gradient(inputs, backward, seed), **settings)

    def calls(self, workload: Workload, plan: str | None, backward: bool) -> list[Step]:
        """One per set of buffers."""
        sets = range(num_sets(workload.input_bytes(), self.device))
        return [self.call(workload, seed, plan, backward) for seed in sets]

    @functools.lru_cache(maxsize=1)  # noqa: B019  # its tensors may fill a GPU
    def gate(self, workload: Workload, backward: bool) -> Gate:
        """The definition on the first set of buffers."""
        inputs = workload.inputs(0, self.device)
        return cvfm_gate(workload, inputs, self.gradient(inputs, backward, 0))

    def fastest(
        self, trial: Trial, settings: dict[Any, Setting], workload: Workload, plan: str | None, backward: bool,
        default: Any, step: dict[str, Any],
    ) -> Any:  # fmt: skip
        """The name of the setting with the lowest median, or the default's where that is within the scatter.

        A setting that does not compile, does not fit or is wrong drops out; None if all do. `step` says what the
        settings are of.
        """

        def under(setting: Setting, call: Step) -> Step:
            def tried() -> Any:
                setting()
                return trial.call(call)

            return tried

        calls = self.calls(workload, plan, backward)
        named = {name: step | {"setting": str(name)} for name in settings}
        runners: dict[Any, Runner] = {}
        for name, setting in settings.items():
            if self.refused(named[name]):
                continue
            self.watch(named[name])
            bound = [under(setting, call) for call in calls]
            try:
                verdict = self.gate(workload, backward)(bound[0]())
                if not verdict.green:
                    self.refuse(named[name], verdict.worst)
                    continue
                graph = self.device.type == "cuda"
                runners[name] = GraphRunner(bound, self.device, self.pool) if graph else Runner(bound, self.device)
            except Exception as error:
                if not alive(self.device):
                    raise
                print(f"  {name}: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
        taken = in_turns(runners, self.rounds, lambda name: self.watch(named[name]))
        self.under_way.end()
        medians = {name: quantile(seconds, 0.5) for name, seconds in taken.items()}
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
            for key in self.missing(trial, self.call(workload, 0, plan, backward)):
                tried = self.candidates(trial, key, workload.dtype)
                entry = {"kernel": key[0], "problem": list(key[1]), "dtype": workload.dtype}
                best = self.fastest(trial, tried, workload, plan, backward, next(iter(tried)), entry)
                if best is None:
                    trial.configs.pop(key, None)
                    continue
                tried[best]()
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
            entry = {"workload": workload.name, "direction": direction}
            best = self.fastest(trial, tried, workload, None, direction != "forward", chosen[direction], entry)
            chosen[direction] = best or chosen[direction]
        self.add("plans", {"shape": shape._asdict(), "dtype": workload.dtype} | chosen)

    def tune(self, workload: Workload) -> None:
        print(workload.name, flush=True)
        for plan in plans_for(workload):
            self.tune_configs(workload, plan)
        self.tune_plan(workload)

    def compile_share(self, workloads: Sequence[Workload], share: int, of: int) -> None:
        """Compile this share of the kernels that will be timed; nothing is launched."""
        with ExitStack() as patches:
            for kind in (JITFunction, InterpretedFunction):
                patches.enter_context(mock.patch.object(kind, "run", compiling(kind.run, share, of)))
            for workload in workloads:
                # Triton compiles anew where a size becomes 1 or a multiple of 16, in which 16 images agree with 32; the
                # device has room for no more than these in all processes.
                few = dataclasses.replace(workload, images=min(workload.images, SHARED_IMAGES))
                for plan in plans_for(workload):
                    trial, call = Trial(self.entries, few.dtype), self.call(few, 0, plan, True)
                    for key in self.missing(trial, call):
                        for setting in self.candidates(trial, key, few.dtype).values():
                            setting()
                            try:
                                trial.call(call)
                            except Exception as error:  # told when its turn comes to be measured
                                print(f"{key[0]}: {type(error).__name__}", file=sys.stderr)
                        trial.configs.pop(key, None)


def specialization(arguments: Sequence[Any], settings: Mapping[str, Any]) -> str:
    """What a launch's arguments say to the compiler: constants, and of a size whether it is 1 or a multiple of 16."""

    def of(value: Any) -> Any:
        if isinstance(value, Tensor):
            return str(value.dtype), value.data_ptr() % 16 == 0
        if hasattr(value, "block_shape"):
            return str(value.base.dtype), tuple(value.block_shape)
        if type(value) is int:
            return value == 1, value % 16 == 0, value >> 31 != 0
        return getattr(value, "__name__", value)

    return repr(
        ([of(value) for value in arguments], sorted((n, getattr(v, "__name__", v)) for n, v in settings.items()))
    )


def share_of(kernel: str, arguments: Sequence[Any], settings: Mapping[str, Any], of: int) -> int:
    """The process that compiles a launch's kernel; launches of one kernel have one."""
    return zlib.crc32(f"{kernel} {specialization(arguments, settings)}".encode()) % of


def compiling(run: Callable[..., Any], share: int, of: int) -> Callable[..., Any]:
    """A stand-in for a kernel's `run` that compiles the share's kernels, each once, and launches none."""
    seen = set[str]()

    def compile_(self: Any, *arguments: Any, grid: Any, warmup: bool, **settings: Any) -> Any:
        name = self.fn.__name__
        known = name + specialization(arguments, settings)
        if known in seen or share_of(name, arguments, settings, of) != share:
            return None
        seen.add(known)
        return run(self, *arguments, grid=grid, warmup=True, **settings)

    return compile_


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
    parser.add_argument("--kernels", default="", help="those to tune, separated by commas; all if empty")
    parser.add_argument("--most", type=int, default=16, help="configs tried per launch")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds per choice")
    parser.add_argument("--seconds", type=float, default=0.0, help=f"stop after that; exit {TIME_IS_UP} then")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="cpu: interpreted, to try the steps")
    parser.add_argument("--under-way", type=Path, help="a file that says what is being tried (bench/files.py)")
    parser.add_argument("--longest", type=float, default=LONGEST, help="seconds after which a trial counts as hung")
    parser.add_argument("--workers", type=int, default=8, help="processes that compile; 0 to compile here")
    parser.add_argument("--compile-share", help=argparse.SUPPRESS)
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench.tune: no CUDA device; a table is measured on the device it is for", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device()) if options.device == "cuda" else torch.device("cpu")
    workloads = list(dict.fromkeys(workload for suite in options.suite.split(",") for workload in SUITES[suite]))
    table = options.table or tuned.path_of(configs.device_of(device).name if device.type == "cuda" else device.type)
    paths = [table, *([options.out / table.name] if options.out else [])]
    deadline = time.monotonic() + options.seconds if options.seconds else float("inf")
    kernels = options.kernels.split(",") if options.kernels else configs.KERNELS
    if options.compile_share:
        share, of = map(int, options.compile_share.split("/"))
        Tuner(device, paths, kernels, options.most, options.rounds, deadline).compile_share(workloads, share, of)
        return 0
    tuner = Tuner(
        device, paths, kernels, options.most, options.rounds, deadline, UnderWay(options.under_way),
        options.longest,
    )  # fmt: skip
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
