"""Rehearses `make gpu` on a CPU, small, on machines that are taken away: `make gpu ARGS=--rehearse`.

Every call gets a fresh copy of the working tree and of nothing else but the results folder, as on a lent machine. In
each copy faults are planted: a red test and one that hangs, a wrong variant, one that hangs, one that asks for too much
memory. One series of calls is left alone. In others all processes are killed at random moments; each must end with the
rows of the first, all columns but what is measured. The full form makes a Python like the lent machine's.
"""

import csv
import ctypes
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from bench import records
from tools.gpu.runner import LARGEST
from tools.gpu.sections import RUNS, SECTIONS

ROOT = Path(__file__).resolve().parents[2]
PYTHON = "3.12"
# What the lent machine has; its NumPy is newer, but Triton's interpreter of 3.6 takes none from 2.4 on.
PACKAGES = ("torch==2.11.0", "triton==3.6.0", "numpy<2.4", "transformers==5.17.0", "pytest", "pytest-benchmark",
            "pytest-xdist", "pytest-timeout", "hypothesis")  # fmt: skip
KILLS, SHORT_KILLS = 20, 3
LONGEST = 900.0  # seconds per call
START = 3.0  # seconds that a quiet machine takes to import torch and triton
MOST_SLOW = 12.0  # beyond which limits grow no further
VERSIONS = (
    "import platform, torch, triton\n"
    "print('Python', platform.python_version(), 'torch', torch.__version__, 'triton', triton.__version__)"
)
MOST_FILES = 8
# Written at the end of the copy's bench/variants.py. The hang is in one comparison: each costs its limit.
FAULTY_VARIANTS = """

def _hangs(**arguments):
    if not torch.is_grad_enabled() and arguments["features"].shape[-1] == 192:
        __import__("time").sleep(3600)
    return cvfm(**arguments, backend="native", recompute=True)


def _wrong(**arguments):
    return 1.01 * cvfm(**arguments, backend="eager")


def _greedy(**arguments):
    return torch.empty(1 << 50)


for _name, _function in (("native_recompute", _hangs), ("eager_project_first", _wrong), ("eager_recompute", _greedy)):
    REGISTRY[_name] = Variant(_name, lambda function=_function: function, _name.split("_")[0])
"""
FAULTY_TESTS = '''"""Planted: a red test and one that hangs."""

import time

import pytest

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("backend", ["native"])
def test_planted_red(backend):
    assert backend == "", "planted"


def test_planted_hang():
    time.sleep(3600)
'''
# What must be in bench.csv: (variant, the beginning of its note).
EXPECTED_NOTES = (
    ("native_recompute", "hung: no end within"),
    ("eager_project_first", "red: out: error"),
    ("eager_recompute", "RuntimeError: "),
)


class Failed(Exception):
    """The rehearsal found a fault of `make gpu`."""


def python(folder: Path) -> str:
    """A Python with the lent machine's packages, made in `folder` on first use."""
    path = folder / "venv" / "bin" / "python"
    found = shutil.which(f"python{PYTHON}") or ""
    works = found and subprocess.run([found, "--version"], capture_output=True, check=False).returncode == 0
    if not works:
        print(f"rehearsal: no python{PYTHON} here, so Python {sys.version.split()[0]}", flush=True)
    if not (folder / "venv" / "done").exists():
        print(f"rehearsal: making {folder / 'venv'} with {', '.join(PACKAGES)} (some gigabytes)", flush=True)
        subprocess.run([found if works else sys.executable, "-m", "venv", "--clear", str(folder / "venv")], check=True)
        subprocess.run([str(path), "-m", "pip", "install", "-q", *PACKAGES], check=True)
        (folder / "venv" / "done").touch()
    return str(path)


