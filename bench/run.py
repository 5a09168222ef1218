"""Compares this package with its baselines in interleaved rounds and prints the ratios: `python -m bench.run`.

On a CPU that is the suite "cpu" (on a quiet machine, or with `--busy`), on a GPU "images-8"; `--suite` names others,
separated by commas. Rows are written as they come; no ratio is printed if a variant of this package is red.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bench import bench_crop_resize, bench_cvfm, bench_gemm, engine, records, tower
from bench.report import table

# Each has SUITES, default_suite, DIRECTIONS, variants and comparison.
OPERATIONS = {"cvfm": bench_cvfm, "crop_resize": bench_crop_resize, "gemm": bench_gemm, "tower": tower}
TIME_IS_UP = 75  # EX_TEMPFAIL: run again to go on


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument("--operation", choices=OPERATIONS, default="cvfm")
    parser.add_argument("--suite", default="", help="workloads, see bench/workloads.py and, for the tower, tower.py")
    parser.add_argument("--only", default="", help="parts of names, separated by commas: which workloads of the suite")
    parser.add_argument(
        "--variants", default="", help="who takes part, see docs/benchmarks.md; the usual ones if empty"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="a GPU where there is one, if not given")
    parser.add_argument("--rounds", type=int, default=11, help="interleaved rounds per workload")
    parser.add_argument("--busy", action="store_true", help="one thread on its own processor time: for a busy machine")
    parser.add_argument("--csv", type=Path, help="bench/results/OPERATION_DEVICE.csv if not given")
    parser.add_argument("--resume", action="store_true", help="add to the CSV what it lacks, instead of beginning anew")
    parser.add_argument("--seconds", type=float, default=0.0, help=f"begin nothing after that; exit {TIME_IS_UP} then")
    options = parser.parse_args(arguments)
    options.device = torch.device(options.device) if options.device else engine.default_device()
    options.csv = options.csv or records.RESULTS / f"{options.operation}_{records.slug(options.device)}.csv"
    options.module = OPERATIONS[options.operation]
    options.suite = options.suite or options.module.default_suite(options.device)
    unknown = [suite for suite in options.suite.split(",") if suite not in options.module.SUITES]
    if unknown:
        parser.error(f"--suite: expected some of {', '.join(options.module.SUITES)}, got {', '.join(unknown)}")
    options.variants = [name for name in options.variants.split(",") if name]
    unknown = [name for name in options.variants if name not in known_variants(options)]
    if unknown:
        parser.error(f"--variants: {', '.join(unknown)}: not in {options.operation}, see docs/benchmarks.md")
    return options


def known_variants(options: argparse.Namespace) -> dict[str, str | None]:
    """The requested or default variants of all directions, each with the reason it cannot run, or None."""
    module = options.module
    found = (module.variants(options.device, direction, options.variants) for direction in module.DIRECTIONS)
    return {name: obstacle for variants in found for name, obstacle in variants.items()}


def questions(module: ModuleType, options: argparse.Namespace) -> Iterator[tuple[Any, str]]:
    """The workloads that were asked for, each in every direction."""
    parts = options.only.split(",")
    found = (workload for suite in options.suite.split(",") for workload in module.SUITES[suite])
    for workload in dict.fromkeys(found):
        if any(part in workload.name for part in parts):
            yield from ((workload, direction) for direction in module.DIRECTIONS)


def measure(options: argparse.Namespace, path: Path) -> bool:
    """Measure what `path` lacks, writing as it goes; False where time was up first.

    Raises:
        engine.Red: a variant of this package differs from the definition.
    """
    module, device = options.module, options.device
    deadline = time.monotonic() + options.seconds if options.seconds else float("inf")
    clock = "thread" if options.busy else "wall"
    if options.busy:
        torch.set_num_threads(1)
    here = records.environment(device) | {"operation": options.operation}
    done = {records.key(row) for row in records.read(path)}
    for workload, direction in questions(module, options):
        asked = here | {"workload": workload.name, "direction": direction}
        names = [
            name for name, obstacle in module.variants(device, direction, options.variants).items()
            if obstacle is None and records.key(asked | {"variant": name}) not in done
        ]  # fmt: skip
        if not names:
            continue
        if time.monotonic() > deadline:
            return False
        comparison = module.comparison(workload, direction, device, names)
        results = engine.compare(comparison, device, options.rounds, clock)
        records.append(path, records.rows_of(comparison, results, device, clock))
        print(f"{workload.name}, {direction}: {len(names)} variants", flush=True)
    return True


def main(arguments: list[str] | None = None) -> int:
    """Measure, then print the table; exit 1 without it where a variant of this package is red."""
    options = parse(arguments)
    path = options.csv
    print(f"{records.device_name(options.device)}: {options.operation} over {options.suite}, into {path}", flush=True)
    for name, obstacle in known_variants(options).items():
        print(f"without {name}: {obstacle}" if obstacle else f"with {name}", flush=True)
    # A run that does not resume replaces the old file when it has ended.
    partial = path if options.resume else path.with_suffix(".partial.csv")
    if not options.resume:
        partial.unlink(missing_ok=True)
    try:
        finished = measure(options, partial)
    except engine.Red as red:
        print(red)
        return 1
    if partial != path and partial.exists():
        partial.replace(path)
    rows = records.read(path)
    print(table(rows) if rows else "nothing was measured")
    if not finished:
        print(f"time is up after {options.seconds:.0f} s; run again with --resume to go on")
        return TIME_IS_UP
    return 0


if __name__ == "__main__":
    sys.exit(main())
