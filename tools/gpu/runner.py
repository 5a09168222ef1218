"""Runs sections: each in a process of its own, restarted after a crash or a hang, its state written as it changes.

The results folder is all that a machine gives back. It holds at most eight files, Triton's cache as one of them, and
whenever the machine is stopped it says how far each section came.
"""

import csv
import io
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

from bench import files
from tools.gpu.sections import MARGIN, RESTART, Section

ROOT = Path(__file__).resolve().parents[2]
UNFINISHED = 75  # EX_TEMPFAIL, as bench.run has it
STATUS = {0: "done", UNFINISHED: "unfinished", os.EX_UNAVAILABLE: "skipped"}
FIELDS = ("section", "status", "attempts", "seconds", "limit", "commit", "device", "last_line")
LARGEST = 15 * 2**20  # bytes per file of the results folder
KEPT_OUTPUT = (".cubin", ".json")  # of a compiled kernel, what a later run loads


class Results:
    """The folder of results for one commit and device."""

    def __init__(self, folder: Path, commit: str, device: str) -> None:
        self.folder, self.here = folder, {"commit": commit, "device": device}
        folder.mkdir(parents=True, exist_ok=True)

    def states(self) -> dict[str, dict[str, str]]:
        """{section: state}, of this commit and device."""
        path = self.folder / "sections.csv"
        if not path.exists():
            return {}
        rows = csv.DictReader(io.StringIO(path.read_text()))
        return {row["section"]: row for row in rows if all(row[n] == value for n, value in self.here.items())}

    def write(self, section: str, status: str, attempts: int, seconds: float, limit: float, last: str = "") -> None:
        """Replace the section's line."""
        state = self.here | {
            "section": section, "status": status, "attempts": str(attempts), "seconds": f"{seconds:.0f}",
            "limit": f"{limit:.0f}", "last_line": last,
        }  # fmt: skip
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows((self.states() | {section: state}).values())
        files.replace(self.folder / "sections.csv", text.getvalue())

    def log(self) -> Path:
        """The file of all output, cut to its second half where it has grown too large."""
        path = self.folder / "log.txt"
        if path.exists() and path.stat().st_size > LARGEST // 2:
            files.replace(path, path.read_bytes()[-LARGEST // 4 :])
        return path


def triton_cache() -> Path:
    """The folder of compiled kernels: Triton's cache holds absolute paths, so it is the same one in every run."""
    return Path(tempfile.gettempdir()) / "fila-gpu-triton"


def pack_cache(archive: Path, cache: Path, largest: int = LARGEST) -> None:
    """Write the cache into one file: of every kernel what is loaded again, the newest kernels first."""
    kernels = sorted((path for path in cache.glob("*") if path.is_dir()), key=lambda p: p.stat().st_mtime, reverse=True)
    data, size = io.BytesIO(), 0
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as packed:
        for kernel in kernels:
            found = [path for path in sorted(kernel.iterdir()) if path.suffix in KEPT_OUTPUT]
            for path in found:
                packed.write(path, path.relative_to(cache))
            size = data.tell()
            if size > 0.9 * largest:
                break
    if kernels and size <= largest:
        files.replace(archive, data.getvalue())


def unpack_cache(archive: Path, cache: Path) -> None:
    if archive.exists() and not cache.exists():
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(cache)


def restore_table(folder: Path, table: Path) -> None:
    """Put a table that an earlier run tuned back into the package, where the planner looks for it."""
    saved = folder / table.name
    if saved.exists() and not table.exists():
        table.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(saved, table)


class Output(threading.Thread):
    """Copies a process's output to the log and the screen, and keeps the last line."""

    def __init__(self, process: subprocess.Popen, log: Path) -> None:
        super().__init__(daemon=True)
        self.process, self.log, self.last = process, log, ""
        self.start()

    def run(self) -> None:
        assert self.process.stdout is not None
        with self.log.open("a") as log:
            for line in self.process.stdout:
                log.write(line)
                log.flush()
                print(f"  {line}", end="", flush=True)
                self.last = line.strip() or self.last


class Runner:
    """Runs sections with one results folder; `small`, if not 0, as `Section.filled` has it."""

    def __init__(self, results: Results, small: float = 0.0) -> None:
        self.results, self.small = results, small

    def environment(self, section: Section, scratch: Path) -> dict[str, str]:
        path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)
        found = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "TRITON_CACHE_DIR": str(triton_cache())}
        if section.fresh:
            found |= {"TRITON_CACHE_DIR": f"{scratch}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor"}
        return found | ({"TRITON_INTERPRET": "1", "FILA_TEST_DEVICE": "cpu"} if self.small else {})

    def run(self, section: Section, seconds: float) -> tuple[str, str]:
        """Run to the end or the limit; the status and the output's last line.

        A process that crashes or hangs at a step is started again and leaves that step out.
        """
        end = time.monotonic() + seconds
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            under_way = files.UnderWay(scratch / "under-way.json")
            blamed = ""
            while (left := end - time.monotonic()) > MARGIN:
                code, reason, last = self.once(section, scratch, under_way, left)
                last = " ".join(part for part in (last, blamed) if part)
                if reason == "time":
                    return "unfinished", f"stopped after {seconds:.0f} s: {last}"
                if code in STATUS:
                    return STATUS[code], last
                if not under_way.blame(reason or f"ended: {_name(code)}") and code != RESTART:
                    return "failed", last
                found = under_way.read()
                blamed = f"(without {found['name']}: {found['ended']})" if found else blamed
            return "unfinished", f"no time left after {blamed}"

    def once(self, section: Section, scratch: Path, under_way: files.UnderWay, seconds: float) -> tuple[int, str, str]:
        """One process: its exit code, why it was stopped ("time", or a hang's description), its last line."""
        command = section.filled(self.results.folder, scratch, seconds, self.small)
        log, deadline, reason = self.results.log(), time.monotonic() + seconds, ""
        with log.open("a") as file:
            file.write(f"\n== {section.name}: {' '.join(command[1:])}\n")
        process = subprocess.Popen(
            command, cwd=ROOT, env=self.environment(section, scratch), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        output = Output(process, log)
        while process.poll() is None:
            if under_way.overdue():
                reason = f"hung: no end within {(under_way.read() or {}).get('limit', 0):.0f} s"
            elif time.monotonic() > deadline:
                reason = "time"
            if reason:
                break
            time.sleep(0.1)
        # Also what the process left behind: its group is its own.
        _kill_group(process.pid)
        process.wait()
        output.join(5)
        return process.returncode, reason, output.last

    def run_all(self, sections: Sequence[Section], limit: float, again: bool = False) -> int:
        """Every section that has not ended, those first that were never begun.

        0 if all are done or skipped, 75 if some are not, 1 if one failed.
        """
        end = time.monotonic() + limit if limit else float("inf")
        states, outcomes = self.results.states(), []
        packed = sum(1 for _ in triton_cache().glob("*"))
        for section in in_order(sections, states, again):
            state = states.get(section.name, {})
            attempts = int(state.get("attempts", 0)) + 1
            seconds = min(section.limit * max(1.0, self.small), end - time.monotonic())
            if seconds < min(section.limit, 2 * MARGIN) and not section.always:
                print(f"{section.name}: no time left", flush=True)
                outcomes.append("unfinished")
                continue
            print(f"{section.name}: at most {seconds:.0f} s", flush=True)
            begin = time.monotonic()
            self.results.write(section.name, "begun", attempts, 0, seconds)
            status, last = self.run(section, seconds)
            taken = time.monotonic() - begin
            kernels = sum(1 for _ in triton_cache().glob("*"))
            if kernels != packed:
                pack_cache(self.results.folder / "triton-cache.zip", triton_cache())
                packed = kernels
            self.results.write(section.name, status, attempts, taken, seconds, last)
            print(f"{section.name}: {status} after {taken:.0f} s: {last}", flush=True)
            outcomes.append(status)
        return 1 if "failed" in outcomes else UNFINISHED if "unfinished" in outcomes else 0


def in_order(sections: Sequence[Section], states: dict[str, dict[str, str]], again: bool = False) -> list[Section]:
    """What is to be run: sections never begun or cut off once, in the table's order, then what needs more time.

    A section that was cut off twice may be the reason, so it waits.
    """
    first, later = [], []
    for section in sections:
        state = states.get(section.name)
        cut = state is not None and state["status"] == "begun" and int(state["attempts"]) < 2
        if section.always or again or state is None or cut:
            first.append(section)
        elif state["status"] in ("begun", "unfinished"):
            later.append(section)
    return first + later


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def _name(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"status {code}"
