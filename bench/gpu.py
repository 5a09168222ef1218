"""The one command for a GPU, in sections (`make gpu`): build, correctness, tuning, benchmarks, the model end to end.

A section runs for at most four minutes, writes as it goes, and goes on where it stopped when the command is given again
with the same folder. Nothing is timed before correctness is green. `--list` names the sections, `--only` picks some,
`--dry-run` prints their commands, `--seconds` begins none that might end later than that.

Runs under any Python that has torch, without the project being installed; without torch it hands over to `.venv`.
"""

import argparse
import csv
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 240  # seconds a section may take
MARGIN = 25  # seconds before its end at which a section begins nothing new
UNFINISHED = 75  # EX_TEMPFAIL, as bench.run says it
NO_GPU = 2
FIELDS = ("section", "status", "seconds", "limit", "commit", "device", "last_line")


# Most of the tests' time is the compilation of kernels; with pytest-xdist that is done eight at a time.
_PARALLEL = ("-n", "8") if importlib.util.find_spec("xdist") else ()


@dataclass(frozen=True)
class Section:
    """A command of this repository; `{out}` is the results' folder, `{seconds}` what the section may take."""

    name: str
    limit: int
    command: tuple[str, ...]
    gate: bool = False  # red ends the whole command
    what: str = ""
    fresh: bool = False  # with empty compilation caches
    always: bool = False  # also where it was done before: what it makes is not among the results
    needs: tuple[str, ...] = ()  # sections that must be done first: half a table would be timed as if it were whole


def _bench(name: str, suites: str, *arguments: str, what: str, needs: tuple[str, ...] = ()) -> Section:
    command = (
        "-m", "bench.run", "--device", "cuda", "--suite", suites, "--csv", "{out}/bench.csv", "--resume",
        "--seconds", "{seconds}", *arguments,
    )  # fmt: skip
    return Section(name, LONGEST, command, what=what, needs=needs)


def _correct(name: str, *arguments: str, what: str) -> Section:
    command = ("-m", "pytest", *arguments, "-m", "gpu", "-q", "-x", "-p", "no:cacheprovider", *_PARALLEL)
    return Section(f"correctness-{name}", LONGEST, command, gate=True, what=what)


def _tune(images: int) -> Section:
    command = ("-m", "bench.tune", "--suite", f"images-{images}", "--out", "{out}", "--seconds", "{seconds}")
    return Section(
        f"tune-{images}", LONGEST, command, what=f"configs and plans, {images} images a call, into the table"
    )


def _sanitize(tool: str) -> Section:
    return Section(
        tool, LONGEST, ("-m", "bench.sanitize", tool), what=f"compute-sanitizer's {tool} on the compiled kernels"
    )


