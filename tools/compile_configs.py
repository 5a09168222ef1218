"""Compiles the Triton products with every config that the tuner would try, and keeps the figures in a CSV.

    python -m tools.compile_configs                         # by the installed Triton; make test-aot: by 3.6.0 too
    python -m tools.compile_configs --arch 90 --dtype float16

Two processes share the work. Rows are written as they come, and rows of the same sources and Triton are not compiled
again, so the command can be stopped and repeated. `tools/documents.py` makes the tables of
docs/kernels.md from the file. Exit 1 where a kernel is not as intended.
"""

import argparse
import csv
import hashlib
import os
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import torch
import triton

from bench.tune import shortlist
from bench.workloads import SUITES, Workload
from fila_kernels.backends.triton import configs
from tools import compiled_kernels
from tools.compiled_kernels import ARCHITECTURES, INTENDED, Kernel

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "compiled_kernels.csv"
KEY = ("triton", "sources", "arch", "dtype", "set", "kernel", "tile", "warps", "stages", "options")
FIELDS = (*KEY, "registers", "spills", "shared", "tensor_memory", "occupancy", "faults")
MOST = 16  # configs that the tuner tries for a launch
Row = dict[str, str]
Task = tuple[int, str, str, configs.GemmConfig | None]  # architecture, dtype, kernel ("" for all defaults), config


@cache
def sources(defaults: bool) -> str:
    """A digest of the kernels and their launchers, and, for the defaults, of what picks them."""
    folder = ROOT / "fila_kernels/backends/triton"
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")) if defaults or path.name != "configs.py")
    return hashlib.sha256(text).hexdigest()[:10]


def problems(workload: Workload) -> Iterable[tuple[str, int, int, int]]:
    """Each product's name and sizes, by sampling first and by projecting first."""
    shape = workload.shape
    rows, d, c, h = (
        shape.tiles * (shape.prefix + shape.patches),
        workload.token_width,
        workload.channels,
        workload.hidden_width,
    )
    yield from (("fc1", rows, h, d + c), ("fc1_projected", rows, h, d), ("fc2", rows, d, h))
    yield from (("hidden_gradient", rows, h, d), ("input_gradient", rows, d + c, h))
    yield from (("weight_gradient", d, h, shape.samples), ("weight_gradient", h, c, shape.cells))
    yield "single_pass", rows, configs.TRITON_SINGLE_PASS_WIDTH, configs.TRITON_SINGLE_PASS_WIDTH


def tasks(arch: int, name: str) -> list[Task]:
    """The defaults, and what the tuner would try over all suites; configs that make the same kernel count once."""
    if arch not in ARCHITECTURES:
        return [(arch, name, "", None)]
    device, dtype = configs.ARCHITECTURES[arch], getattr(torch, name)
    found: dict[tuple, Task] = {}
    for workload in dict.fromkeys(workload for suite in SUITES.values() for workload in suite):
        for kernel, *sizes in problems(workload):
            for config in shortlist(configs.Problem(kernel, *sizes, dtype), device, MOST):
                assert isinstance(config, configs.GemmConfig)
                key = {**configs.plain(config), "kernel": kernel, "persistent": None, "split_k": None}
                found.setdefault(tuple(key.values()), (arch, name, kernel, config))
    return [(arch, name, "", None), *found.values()]


def options(config: configs.Config | None) -> str:
    if not isinstance(config, configs.GemmConfig):
        return ""
    words = {"tma": config.tma, "specialised": config.warp_specialize, "split": config.split_epilogue > 1}
    return " ".join(word for word, on in words.items() if on)


def identity(task: Task) -> Row:
    """The columns of a task's rows that are known beforehand."""
    arch, dtype, kernel, config = task
    known = {"triton": triton.__version__, "sources": sources(config is None), "arch": str(arch), "dtype": dtype}
    if config is None:
        return known | {"set": "default"}
    tile, stages = compiled_kernels.tile_of(config)
    return known | {
        "set": "tuner", "kernel": kernel, "tile": tile, "warps": str(config.num_warps), "stages": stages,
        "options": options(config),
    }  # fmt: skip


