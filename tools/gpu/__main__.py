"""The one command for a GPU: `make gpu`, or `python -m tools.gpu` with any Python that has torch.

A call takes at most nine minutes. It runs the next run that has not ended, a, b, c, then the rest, and goes on with the
same results folder where another call stopped, on another machine too. A section that is red, crashes or hangs costs
the others nothing. `--list` names the sections; `--rehearse` runs all of it small on a CPU.
"""

import argparse
import os
import sys
from pathlib import Path

from tools.gpu import runner
from tools.gpu.sections import FILES, RUNS, SECTIONS, Section

ROOT = Path(__file__).resolve().parents[2]
NO_GPU = 2
SECONDS = 540.0


def chosen(names: str, run: str, parser: argparse.ArgumentParser) -> list[Section]:
    """The sections named, or those of one run, in the table's order, with what every call needs; all if empty."""
    wanted = [name for name in names.split(",") if name]
    known = [section.name for section in SECTIONS]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        parser.error(f"--only: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    wanted += [section.name for section in SECTIONS if run and section.run == run]
    return [section for section in SECTIONS if not wanted or section.always or section.name in wanted]


def gpu_or_reason() -> tuple[str, str]:
    """The GPU's name and "", or "" and why there is none. A Python without torch hands over to the project's."""
    try:
        import torch
    except ImportError:
        other = ROOT / ".venv" / "bin" / "python"
        if other.exists() and Path(sys.executable).resolve() != other.resolve() and "FILA_GPU_HANDED" not in os.environ:
            os.environ["FILA_GPU_HANDED"] = "1"
            os.execv(other, [str(other), "-m", "tools.gpu", *sys.argv[1:]])
        return "", f"{sys.executable} has no torch, and there is no .venv (make setup)"
    if not torch.cuda.is_available():
        return "", f"torch {torch.__version__} sees no CUDA device"
    return torch.cuda.get_device_name(), ""


def main(arguments: list[str] | None = None) -> int:
    """Run sections; exit 2 without a GPU, 1 where one failed, 75 where there was no time for all."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="folder of results")
    parser.add_argument(
        "--run", choices=RUNS, default="", help="; ".join(f"{run}: {what}" for run, what in RUNS.items())
    )
    parser.add_argument("--only", default="", help="sections, separated by commas")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="end after that; 0 for no limit")
    parser.add_argument("--again", action="store_true", help="also sections that have ended")
    parser.add_argument("--list", action="store_true", dest="only_list", help="name the sections and their limits")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    parser.add_argument(
        "--small", type=float, default=0.0, help="what the rehearsal runs; how slow the CPU is, 1 or more"
    )
    parser.add_argument("--rehearse", action="store_true", help="all runs small on a CPU, killed at random moments")
    parser.add_argument(
        "--short", action="store_true", help="with --rehearse: run a alone, by this Python, fewer kills"
    )
    parser.add_argument("--seed", type=int, default=0, help="with --rehearse: of the moments")
    options = parser.parse_args(arguments)
    sections, out = chosen(options.only, options.run, parser), options.out.resolve()
    if options.only_list:
        for run, what in RUNS.items():
            print(f"run {run}: {what}")
            print("\n".join(f"  {s.name:<18}{s.limit:>4} s  {s.what}" for s in sections if s.run == run))
        print("files: " + "; ".join(f"{name}, {what}" for name, what in FILES.items()))
        return 0
    if options.dry_run:
        for section in sections:
            print(f"{section.name}: {' '.join(section.filled(out, Path('SCRATCH'), section.limit, options.small))}")
        return 0
    if options.rehearse:
        from tools.gpu import rehearsal

        return rehearsal.main(out.parent / "rehearsal", options.seed, options.short)
    device, reason = ("cpu", "") if options.small else gpu_or_reason()
    if not device:
        print(f"make gpu: {reason}; nothing was run", file=sys.stderr)
        return NO_GPU
    from bench.records import commit
    from fila_kernels import tuned

    runner.restore_table(out, tuned.path_of(device))
    runner.unpack_cache(out / "triton-cache.zip", runner.triton_cache())
    results = runner.Results(out, commit(), device)
    status = runner.Runner(results, options.small).run_all(sections, options.seconds, options.again)
    report(results)
    return status


def report(results: runner.Results) -> None:
    """Print how far the sections came, and what the rows say about the goals."""
    from bench import goals, records

    for name, state in results.states().items():
        print(f"{name:<18}{state['status']:<12}{state['seconds']:>4} s  {state['last_line']}")
    rows = records.read(results.folder / "bench.csv")
    if rows:
        print("\n".join(" | ".join(line) for line in goals.lines(rows)))


if __name__ == "__main__":
    sys.exit(main())
