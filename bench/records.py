"""The CSV that every benchmark writes, row by row as it goes, and that every table and plot is made from."""

import csv
import functools
import hashlib
import io
import os
import platform
import secrets
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from bench import files
from bench.engine import Comparison, Result, quantile
from bench.roofline import measure_roof
from bench.workloads import DTYPES
from fila_kernels import tuned
from fila_kernels.info import version

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
Row = dict[str, str]
# Name and meaning of each column; docs/benchmarks.md lists them from here.
COLUMNS = {
    "device": "the processor's or GPU's name",
    "threads": "torch's threads on a CPU",
    "clock": "what timed: `wall` or `thread` (one thread's processor time) on a CPU, `events` on a GPU",
    "commit": "of this repository; `source-` and a digest of the sources where there is no git",
    "torch": "version",
    "python": "version",
    "triton": "version",
    "cuda": "version that torch was built with",
    "table": "eight digits of a digest of the device's tuned table; empty where it has none",
    "operation": "`cvfm`, `crop_resize`, `gemm` or `tower`",
    "workload": "raster, stage, dtype, then what differs from the usual: `b` images, `h` hidden width, `d` token "
    "width, `g` grid side, `p` prefix tokens, `v` views per image, `frozen` features",
    "direction": "`forward`, or `forward+backward` (all gradients, without the features' where they are frozen); "
    "`backward` for `crop_resize` alone; `fc1` and `fc2` for `gemm`",
    "variant": "what ran; the names are explained above",
    "session": "eight digits that all rows of one interleaving share; only their times are divided by each other",
    "rounds": "number of interleaved rounds",
    "p20_ms": "time per call, 20th percentile of the rounds; empty where nothing was timed",
    "p50_ms": "the median",
    "p80_ms": "80th percentile",
    "host_ms": "on a GPU, time until a call returns to Python",
    "first_call_ms": "the variant's first call in this process: compilation, where no cache on disk holds it",
    "extra_memory_bytes": "peak of one call above what was there before",
    "kept_bytes": "what autograd keeps from the forward for the backward pass, beside inputs and result",
    "error": "largest error against float64 over eager's, of the result or the worst gradient",
    "flops": "of the definition's GEMMs, three times the forward pass's for both directions",
    "bytes": "least traffic of the forward pass, times three for both directions",
    "floor_flops": "of the exact way that the roof lets finish first",
    "floor_bytes": "likewise",
    "roof_flops": "operations per second of a square matrix product, measured in the same run",
    "roof_bytes": "bytes per second of a large copy, read and written both counted, measured in the same run",
    "note": "why something was not measured",
}  # fmt: skip
# What is measured, where and by what; a variant or a session is one answer.
QUESTION = ("commit", "device", "torch", "triton", "table", "operation", "workload", "direction")
# What two runs of one commit on one machine need not agree on.
MEASURED = (
    "session", "p20_ms", "p50_ms", "p80_ms", "host_ms", "first_call_ms", "extra_memory_bytes", "floor_flops",
    "floor_bytes", "roof_flops", "roof_bytes",
)  # fmt: skip
# The two committed CSVs of a CPU hold earlier names: `case` for `workload`, `torch` for the compiled operators, and
# `torch_calls` for PyTorch's.
OLD_COLUMN = "case"
OLD_VARIANTS = {"torch": "native", "torch_calls": "eager"}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.split(':')[1].strip()} {torch.backends.cpu.get_cpu_capability()}"
    return platform.processor()


def slug(device: torch.device) -> str:
    """The device in file names: cpu, or the GPU's name as in nvidia_h200."""
    if device.type != "cuda":
        return device.type
    return "_".join(torch.cuda.get_device_name(device).lower().replace("-", " ").split())


def source_digest() -> str:
    """Eight digits of a digest of the sources, for a copy of the repository without git."""
    digest = hashlib.sha256()
    for folder in ("fila_kernels", "fila", "csrc", "bench"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".cu", ".h"):
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return f"source-{digest.hexdigest()[:8]}"


@functools.cache
def commit() -> str:
    """The repository's commit, looked up once per process; `FILA_BENCH_COMMIT` gives it where there is no git."""
    named = os.environ.get("FILA_BENCH_COMMIT")
    if named:
        return named
    try:
        found = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
    except FileNotFoundError:
        found = ""
    return found or source_digest()


def table_digest(device: torch.device) -> str:
    """The digest of the device's tuned table, which planner and launchers read; empty without a table."""
    path = tuned.path_of(torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)
    return hashlib.sha256(path.read_bytes()).hexdigest()[:8] if path.exists() else ""


