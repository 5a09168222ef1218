"""Compares this package with its baselines in interleaved rounds and prints the ratios: `python -m bench.run`.

On a CPU that is the suite "cpu" (on a quiet machine, or with `--busy`), on a GPU "images-8"; `--suite` names others,
separated by commas. The base of the ratios takes part in every interleaving. Rows are written as they come. A variant
that is wrong or fails is not timed, the others are, and the exit status is 1.
"""

import argparse
import importlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench import engine, records
from bench.files import LONGEST, TIME_IS_UP, UnderWay
from bench.report import BASES, table
from bench.variants import backend_of
from fila_kernels import tuned

# Each has SUITES, default_suite, DIRECTIONS, variants and comparison; the tower's imports transformers.
OPERATIONS = {"cvfm": "bench_cvfm", "crop_resize": "bench_crop_resize", "gemm": "bench_gemm", "tower": "tower"}
FAULTS = ("red: ", "failed: ", "hung: ", "ended: ")  # how a note begins that says more than that something is lacking


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument("--operation", choices=OPERATIONS, default="cvfm")
    parser.add_argument("--suite", default="", help="workloads, see bench/workloads.py and, for the tower, tower.py")
    parser.add_argument("--only", default="", help="parts of names, separated by commas: which workloads of the suite")
    parser.add_argument(
        "--variants", default="", help="who takes part, see docs/benchmarks.md; the usual ones if empty"
    )
    parser.add_argument("--directions", default="", help="some of the operation's directions; all if empty")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="a GPU where there is one, if not given")
    parser.add_argument("--rounds", type=int, default=11, help="interleaved rounds per workload")
    parser.add_argument("--busy", action="store_true", help="one thread on its own processor time: for a busy machine")
    parser.add_argument("--csv", type=Path, help="bench/results/OPERATION_DEVICE.csv if not given")
    parser.add_argument("--resume", action="store_true", help="add to the CSV what it lacks, instead of beginning anew")
    parser.add_argument("--seconds", type=float, default=0.0, help=f"begin nothing after that; exit {TIME_IS_UP} then")
    parser.add_argument("--untuned", action="store_true", help="as on a device without a tuned table")
    parser.add_argument("--tests", type=Path, help="results of tools/gpu/gate.py: what is red there is not timed here")
    parser.add_argument("--under-way", type=Path, help="a file that says which variant is running (bench/files.py)")
    parser.add_argument("--longest", type=float, default=LONGEST, help="seconds after which a variant counts as hung")
    options = parser.parse_args(arguments)
    options.device = torch.device(options.device) if options.device else engine.default_device()
    options.csv = options.csv or records.RESULTS / f"{options.operation}_{records.slug(options.device)}.csv"
    options.module = importlib.import_module(f"bench.{OPERATIONS[options.operation]}")
    options.suite = options.suite or options.module.default_suite(options.device)
    unknown = [suite for suite in options.suite.split(",") if suite not in options.module.SUITES]
    if unknown:
        parser.error(f"--suite: expected some of {', '.join(options.module.SUITES)}, got {', '.join(unknown)}")
    options.variants = [name for name in options.variants.split(",") if name]
    if options.variants and BASES[options.operation] not in options.variants:
        options.variants.insert(0, BASES[options.operation])
    options.directions = [name for name in options.directions.split(",") if name] or list(options.module.DIRECTIONS)
    unknown = [name for name in options.directions if name not in options.module.DIRECTIONS]
    if unknown:
        parser.error(f"--directions: expected some of {', '.join(options.module.DIRECTIONS)}, got {', '.join(unknown)}")
    unknown = [name for name in options.variants if name not in known_variants(options)]
    if unknown:
        parser.error(f"--variants: {', '.join(unknown)}: not in {options.operation}, see docs/benchmarks.md")
    return options


def known_variants(options: argparse.Namespace) -> dict[str, str | None]:
    """The requested or default variants of all directions, each with the reason it cannot run, or None."""
    found = (options.module.variants(options.device, direction, options.variants) for direction in options.directions)
    return {name: obstacle for variants in found for name, obstacle in variants.items()}


