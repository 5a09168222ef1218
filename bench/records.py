"""The CSV that every benchmark writes and every table and plot is made from."""

import csv
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"
FIELDS = (
    "device", "threads", "clock", "commit", "torch", "python", "case", "direction", "variant", "rounds",
    "p20_ms", "p50_ms", "p80_ms", "flops", "bytes", "extra_memory_bytes",
)  # fmt: skip


def output_path() -> Path:
    """Where this run's rows go; `bench.run` sets it."""
    return Path(os.environ.get("FILA_BENCH_CSV", RESULTS / "cvfm_cpu.csv"))


def rounds() -> int:
    return int(os.environ.get("FILA_BENCH_ROUNDS", "11"))


def clock_name() -> str:
    """ "wall", or "thread" for the calling thread's processor time, which other programs hardly disturb."""
    return os.environ.get("FILA_BENCH_CLOCK", "wall")


def clock() -> Callable[[], float]:
    """The clock to time with. Processor time only means something with one thread, so that it sets that."""
    if clock_name() == "thread":
        torch.set_num_threads(1)
        return time.thread_time
    return time.perf_counter


def device_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            capability = torch.backends.cpu.get_cpu_capability()
            return f"{line.split(':')[1].strip()} {capability}"
    return platform.processor()


def commit() -> str:
    found = subprocess.run(
        ["git", "-C", str(RESULTS), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def quantile(times: Iterable[float], part: float) -> float:
    ordered = sorted(times)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def median(times: Iterable[float]) -> float:
    return quantile(times, 0.5)


def append(
    *, case: str, direction: str, variant: str, times: list[float], flops: int, bytes: int, extra_memory: int
) -> None:
    """Add one variant of one case to the CSV."""
    path = output_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(
            {
                "device": device_name(), "threads": torch.get_num_threads(), "clock": clock_name(), "commit": commit(),
                "torch": torch.__version__, "python": platform.python_version(), "case": case, "direction": direction,
                "variant": variant, "rounds": len(times), "p20_ms": f"{quantile(times, 0.2) * 1e3:.3f}",
                "p50_ms": f"{median(times) * 1e3:.3f}", "p80_ms": f"{quantile(times, 0.8) * 1e3:.3f}",
                "flops": flops, "bytes": bytes, "extra_memory_bytes": extra_memory,
            }
        )  # fmt: skip


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
