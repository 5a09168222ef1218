"""The one command for a GPU, in sections (`make gpu`): build, correctness, tuning, benchmarks, the vision tower.

A section takes at most four minutes and writes as it goes; with the same folder a later call goes on where it stopped.
Nothing is timed before correctness is green. `--list` names the sections, `--only` picks some, `--dry-run` prints their
commands, and `--seconds` begins no section that might end later than that.

Any Python with torch runs it, without an installation of this project; one without torch hands over to `.venv`.
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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 240  # seconds per section
MARGIN = 25  # seconds before a section's end after which it begins nothing new
UNFINISHED = 75  # EX_TEMPFAIL, as bench.run has it
NO_GPU = 2
FIELDS = ("section", "status", "seconds", "limit", "commit", "device", "last_line")
FILES = ("sections.csv", "log.txt", "bench.csv", "first_call.csv", "<device>.json (the tuned table)")


@dataclass(frozen=True)
class Section:
    """A command of this repository; `{out}` is the folder of results, `{seconds}` what the section may take."""

    name: str
    command: tuple[str, ...]
    what: str
    limit: int = LONGEST
    gate: bool = False  # red ends the whole command
    fresh: bool = False  # with empty compilation caches
    always: bool = False  # also where it was done before, since what it makes is not among the results
    needs: tuple[str, ...] = ()  # sections that must be done first: a benchmark reads the whole tuned table


def _bench(
    name: str, suites: str, what: str, *arguments: str, tuned: str = "", csv: str = "bench", fresh: bool = False
):
    command = f"-m bench.run --device cuda --suite {suites} --csv {{out}}/{csv}.csv --resume --seconds {{seconds}}"
    return Section(
        name, (*command.split(), *arguments), what, fresh=fresh, needs=tuple(f"tune-{n}" for n in tuned.split())
    )


def _correct(name: str, what: str, *arguments: str) -> Section:
    # Most of the time is the compilation of kernels; pytest-xdist does it eight at a time.
    parallel = ("-n", "8") if importlib.util.find_spec("xdist") else ()
    command = ("-m", "pytest", *arguments, "-m", "gpu", "-q", "-x", "-p", "no:cacheprovider", *parallel)
    return Section(f"correctness-{name}", command, what, gate=True)


def _tune(images: int) -> Section:
    command = ("-m", "bench.tune", "--suite", f"images-{images}", "--out", "{out}", "--seconds", "{seconds}")
    return Section(f"tune-{images}", command, f"configs and plans for {images} images per call, into the table")


def _check(tool: str) -> Section:
    command = ("-m", "tools.compute_sanitizer", tool)
    return Section(tool, command, f"compute-sanitizer's {tool} on the compiled kernels")


_COMPILE = ("--variants", "tuned_eager,compile,compile_no_graphs,compile_tapped")
_NARROW = "tuned_eager,tapped_eager,library,eager,native,triton,triton_single_pass,triton_sample_first"
_MATRIX = "tests/kernels/test_gpu.py"
SECTIONS = (
    Section(
        "build", ("-m", "tools.build_cuda"), "csrc for this GPU, where nvcc and CUTLASS's headers (CUTLASS_PATH) are",
        always=True,
    ),
    _correct("matrix", "every backend over the case matrix, both directions", _MATRIX, "-k", "test_matrix"),
    _correct("plans", "plans, layouts, frozen inputs, repeats", _MATRIX, "-k", "not test_matrix"),
    _correct("native", "all other tests marked gpu: compiled operators", "tests/kernels", f"--ignore={_MATRIX}"),
    *(_check(tool) for tool in ("memcheck", "racecheck", "initcheck")),
    _tune(8),
    _bench("bench-8", "images-8", "8 images, hidden 1024, all but torch.compile", tuned="8"),
    _bench("compile-8", "images-8", "8 images through torch.compile", *_COMPILE),
    _tune(1),
    _bench("bench-1", "images-1", "1 image", tuned="1"),
    _tune(32),
    _bench("bench-32", "images-32", "32 images", tuned="32"),
    _bench(
        "tower", "fila-llama3-8b", "the vision tower's forward pass and a training step", "--operation", "tower",
        tuned="8 1",
    ),
    _bench("crop-resize", "images-8", "crop_resize alone", "--operation", "crop_resize", tuned="8"),
    _bench("gemm", "images-8", "fc1 and fc2 with epilogues against plain products", "--operation", "gemm", tuned="8"),
    _bench("hidden-4096", "hidden-4096-images-8,hidden-4096-images-1", "hidden 4096, 8 images and 1"),
    _bench("hidden-4096-32", "hidden-4096-images-32", "hidden 4096, 32 images"),
    _bench("narrow", "narrow", "widths of 512: one fused launch against several", "--variants", _NARROW),
    _bench("float32", "float32", "float32, the widest and the largest map, against cuBLAS and eager"),
    _bench("also", "float16,widths,grids,no-prefix,one-tile,frozen", "other dtypes, widths, grids; frozen features"),
    _bench(
        "first-call", "images-8", "first calls with empty compilation caches", "--rounds", "3", "--only",
        "1536-stage1,768-stage4", "--variants", "tuned_eager,eager,native,triton,compile_no_graphs", tuned="8",
        csv="first_call", fresh=True,
    ),
    _bench("compile-1", "images-1", "1 image through torch.compile", *_COMPILE),
    _bench("compile-32", "images-32", "32 images through torch.compile", *_COMPILE),
)  # fmt: skip


def filled(section: Section, out: Path, seconds: float) -> list[str]:
    """The command, with the folder and the time after which it should begin nothing new."""
    values = {"out": str(out), "seconds": str(int(seconds - MARGIN))}
    return [sys.executable, *(part.format(**values) for part in section.command)]


def run_section(section: Section, out: Path, seconds: float) -> tuple[str, str]:
    """Run to the end or the limit, output going to log.txt and the screen; the status and the output's last line."""
    command = filled(section, out, seconds)
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
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