_COMPILED = "tuned_eager,compile,compile_no_graphs,compile_tapped"
_BACKENDS = "tests/kernels/test_gpu.py"
SECTIONS = (
    Section(
        "build",
        LONGEST,
        ("-m", "bench.build_native"),
        what="csrc for this GPU, where nvcc and CUTLASS's headers (CUTLASS_PATH) are",
        always=True,
    ),
    _correct("matrix", _BACKENDS, "-k", "test_matrix", what="every backend over the case matrix, both directions"),
    _correct("plans", _BACKENDS, "-k", "not test_matrix", what="plans, layouts, frozen inputs, repeats"),
    _correct("native", "tests/kernels", f"--ignore={_BACKENDS}", what="all other tests marked gpu: compiled operators"),
    *(_sanitize(tool) for tool in ("memcheck", "racecheck", "initcheck")),
    _tune(8),
    _bench("bench-8", "images-8", what="8 images, hidden 1024, all but torch.compile", needs=("tune-8",)),
    _bench("compile-8", "images-8", "--variants", _COMPILED, what="8 images through torch.compile"),
    _tune(1),
    _bench("bench-1", "images-1", what="1 image", needs=("tune-1",)),
    _tune(32),
    _bench("bench-32", "images-32", what="32 images", needs=("tune-32",)),
    Section(
        "end-to-end",
        LONGEST,
        ("-m", "bench.e2e", "--device", "cuda", "--csv", "{out}/e2e.csv", "--resume", "--seconds", "{seconds}"),
        what="the vision tower's forward pass and a training step",
        needs=("tune-8", "tune-1"),
    ),
    _bench("crop-resize", "images-8", "--operation", "crop_resize", what="crop_resize alone", needs=("tune-8",)),
    _bench(
        "gemm",
        "images-8",
        "--operation",
        "gemm",
        what="fc1 and fc2 with epilogues against plain products",
        needs=("tune-8",),
    ),
    _bench("hidden-4096", "hidden-4096-images-8,hidden-4096-images-1", what="hidden 4096, 8 images and 1"),
    _bench("hidden-4096-32", "hidden-4096-images-32", what="hidden 4096, 32 images"),
    _bench(
        "narrow",
        "narrow",
        "--variants",
        "tuned_eager,tapped_eager,library,eager,triton,triton_single_pass,triton_sample_first,native",
        what="widths of 512: one fused launch against several",
    ),
    _bench("float32", "float32", what="float32, the widest and the largest map, against cuBLAS and eager"),
    _bench("also", "float16,widths,grids,no-prefix,one-tile,frozen", what="other dtypes, widths, grids; frozen"),
    Section(
        "first-call",
        LONGEST,
        (
            "-m",
            "bench.run",
            "--device",
            "cuda",
            "--suite",
            "images-8",
            "--csv",
            "{out}/first_call.csv",
            "--resume",
            "--seconds",
            "{seconds}",
            "--rounds",
            "3",
            "--variants",
            "tuned_eager,eager,triton,native,compile_no_graphs",
            "-k",
            "1536-stage1 or 768-stage4",
        ),
        what="first calls with empty compilation caches",
        fresh=True,
        needs=("tune-8",),
    ),
    _bench("compile-1", "images-1", "--variants", _COMPILED, what="1 image through torch.compile"),
    _bench("compile-32", "images-32", "--variants", _COMPILED, what="32 images through torch.compile"),
)
FILES = ("sections.csv", "log.txt", "bench.csv", "first_call.csv", "e2e.csv", "<device>.json (the tuned table)")


def seconds_left(section: Section, started: float, limit: float, now: Callable[[], float] = time.monotonic) -> float:
    """How long the section may take, given that the whole command may take `limit`; 0 if it would not be worth it."""
    left = limit - (now() - started) if limit else float(section.limit)
    return float(min(section.limit, left)) if left > 2 * MARGIN else 0.0


def filled(section: Section, out: Path, seconds: float) -> list[str]:
    """The command, with the folder and the time it has until it should stop by itself."""
    values = {"out": str(out), "seconds": str(int(seconds - MARGIN))}
    return [sys.executable, *(part.format(**values) for part in section.command)]


