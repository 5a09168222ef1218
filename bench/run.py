"""Run the benchmarks and print their ratios: `python -m bench.run` (or `make bench`).

On a CPU that is the suite "cpu" (a quiet machine, or `--busy`), on a GPU "images-8"; `--suite` names others of
bench/cases.py, separated by commas. `--print` prints what a CSV holds and runs nothing.
"""

import argparse
import dataclasses
import math
import sys
import time
from pathlib import Path

from bench import records
from bench.cases import SUITES
from bench.memory import METERS
from bench.settings import CLOCKS, Settings
from bench.variants import REGISTRY, select

FOLDER = Path(__file__).resolve().parent
FILES = {
    "cvfm": ("bench_cvfm.py", "tuned_eager"),
    "crop_resize": ("bench_crop_resize.py", "sliced"),
    "gemm": ("bench_gemm.py", "cublas"),
}
TIME_IS_UP = 75  # EX_TEMPFAIL: run again to go on
Row = dict[str, str]


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def floor_ms(row: Row) -> float | None:
    """The least time on the measured roof, or None where the row has no roof."""
    if not row["roof_flops"]:
        return None
    return 1e3 * max(
        float(row["floor_flops"]) / float(row["roof_flops"]), float(row["floor_bytes"]) / float(row["roof_bytes"])
    )


