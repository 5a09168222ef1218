"""The CSV that every benchmark writes, row by row as it goes, and that every table and plot is made from."""

import csv
import functools
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from bench.timing import quantile
from fila_kernels import tuned

ROOT = Path(__file__).resolve().parent.parent
# Name and meaning of each column; docs/benchmarks.md lists them from here.
COLUMNS = {
    "device": "the processor's or GPU's name",
    "threads": "torch's threads on a CPU",
    "clock": "what timed: `wall` or `thread` (one thread's processor time) on a CPU, `events` on a GPU",
    "commit": "of this repository; `source-` and a digest of the sources where there is no git",
    "torch": "version",
    "python": "version",
    "case": "raster, stage, dtype, then what differs from the usual: `b` images, `h` hidden width, `d` token width, "
    "`g` grid side, `p` prefix tokens, `v` views an image, `frozen` features",
    "direction": "`forward`, or `forward+backward` (all gradients, but the features' where they are frozen); "
    "`backward` for `crop_resize` alone; `fc1` and `fc2` for `gemm`",
    "variant": "what ran; the names are explained below",
    "rounds": "how many interleaved rounds",
    "p20_ms": "time of a call, 20th percentile of the rounds; empty where nothing was timed",
    "p50_ms": "the median",
    "p80_ms": "80th percentile",
    "flops": "of the definition's GEMMs, three times the forward pass's for both directions",
    "bytes": "least traffic of the forward pass, times three for both directions",
    "extra_memory_bytes": "peak of one call above what was there before",
    "operation": "`cvfm`, `crop_resize`, `gemm`, `tower` or `tower-step`",
    "triton": "version",
    "cuda": "version that torch was built with",
    "table": "eight digits of a digest of the device's tuned table; empty where it has none",
    "kept_bytes": "what autograd keeps from the forward for the backward pass, beside inputs and result",
    "host_ms": "on a GPU, time until a call returns to Python",
    "first_call_ms": "the variant's first call in this process: compilation, where no cache on disk holds it",
    "error": "largest error against float64 over eager's, of the result or the worst gradient",
    "floor_flops": "of the exact way that the roof lets finish first",
    "floor_bytes": "likewise",
    "roof_flops": "operations a second of a square matrix product, measured in the same run",
    "roof_bytes": "bytes a second of a large copy, read and written both counted, measured in the same run",
    "note": "why something was not measured",
}  # fmt: skip
KEY = ("commit", "device", "torch", "triton", "table", "operation", "case", "direction", "variant")


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def device_name(device: torch.device | str = "cpu") -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            capability = torch.backends.cpu.get_cpu_capability()
            return f"{line.split(':')[1].strip()} {capability}"
    return platform.processor()


def source_digest() -> str:
    """Eight digits of what the sources are, for a copy of the repository that has no git."""
    digest = hashlib.sha256()
    for folder in ("fila_kernels", "fila", "csrc", "bench"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".cu", ".h"):
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return f"source-{digest.hexdigest()[:8]}"


@functools.cache
def commit() -> str:
    """Of this repository, asked once a process; `FILA_BENCH_COMMIT` says what it is where there is no git."""
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
    """Of the tuned table that planner and launchers read on this device; empty where there is none."""
    path = tuned.path_of(torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)
    return hashlib.sha256(path.read_bytes()).hexdigest()[:8] if path.exists() else ""


def environment(device: torch.device) -> dict[str, str]:
    """The columns that say where a row was measured."""
    return {
        "device": device_name(device), "threads": str(torch.get_num_threads()), "commit": commit(),
        "torch": torch.__version__, "python": platform.python_version(), "triton": version("triton"),
        "cuda": torch.version.cuda or "", "table": table_digest(device),
    }  # fmt: skip


def times_of(times: Sequence[float]) -> dict[str, str]:
    """The columns of a list of seconds; empty where nothing was timed."""
    parts = {"p20_ms": 0.2, "p50_ms": 0.5, "p80_ms": 0.8}
    found = {name: f"{quantile(times, part) * 1e3:.5g}" if times else "" for name, part in parts.items()}
    return found | {"rounds": str(len(times))}


def append(path: Path, row: dict[str, object]) -> None:
    """Add one row; columns it does not name stay empty.

    Raises:
        ValueError: for a column that the schema does not have, or a file of another schema.
    """
    unknown = row.keys() - COLUMNS.keys()
    if unknown:
        raise ValueError(f"row: expected columns of bench.records.COLUMNS, got {', '.join(sorted(unknown))}")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists() or path.stat().st_size == 0
    if not fresh:
        with path.open(newline="") as file:
            header = next(csv.reader(file))
        if header != list(COLUMNS):
            raise ValueError(f"{path}: expected the columns of bench.records.COLUMNS, got {','.join(header)}")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def read(path: Path) -> list[dict[str, str]]:
    """All rows; columns that a file of an older schema lacks are empty, its operation is `cvfm`."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [dict.fromkeys(COLUMNS, "") | {"operation": "cvfm"} | row for row in csv.DictReader(file)]


def key(row: dict[str, str]) -> tuple[str, ...]:
    """What identifies a measurement."""
    return tuple(row[name] for name in KEY)


def done(rows: Iterable[dict[str, str]]) -> set[tuple[str, ...]]:
    return {key(row) for row in rows}