def questions(options: argparse.Namespace) -> Iterator[tuple[Any, str]]:
    """The workloads that were asked for, each in every direction that was."""
    parts = options.only.split(",")
    found = (workload for suite in options.suite.split(",") for workload in options.module.SUITES[suite])
    for workload in dict.fromkeys(found):
        if any(part in workload.name for part in parts):
            yield from ((workload, direction) for direction in options.directions)


@contextmanager
def untuned() -> Iterator[None]:
    """Let planner and launchers do as on a device that has no table."""
    tuned.load.cache_clear()
    with mock.patch.object(tuned, "FOLDER", Path(os.devnull)):
        yield
    tuned.load.cache_clear()


class Bench:
    """One call of the command: what it measures, into which file, and what went wrong."""

    def __init__(self, options: argparse.Namespace, path: Path) -> None:
        self.options, self.path, self.device = options, path, options.device
        self.clock = "thread" if options.busy else "wall"
        self.under_way = UnderWay(options.under_way)
        self.here = records.environment(self.device) | {"operation": options.operation}

    def measure(self) -> bool:
        """Measure what the file lacks, writing as it goes; False where time was up first."""
        options, module = self.options, self.options.module
        deadline = time.monotonic() + options.seconds if options.seconds else float("inf")
        blamed = self.under_way.blamed()
        if blamed is not None:
            records.append(self.path, [blamed[0] | {"note": blamed[1]}])
        reds = records.red_backends(options.tests, self.here) if options.tests else {}
        for workload, direction in questions(options):
            question = self.here | {"workload": workload.name, "direction": direction}
            names = [
                name for name, no in module.variants(self.device, direction, options.variants).items() if no is None
            ]
            names = records.missing(records.read(self.path), question, names)
            if not names:
                continue
            if time.monotonic() > deadline:
                return False
            red = {name: reds[found] for name in names if (found := (backend_of(name), workload.dtype)) in reds}
            self.compare(workload, question, names, red)
        return True

    def compare(self, workload: Any, question: dict[str, str], names: list[str], red: dict[str, str]) -> None:
        """One interleaving of all but the red ones, each of which has a row that says why."""

        where = f"{question['workload']}, {question['direction']}"

        def watch(name: str) -> None:
            row = question | {"variant": name, "clock": "events" if self.device.type == "cuda" else self.clock}
            self.under_way.begin(f"{where}, {name}", row, self.options.longest)

        timed = [name for name in names if name not in red]
        comparison = self.options.module.comparison(workload, question["direction"], self.device, timed)
        results = engine.compare(comparison, self.device, self.options.rounds, self.clock, watch)
        results |= {name: engine.Result(note=note) for name, note in red.items()}
        records.append(self.path, records.rows_of(comparison, results, self.device, self.clock))
        self.under_way.end()
        print(f"{where}: {len(names)} variants", flush=True)

    def failures(self) -> list[str]:
        """What of this package was wrong, failed or ended a process, in this call or one before it."""
        asked = {(workload.name, direction) for workload, direction in questions(self.options)}
        return [
            f"{row['workload']}, {row['direction']}, {row['variant']}: {row['note']}"
            for row in records.read(self.path)
            if (row["workload"], row["direction"]) in asked
            and all(row[name] == value for name, value in self.here.items())
            and row["note"].startswith(FAULTS) and backend_of(row["variant"])
        ]  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Measure, then print the table; exit 1 where a variant of this package was wrong or failed."""
    options = parse(arguments)
    path = options.csv
    print(f"{records.device_name(options.device)}: {options.operation} over {options.suite}, into {path}", flush=True)
    for name, obstacle in known_variants(options).items():
        print(f"without {name}: {obstacle}" if obstacle else f"with {name}", flush=True)
    if options.busy:
        torch.set_num_threads(1)
    # A run that does not resume replaces the old file when it has ended.
    partial = path if options.resume else path.with_suffix(".partial.csv")
    if not options.resume:
        partial.unlink(missing_ok=True)
    with untuned() if options.untuned else nullcontext():
        bench = Bench(options, partial)
        finished = bench.measure()
        failures = bench.failures()
    if partial != path and partial.exists():
        partial.replace(path)
    rows = records.read(path)
    print(table(rows) if rows else "nothing was measured")
    for failure in failures:
        print(f"not timed: {failure}")
    if not finished:
        print(f"time is up after {options.seconds:.0f} s; run again with --resume to go on")
        return TIME_IS_UP
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