def by_case(rows: list[Row], operation: str, direction: str) -> dict[str, dict[str, Row]]:
    """{case: {variant: its last row}}."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if (row["operation"], row["direction"]) == (operation, direction):
            found.setdefault(row["case"], {})[row["variant"]] = row
    return found


def table(rows: list[Row]) -> str:
    """For each operation and direction the baseline's time, and every other variant's speed-up over it.

    Behind an own backend's speed-up stand its share of the baseline's extra memory and the floor's share of its time.
    """
    lines = []
    for operation, direction in dict.fromkeys((row["operation"], row["direction"]) for row in rows):
        cases = by_case(rows, operation, direction)
        base = FILES.get(operation, ("", "fusion_tuned_eager"))[1]
        names = list(dict.fromkeys(v for variants in cases.values() for v, row in variants.items() if row["p50_ms"]))
        names = [name for name in names if name != base]
        width = max(map(len, cases)) + 2
        lines.append(f"{operation}, {direction}\n  {'case':<{width}}{base + ' ms':>20}" + _head(names))
        ratios: dict[str, list[float]] = {}
        for case, variants in cases.items():
            start = variants.get(base)
            if start is None or not start["p50_ms"]:
                lines.append(f"  {case:<{width}}{'not timed':>20}")
                continue
            line = f"  {case:<{width}}{float(start['p50_ms']):>20.3f}"
            for name in names:
                text = _cell(start, variants.get(name))
                line += f"{text:>{_column(name)}}"
                if name in variants and variants[name]["p50_ms"]:
                    ratios.setdefault(name, []).append(float(start["p50_ms"]) / float(variants[name]["p50_ms"]))
            lines.append(line)
        means = [f"{geometric_mean(ratios[n]):.2f}x" if n in ratios else "" for n in names]
        columns = "".join(f"{m:>{_column(n)}}" for m, n in zip(means, names, strict=True))
        lines.append(f"  {'geometric mean':<{width}}{'':>20}{columns}\n")
    for row in rows:
        if row["note"]:
            what = "note" if row["p50_ms"] else "not timed"
            lines.append(f"{what}: {row['case']}, {row['direction']}, {row['variant']}: {row['note']}")
    first = rows[0]
    clock = f"{first['threads']} threads ({first['clock']} clock)" if first["clock"] in CLOCKS else "CUDA events"
    lines.append(f"{first['device']}, {clock}, torch {first['torch']}, commit {first['commit']}")
    meter = METERS["cpu" if first["clock"] in CLOCKS else "cuda"]
    lines.append(f"speed-up of medians; m: share of the baseline's extra memory ({meter})")
    if any(row["roof_flops"] for row in rows):
        lines.append("f: share of the time that the floor on the measured roof would take")
    return "\n".join(lines)


def _column(name: str) -> int:
    return max(len(name), 18) + 2


def _head(names: list[str]) -> str:
    return "".join(f"{name:>{_column(name)}}" for name in names)


def _cell(base: Row, row: Row | None) -> str:
    if row is None or not row["p50_ms"]:
        return "-"
    text = f"{float(base['p50_ms']) / float(row['p50_ms']):.2f}x"
    if row["extra_memory_bytes"] and float(base["extra_memory_bytes"] or 0):
        text += f" m{float(row['extra_memory_bytes']) / float(base['extra_memory_bytes']):.2f}"
    floor = floor_ms(row)
    return text if floor is None else f"{text} f{floor / float(row['p50_ms']):.2f}"


def describe(settings: Settings) -> str:
    """What this run measures, and who is missing."""
    device = settings.torch_device()
    names = [name for name in settings.variants.split(",") if name]
    variants, missing = select(device, names)
    cases = sum(len(SUITES[suite]) for suite in settings.suites())
    lines = [
        f"{records.device_name(device)}: {cases} cases of {', '.join(settings.suites())}, {settings.rounds} rounds, "
        f"into {settings.output()}",
        f"variants: {', '.join(variant.name for variant in variants)}",
    ]
    lines += [f"without {name}: {reason}" for name, reason in missing.items()]
    if device.type == "cpu" and not names:
        lines.append("without a GPU's baselines and compile: --variants names them")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run pytest on the benchmarks, then print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument("--print", action="store_true", dest="only_print", help="print the CSV, run nothing")
    parser.add_argument("--csv", type=Path, help="file to write or print; bench/results/cvfm_DEVICE.csv if not given")
    parser.add_argument("--suite", default="", help=f"some of {', '.join(SUITES)}, separated by commas")
    parser.add_argument("--operation", choices=FILES, default="cvfm")
    parser.add_argument("--variants", default="", help=f"some of {', '.join(REGISTRY)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="", help="a GPU where there is one, if not given")
    parser.add_argument("--rounds", type=int, default=11, help="interleaved rounds a case")
    parser.add_argument("--busy", action="store_true", help="one thread on its own processor time: for a busy machine")
    parser.add_argument("--resume", action="store_true", help="add to the CSV what it lacks, instead of beginning anew")
    parser.add_argument("--seconds", type=float, default=0.0, help=f"begin no case after that; exit {TIME_IS_UP} then")
    parser.add_argument("-k", dest="select", default="", help="pytest's -k: which cases to run")
    options = parser.parse_args(arguments)
    settings = Settings(
        csv=str(options.csv or ""), suite=options.suite, device=options.device, variants=options.variants,
        rounds=options.rounds, clock="thread" if options.busy else "wall", resume=int(options.resume),
        deadline=time.time() + options.seconds if options.seconds else 0.0,
    )  # fmt: skip
    unknown = [suite for suite in settings.suites() if suite not in SUITES]
    if unknown:
        parser.error(f"--suite: expected some of {', '.join(SUITES)}, got {', '.join(unknown)}")
    output = settings.output()
    if not options.only_print:
        print(describe(settings), flush=True)
        status = run(settings, options.operation, options.select)
        if status != 0:
            # A red gate prints no ratio.
            return status
    rows = records.read(output)
    if not rows:
        print(f"{output} holds nothing")
        return 1
    print(table(rows))
    if settings.time_is_up():
        print(f"time is up after {options.seconds:.0f} s; run again with --resume to go on")
        return TIME_IS_UP
    return 0


def run(settings: Settings, operation: str, select_cases: str = "") -> int:
    """pytest's exit status. A run that does not resume writes its own file, which at the end replaces the old one."""
    import pytest

    output = settings.output()
    partial = output if settings.resume else output.with_suffix(".partial.csv")
    if not settings.resume:
        partial.unlink(missing_ok=True)
    dataclasses.replace(settings, csv=str(partial)).write()
    command = [str(FOLDER / FILES[operation][0]), "--benchmark-enable", "--benchmark-disable-gc", "-q"]
    status = pytest.main([*command, "-p", "no:cacheprovider", *(["-k", select_cases] if select_cases else [])])
    if status == 0 and partial != output and partial.exists():
        partial.replace(output)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