def row_of(kernel: Kernel, known: Row) -> Row:
    tile, stages = compiled_kernels.tile_of(kernel.config)
    measured = {
        "kernel": kernel.name, "tile": tile, "warps": str(kernel.num_warps), "stages": stages,
        "options": options(kernel.config), "registers": str(kernel.registers), "spills": str(kernel.spills),
        "shared": str(kernel.shared), "tensor_memory": str(kernel.tensor_memory),
        "occupancy": f"{kernel.occupancy:.2f}", "faults": "; ".join(compiled_kernels.faults(kernel)),
    }  # fmt: skip
    return measured | known


def compiled(task: Task) -> list[Row]:
    """The task's rows; a config that does not compile gets one that says so."""
    arch, name, kernel, config = task
    dtype, known = getattr(torch, name), identity(task)
    if config is None:
        return [row_of(found, known) for found in compiled_kernels.compile_defaults(arch, dtype)]
    kernels: list[Kernel] = []
    try:
        with compiled_kernels.compiling(arch, kernels, ("reduce_kernel",), config):
            compiled_kernels.product_launches(compiled_kernels.example(dtype))[kernel]()
    except Exception as error:
        return [known | {"faults": f"does not compile: {type(error).__name__}: {str(error).splitlines()[0]}"}]
    return [row_of(found, known) for found in kernels]


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: Iterable[Row], mode: str = "w") -> None:
    with path.open(mode, newline="") as file:
        writer = csv.DictWriter(file, FIELDS, restval="")
        if mode == "w":
            writer.writeheader()
        writer.writerows(rows)


def label(row: Row) -> tuple[str, ...]:
    """The label that tells a task's rows from another's: for the defaults, their architecture and dtype alone."""
    return tuple(row[name] for name in (KEY if row["set"] == "tuner" else KEY[:5]))


def run(wanted: list[Task], path: Path, workers: int) -> list[Row]:
    """Compiles the kernels that the file lacks and drops those no longer wanted; returns this run's rows."""
    labels = {label(identity(task)): task for task in wanted}
    parts = {(str(arch), dtype) for arch, dtype, *_ in wanted}

    def is_other(row: Row) -> bool:
        return row["triton"] != triton.__version__ or (row["arch"], row["dtype"]) not in parts

    kept = [row for row in read(path) if is_other(row) or label(row) in labels]
    held = {label(row) for row in kept}
    left = [task for key, task in labels.items() if key not in held]
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, kept)
    print(f"Triton {triton.__version__}: {len(wanted)} tasks, {len(wanted) - len(left)} done before", flush=True)
    start = time.monotonic()
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for number, done in enumerate(as_completed([pool.submit(compiled, task) for task in left]), 1):
            write(path, done.result(), "a")
            for row in done.result():
                if row["faults"]:
                    print(row["faults"], flush=True)
            if number % 20 == 0 or number == len(left):
                print(f"{number} of {len(left)}, {time.monotonic() - start:.0f} s", flush=True)
    rows = sorted(read(path), key=lambda row: tuple(row[name] for name in KEY))
    write(path, rows)
    return [row for row in rows if not is_other(row)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="*", default=list(INTENDED), choices=tuple(INTENDED))
    parser.add_argument("--dtype", nargs="*", default=["bfloat16"], choices=("bfloat16", "float16"))
    parser.add_argument("--csv", type=Path, default=RESULTS, help=f"default: {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    given = parser.parse_args()
    wanted = [task for arch in given.arch for dtype in given.dtype for task in tasks(arch, dtype)]
    rows = run(wanted, given.csv, given.workers)
    wrong = [row for row in rows if row["faults"]]
    print(f"Triton {triton.__version__}: {len(rows)} kernels, {len(wrong)} not as intended")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
