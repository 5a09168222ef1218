"""Run the benchmarks and print their ratios: `python -m bench.run` (or `make bench`).

Needs a quiet machine, or `--busy`. `--print` prints what the committed CSV holds and runs nothing.
"""

import argparse
import math
import os
import sys
from pathlib import Path

from bench import records
from bench.memory import METER

FOLDER = Path(__file__).resolve().parent


def table(rows: list[dict[str, str]]) -> str:
    """Ratios of tuned eager to the torch backend, by case and direction, and their geometric means."""
    found: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    for row in rows:
        found.setdefault((row["direction"], row["case"]), {})[row["variant"]] = row
    lines = []
    for direction in dict.fromkeys(key[0] for key in found):
        lines.append(f"{direction}\n  {'case':<26}{'eager ms':>10}{'torch ms':>10}{'ratio':>8}{'memory':>9}")
        ratios = []
        for (which, case), variants in found.items():
            if which != direction or len(variants) != 2:
                continue
            eager, ours = variants["tuned_eager"], variants["torch"]
            ratio = float(eager["p50_ms"]) / float(ours["p50_ms"])
            memory = float(ours["extra_memory_bytes"]) / max(1.0, float(eager["extra_memory_bytes"]))
            ratios.append(ratio)
            lines.append(
                f"  {case:<26}{float(eager['p50_ms']):>10.1f}{float(ours['p50_ms']):>10.1f}{ratio:>8.2f}{memory:>9.2f}"
            )
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        lines.append(f"  {'geometric mean':<46}{mean:>8.2f}\n")
    first = rows[0]
    threads = f"{first['threads']} threads ({first['clock']} clock)"
    lines.append(f"{first['device']}, {threads}, torch {first['torch']}, commit {first['commit']}")
    lines.append(f"ratio: tuned eager / torch backend, medians; memory: torch backend / tuned eager ({METER})")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run pytest on the benchmarks with a fresh CSV, then print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    parser.add_argument("--print", action="store_true", dest="only_print", help="print the CSV, run nothing")
    parser.add_argument("--csv", type=Path, default=records.RESULTS / "cvfm_cpu.csv", help="file to write or print")
    parser.add_argument("--rounds", type=int, default=11, help="interleaved rounds a case")
    parser.add_argument("--busy", action="store_true", help="one thread on its own processor time: for a busy machine")
    parser.add_argument("-k", dest="select", default="", help="pytest's -k: which cases to run")
    options = parser.parse_args(arguments)
    if not options.only_print:
        import pytest

        partial = options.csv.with_suffix(".partial.csv")
        partial.unlink(missing_ok=True)
        os.environ |= {"FILA_BENCH_CSV": str(partial), "FILA_BENCH_ROUNDS": str(options.rounds)}
        os.environ["FILA_BENCH_CLOCK"] = "thread" if options.busy else "wall"
        command = [str(FOLDER / "bench_cvfm.py"), "--benchmark-enable", "--benchmark-disable-gc", "-q"]
        status = pytest.main([*command, *(["-k", options.select] if options.select else [])])
        if status != 0:
            # A red gate prints no ratio.
            return int(status)
        partial.replace(options.csv)
    print(table(records.read(options.csv)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