def read_states(out: Path) -> list[dict[str, str]]:
    path = out / "sections.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_state(out: Path, state: dict[str, str]) -> None:
    """Replace the section's line."""
    states = [s for s in read_states(out) if s["section"] != state["section"]]
    with (out / "sections.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows([*states, state])


def run_all(sections: Sequence[Section], out: Path, limit: float, commit: str, device: str, again: bool = False) -> int:
    """Every section not yet done for this commit and device; 0 if all are done, 75 if some are not, 1 if one failed."""
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + limit if limit else float("inf")
    outcomes = []
    for section in sections:
        done = {
            s["section"] for s in read_states(out)
            if (s["status"], s["commit"], s["device"]) == ("done", commit, device)
        }  # fmt: skip
        if section.name in done and not again and not section.always:
            print(f"{section.name}: done before")
            continue
        waits = [name for name in section.needs if name not in done]
        seconds = min(section.limit, end - time.monotonic())
        begin = time.monotonic()
        if waits:
            status, last = "unfinished", f"waits for {', '.join(waits)}"
        elif seconds <= 2 * MARGIN:
            status, last = "unfinished", "no time left"
        else:
            print(f"{section.name}: at most {seconds:.0f} s", flush=True)
            status, last = run_section(section, out, seconds)
        taken = f"{time.monotonic() - begin:.0f}"
        write_state(
            out,
            {
                "section": section.name, "status": status, "seconds": taken, "limit": f"{seconds:.0f}",
                "commit": commit, "device": device, "last_line": last,
            },
        )  # fmt: skip
        print(f"{section.name}: {status} after {taken} s: {last}", flush=True)
        outcomes.append(status)
        if section.gate and status != "done":
            print(f"{section.name} is not green, so nothing is timed")
            break
    return 1 if "failed" in outcomes else UNFINISHED if "unfinished" in outcomes else 0


def restore_table(out: Path, table: Path) -> None:
    """Put a table that an earlier run tuned back into the package, where the planner looks for it."""
    saved = out / table.name
    if saved.exists() and not table.exists():
        table.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(saved, table)


def chosen(names: str, parser: argparse.ArgumentParser) -> list[Section]:
    """The sections named, in the table's order, with the gates and what they need; all if empty."""
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
            os.execv(other, [str(other), "-m", "tools.gpu", *sys.argv[1:]])
        return "", f"{sys.executable} has no torch, and there is no .venv (make setup)"
    if not torch.cuda.is_available():
        return "", f"torch {torch.__version__} sees no CUDA device"
    return torch.cuda.get_device_name(), ""


def main(arguments: list[str] | None = None) -> int:
    """Run the sections; exit 2 without a GPU, 1 where one failed, 75 where there was no time for all."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="folder of results")
    parser.add_argument("--only", default="", help="sections, separated by commas; what they need comes before them")
    parser.add_argument("--seconds", type=float, default=0.0, help="begin no section that might end later")
    parser.add_argument("--again", action="store_true", help="also sections that are done")
    parser.add_argument("--list", action="store_true", dest="only_list", help="name the sections and their limits")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    options = parser.parse_args(arguments)
    sections, out = chosen(options.only, parser), options.out.resolve()
    if options.only_list:
        print("\n".join(f"{section.name:<20}{section.limit:>4} s  {section.what}" for section in sections))
        print(f"files: {', '.join(FILES)}")
        return 0
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