def run_section(section: Section, out: Path, seconds: float) -> tuple[str, str]:
    """Run to the end or the limit, output going to log.txt and the screen; the status and the output's last line."""
    command = filled(section, out, seconds)
    environment = os.environ | {"PYTHONPATH": _python_path(), "PYTHONUNBUFFERED": "1"}
    last = ""
    with (out / "log.txt").open("a") as log, tempfile.TemporaryDirectory() as caches:
        if section.fresh:
            environment |= {"TRITON_CACHE_DIR": f"{caches}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor"}
        log.write(f"\n== {section.name}: {' '.join(command[1:])}\n")
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        # A timer rather than a wait with a limit: output is read line by line all the while.
        previous = signal.signal(signal.SIGALRM, lambda *_: os.killpg(process.pid, signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                log.flush()
                print(f"  {line}", end="", flush=True)
                last = line.strip() or last
            status = process.wait()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
    if status == -signal.SIGKILL:
        return "unfinished", f"stopped after {seconds:.0f} s: {last}"
    return {0: "done", UNFINISHED: "unfinished", os.EX_UNAVAILABLE: "skipped"}.get(status, "failed"), last


def _python_path() -> str:
    return os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)


def read_states(out: Path) -> list[dict[str, str]]:
    path = out / "sections.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_state(out: Path, state: dict[str, object]) -> None:
    """Replace the section's line."""
    states = [s for s in read_states(out) if s["section"] != state["section"]]
    with (out / "sections.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*states, state])


def run_all(sections: Sequence[Section], out: Path, limit: float, commit: str, device: str, again: bool = False) -> int:
    """Every section not yet done for this commit and device; 0 if all are done, 75 if some are not, 1 if one failed."""
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    outcomes, unexercised = [], []
    here = ("done", commit, device)

    def named(section: Section, status: str, last: str) -> dict[str, object]:
        return {"section": section.name, "status": status, "commit": commit, "device": device, "last_line": last}

    for section in sections:
        done = {s["section"] for s in read_states(out) if (s["status"], s["commit"], s["device"]) == here}
        if section.name in done and not again and not section.always:
            print(f"{section.name}: done before")
            continue
        waits = [name for name in section.needs if name not in done]
        if waits:
            line = f"skipped: {', '.join(waits)} is not done"
            print(f"{section.name}: {line}")
            write_state(out, dict.fromkeys(FIELDS, "") | named(section, "unfinished", line))
            outcomes.append("unfinished")
            continue
        seconds = seconds_left(section, started, limit)
        if not seconds:
            print(f"{section.name}: no time left")
            if section.gate:
                return UNFINISHED
            outcomes.append("unfinished")
            continue
        print(f"{section.name}: at most {seconds:.0f} s", flush=True)
        begin = time.monotonic()
        status, last = run_section(section, out, seconds)
        taken = f"{time.monotonic() - begin:.0f}"
        write_state(out, named(section, status, last) | {"seconds": taken, "limit": f"{seconds:.0f}"})
        print(f"{section.name}: {status} after {taken} s", flush=True)
        outcomes.append(status)
        if status == "skipped":
            unexercised.append(last.removeprefix("skipped: "))
        if section.gate and status != "done":
            print(f"{section.name} is not green, so nothing is timed")
            return UNFINISHED if status == "unfinished" else 1
    if unexercised:
        print(f"cuda backend: not exercised ({'; '.join(dict.fromkeys(unexercised))})")
    return 1 if "failed" in outcomes else UNFINISHED if "unfinished" in outcomes else 0


def restore_table(out: Path, table: Path) -> None:
    """Put a table that an earlier run tuned back into the package, where planner and launchers look for it."""
    saved = out / table.name
    if saved.exists() and not table.exists():
        table.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(saved, table)


def listing(sections: Sequence[Section]) -> str:
    lines = [f"{section.name:<20}{section.limit:>4} s  {section.what}" for section in sections]
    return "\n".join([*lines, f"files: {', '.join(FILES)}"])


def chosen(names: str, parser: argparse.ArgumentParser) -> list[Section]:
    """The sections named, in the table's order; all if empty. What they need comes along unless it is done."""
    wanted = [name for name in names.split(",") if name]
    known = {section.name: section for section in SECTIONS}
    unknown = [name for name in wanted if name not in known]
    if unknown:
        parser.error(f"--only: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    wanted += [need for name in wanted for need in known[name].needs]
    return [section for section in SECTIONS if not wanted or section.gate or section.always or section.name in wanted]


def gpu_or_reason() -> tuple[str, str]:
    """The GPU's name and "", or "" and why there is none. A Python without torch hands over to the project's."""
    try:
        import torch
    except ImportError:
        other = ROOT / ".venv" / "bin" / "python"
        if other.exists() and Path(sys.executable).resolve() != other.resolve() and "FILA_GPU_HANDED" not in os.environ:
            os.environ["FILA_GPU_HANDED"] = "1"
            os.execv(other, [str(other), "-m", "bench.gpu", *sys.argv[1:]])
        return "", f"{sys.executable} has no torch, and there is no .venv (make setup)"
    if not torch.cuda.is_available():
        return "", f"torch {torch.__version__} sees no CUDA device"
    return torch.cuda.get_device_name(), ""


def main(arguments: list[str] | None = None) -> int:
    """Run the sections; exit 2 without a GPU, 1 where one failed, 75 where there was no time for all."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "gpu", help="folder of results, at most eight files"
    )
    parser.add_argument("--only", default="", help="sections, separated by commas; what they need comes before them")
    parser.add_argument("--seconds", type=float, default=0.0, help="begin no section that might end later")
    parser.add_argument("--again", action="store_true", help="also sections that are done")
    parser.add_argument("--list", action="store_true", dest="only_list", help="name the sections and their limits")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    options = parser.parse_args(arguments)
    sections = chosen(options.only, parser)
    if options.only_list:
        print(listing(sections))
        return 0
    out = options.out.resolve()
    if options.dry_run:
        for section in sections:
            print(f"{section.name}: {' '.join(filled(section, out, section.limit))}")
        return 0
    device, reason = gpu_or_reason()
    if not device:
        print(f"make gpu: {reason}; nothing was run", file=sys.stderr)
        return NO_GPU
    from bench.records import commit
    from fila_kernels import tuned

    restore_table(out, tuned.path_of(device))
    return run_all(sections, out, options.seconds, commit(), device, options.again)


if __name__ == "__main__":
    sys.exit(main())