def environment(device: torch.device) -> Row:
    """The columns that say where a row was measured."""
    return {
        "device": device_name(device), "threads": str(torch.get_num_threads()), "commit": commit(),
        "torch": torch.__version__, "python": platform.python_version(), "triton": version("triton") or "",
        "cuda": torch.version.cuda or "", "table": table_digest(device),
    }  # fmt: skip


def rows_of(comparison: Comparison, results: dict[str, Result], device: torch.device, clock: str) -> list[Row]:
    """A comparison's results as rows, one per contestant, timed or not."""
    shared = environment(device) | {
        "clock": "events" if device.type == "cuda" else clock, "operation": comparison.operation,
        "workload": comparison.workload, "direction": comparison.direction, "session": secrets.token_hex(4),
    }  # fmt: skip
    if comparison.work is not None:
        roof = measure_roof(DTYPES[comparison.dtype], device, clock)
        floor = roof.floor(comparison.ways)
        shared |= {
            "flops": str(comparison.work.flops), "bytes": str(comparison.work.bytes), "floor_flops": str(floor.flops),
            "floor_bytes": str(floor.bytes), "roof_flops": f"{roof.flops:.5g}", "roof_bytes": f"{roof.bytes:.5g}",
        }  # fmt: skip
    return [shared | {"variant": name} | _columns(result) for name, result in results.items()]


def _columns(result: Result) -> Row:
    def milliseconds(seconds: float | None) -> str:
        return "" if seconds is None else f"{seconds * 1e3:.5g}"

    def whole(count: int | None) -> str:
        return "" if count is None else str(count)

    timed = result.seconds
    parts = {"p20_ms": 0.2, "p50_ms": 0.5, "p80_ms": 0.8}
    return {name: milliseconds(quantile(timed, part) if timed else None) for name, part in parts.items()} | {
        "rounds": str(len(timed)), "host_ms": milliseconds(result.host_seconds),
        "first_call_ms": milliseconds(result.first_seconds), "extra_memory_bytes": whole(result.extra_memory),
        "kept_bytes": whole(result.kept), "error": "" if result.error is None else f"{result.error:.4g}",
        "note": result.note,
    }  # fmt: skip


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows, all or none of them whenever the process ends; columns that a row does not name stay empty.

    Raises:
        ValueError: for a column that the schema does not have, or a file of another schema.
    """
    text = path.read_text() if path.exists() else ""
    if text:
        header = next(csv.reader([text.split("\n", 1)[0]]))
        if header != list(COLUMNS):
            raise ValueError(f"{path}: expected the columns of bench.records.COLUMNS, got {','.join(header)}")
    added = io.StringIO(newline="")
    writer = csv.DictWriter(added, COLUMNS, restval="", lineterminator="\n")
    if not text:
        writer.writeheader()
    writer.writerows(rows)
    files.replace(path, text + added.getvalue())


def read(path: Path) -> list[Row]:
    """All rows, the names of the committed files replaced by today's."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [dict.fromkeys(COLUMNS, "") | (_renamed(row) if OLD_COLUMN in row else row) for row in rows]


def _renamed(row: Row) -> Row:
    row = dict(row)
    return row | {"workload": row.pop(OLD_COLUMN), "variant": OLD_VARIANTS.get(row["variant"], row["variant"])}


def red_backends(path: Path, here: Row) -> dict[tuple[str, str], str]:
    """{(backend, dtype): note} of those that a test of a real shape found wrong; `tools/gpu/gate.py` writes the file.

    Tests of other cases keep nothing from being timed: a comparison holds each variant against the definition itself.
    """
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if all(row[name] == here[name] for name in ("commit", "device"))]
    red = (row for row in rows if row["outcome"] == "failed" and "real_shape" in row["test"])
    return {(row["backend"], row["dtype"]): f"red: {row['test']}" for row in red}


def missing(rows: Iterable[Row], question: Row, variants: Sequence[str]) -> list[str]:
    """The variants to measure: none where one interleaving holds them all, else all but those that ended a process.

    A variant that hung or crashed has a row without a session.
    """
    found: dict[str, set[str]] = {}
    for row in rows:
        if all(row[name] == question[name] for name in QUESTION):
            found.setdefault(row["session"], set()).add(row["variant"])
    able = [variant for variant in variants if variant not in found.get("", ())]
    return [] if any(set(able) <= variants for session, variants in found.items() if session) else able