def copy_tree(target: Path) -> None:
    """What travels to a lent machine, with the native library, and the planted faults."""
    listed = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True)
    library = sorted((ROOT / "fila_kernels" / "lib").glob("*.so"))
    for name in [*listed.splitlines(), *(str(path.relative_to(ROOT)) for path in library)]:
        if (ROOT / name).is_file() and not name.startswith(("fila/pretrained", "recipes")):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    with (target / "bench" / "variants.py").open("a") as file:
        file.write(FAULTY_VARIANTS)
    (target / "tests" / "kernels" / "test_gpu_planted.py").write_text(FAULTY_TESTS)


def descendants(root: int) -> Iterator[int]:
    """Processes below `root`, by /proc."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if fields[0] != "Z":
            children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    open_ = list(children.get(root, ()))
    while open_:
        process = open_.pop()
        yield process
        open_ += children.get(process, ())


def take_machine_away() -> None:
    """Kill everything below this process, which adopts what loses its parent meanwhile."""
    while found := list(descendants(os.getpid())):
        for process in found:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.02)
    while True:  # bury those that were adopted
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                return
        except ChildProcessError:
            return


class Series:
    """Calls of `make gpu` with one results folder, each on a machine of its own."""

    def __init__(self, interpreter: str, results: Path, cache: Path, slow: float) -> None:
        self.interpreter, self.results, self.cache, self.slow = interpreter, results, cache, slow
        shutil.rmtree(results, ignore_errors=True)
        results.mkdir(parents=True)

    def call(self, run: str, seconds: float | None = None) -> int | None:
        """One call, taken away after that many seconds: its exit code, or None if it was."""
        with tempfile.TemporaryDirectory() as folder:
            machine = Path(folder)
            copy_tree(machine / "tree")
            shutil.copytree(self.results, machine / "results")
            (machine / "tmp").mkdir()
            environment = {n: v for n, v in os.environ.items() if not n.startswith(("PYTEST_", "FILA_", "TRITON_"))} | {
                "PYTHONPATH": ".", "TMPDIR": str(machine / "tmp"), "PYTHONPYCACHEPREFIX": str(self.cache / "pyc"),
                "TORCHINDUCTOR_CACHE_DIR": str(self.cache / "inductor"), "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            longest = LONGEST * self.slow
            command = [self.interpreter, "-m", "tools.gpu", "--small", f"{self.slow:.1f}", "--run", run]
            command += ["--out", str(machine / "results"), "--seconds", f"{longest:.0f}"]
            with (self.results.parent / "calls.log").open("a") as log:
                log.write(f"\n== {self.results.name}: run {run}, {seconds or 'whole'}\n")
                log.flush()
                process = subprocess.Popen(
                    command, cwd=machine / "tree", env=environment, stdout=log,
                    stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
                try:
                    code: int | None = process.wait(seconds or longest)
                except subprocess.TimeoutExpired:
                    code = None
                take_machine_away()
                process.wait()
            if code is None and seconds is None:
                raise Failed(f"run {run} took more than {longest:.0f} s")
            self.bring_back(machine / "results")
        return code

    def bring_back(self, folder: Path) -> None:
        """The files that a lent machine gives back, in place of those of before."""
        found = [path for path in sorted(folder.iterdir()) if not path.name.endswith(".new")]
        large = [path.name for path in found if path.stat().st_size > LARGEST]
        if len(found) > MOST_FILES or large:
            raise Failed(f"the results folder holds {len(found)} files, too large are {large}")
        shutil.rmtree(self.results)
        self.results.mkdir()
        for path in found:
            shutil.copy2(path, self.results / path.name)

    def ended(self, run: str) -> bool:
        names = {section.name for section in SECTIONS if section.run == run}
        states = self.read("sections.csv")
        return names <= {state["section"] for state in states if state["status"] in ("done", "failed", "skipped")}

    def read(self, name: str) -> list[dict[str, str]]:
        path = self.results / name
        if not path.exists():
            return []
        with path.open(newline="") as file:
            return list(csv.DictReader(file))

    def rows(self) -> Counter[str]:
        """What must not depend on kills: rows without what is measured, outcomes of tests, states of sections."""
        found: Counter[str] = Counter()
        for name in ("bench.csv", "first_call.csv"):
            for row in self.read(name):
                # A tuned config decides the order of sums and what is kept.
                tuned = ("error", "kept_bytes") if row["table"] else ()
                kept = {k: v for k, v in row.items() if k not in (*records.MEASURED, *tuned)}
                found[f"{name} {kept | {'table': bool(row['table']), 'timed': bool(row['p50_ms'])}}"] += 1
        found.update(f"gate.csv {row['test']} {row['outcome']}" for row in self.read("gate.csv"))
        found.update(f"sections.csv {state['section']} {state['status']}" for state in self.read("sections.csv"))
        return found


def check_faults(series: Series) -> None:
    """Each planted fault was found and named, and cost nothing else its time."""
    rows = series.read("bench.csv")
    for variant, note in EXPECTED_NOTES:
        if not any(row["variant"] == variant and row["note"].startswith(note) for row in rows):
            raise Failed(f"bench.csv has no row of {variant} with the note {note!r}")
    planted = {variant for variant, _ in EXPECTED_NOTES}
    wrong = [row for row in rows if bool(row["p50_ms"]) == bool(row["note"]) and row["variant"] not in planted]
    if wrong:
        raise Failed(f"not timed: {wrong[0]}")
    outcomes = {row["test"].rpartition("::")[2]: row["outcome"] for row in series.read("gate.csv")}
    if {n for n, outcome in outcomes.items() if outcome == "failed"} != {
        "test_planted_red[native]",
        "test_planted_hang",
    }:
        raise Failed(f"gate.csv: expected the planted tests to be red and no other, got {outcomes}")


def difference(left: Counter[str], right: Counter[str]) -> str:
    return "\n".join([f"- {line}" for line in (left - right)] + [f"+ {line}" for line in (right - left)])


def main(folder: Path, seed: int = 0, short: bool = False) -> int:
    """Exit 0 if every series of calls, killed or not, ends with the same rows."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "calls.log").unlink(missing_ok=True)
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    interpreter = sys.executable if short else python(folder)
    runs = ("a",) if short else tuple(RUNS)
    kills, moments = SHORT_KILLS if short else KILLS, random.Random(seed)
    begin = time.monotonic()
    versions = subprocess.check_output([interpreter, "-c", VERSIONS], text=True, cwd="/").strip()
    slow = min(MOST_SLOW, max(1.0, (time.monotonic() - begin) / START))
    print(f"rehearsal: {versions}; runs {', '.join(runs)}; seed {seed}; limits times {slow:.1f}", flush=True)
    try:
        whole = Series(interpreter, folder / "whole", folder / "cache", slow)
        taken = {}
        for run in runs:
            begin = time.monotonic()
            code = whole.call(run)
            taken[run] = time.monotonic() - begin
            print(f"rehearsal: run {run} exits with {code} after {taken[run]:.0f} s", flush=True)
            if not whole.ended(run):
                raise Failed(f"run {run} has sections that did not end: {whole.read('sections.csv')}")
        check_faults(whole)
        killed, number = 0, 0
        while killed < kills:
            number += 1
            series = Series(interpreter, folder / f"killed-{number}", folder / "cache", slow)
            for run in runs:
                while not series.ended(run):
                    after = moments.uniform(1.0, max(2.0, taken[run] / 2))
                    if series.call(run, after if killed < kills else None) is None:
                        killed += 1
                        print(f"rehearsal: kill {killed} in run {run} after {after:.1f} s", flush=True)
            if told := difference(whole.rows(), series.rows()):
                raise Failed(f"series {number} ends with other rows than the one left alone:\n{told}")
    except Failed as failed:
        print(f"rehearsal: FAILED: {failed}\nrehearsal: output is in {folder / 'calls.log'}")
        return 1
    finally:
        take_machine_away()
    print(f"rehearsal: {killed} kills in {number} series, {sum(whole.rows().values())} rows equal")
    return 0
