"""Lists the sections of `make gpu`: what each runs, for how long at most, and in which run."""

import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUNS = {
    "a": "correctness, and times without a tuned table",
    "b": "tuning, and times with the table",
    "c": "torch.compile, the parts alone, the vision tower, the sanitizers",
    "more": "other widths, dtypes and layouts; torch.compile on every shape",
}
RESTART = 70  # EX_SOFTWARE: the process ended because its device was lost; another goes on
MARGIN = 15  # seconds before a section's end after which it begins nothing new
TEST_SECONDS = 60  # a test that takes longer counts as hung
# Files of the results folder, in the order in which a reader wants them.
FILES = {
    "sections.csv": "each section's status, time and last line",
    "bench.csv": "times",
    "gate.csv": "each test's outcome",
    "<device>.json": "the tuned table",
    "first_call.csv": "times of first calls",
    "triton-cache.zip": "compiled kernels, so that a later run does not compile them again",
    "libfila_kernels.so": "the native library that was built there",
    "log.txt": "all output",
}


@dataclass(frozen=True)
class Section:
    """One command of this repository; `{out}` and `{scratch}` are folders, `{seconds}` what it may take."""

    name: str
    run: str
    limit: int  # seconds
    what: str
    command: tuple[str, ...]
    small: tuple[str, ...] = ()  # arguments added for the rehearsal on a CPU
    fresh: bool = False  # with empty compilation caches
    always: bool = False  # in every call, since what it makes is not kept on the machine

    def filled(self, out: Path, scratch: Path, seconds: float, small: float = 0.0) -> list[str]:
        """The command line with its folders and the time after which it begins nothing new.

        `small` is how many times slower than a quiet one the CPU is that rehearses it, 0 on a GPU.
        """
        values = {"out": out, "scratch": scratch, "seconds": int(seconds - MARGIN), "step": f"{SMALL_STEP * small:.0f}"}
        parts = (*self.command, *(self.small if small else ()))
        return [sys.executable, *(part.format(**values) for part in parts)]


SMALL = ("--device", "cpu", "--suite", "rehearsal", "--rounds", "1", "--longest", "{step}")
SMALL_STEP = 6  # seconds that a step of the rehearsal may take on a quiet machine
# A fault of each kind is planted among these in the rehearsal.
PLANTED = "tuned_eager,library,eager,native,eager_recompute,native_recompute,eager_project_first"


def _bench(
    name: str, run: str, limit: int, what: str, arguments: str, small: str = "", csv: str = "bench", fresh: bool = False
) -> Section:
    command = (
        "-m bench.run --device cuda --csv {out}/" + csv + ".csv --resume --seconds {seconds} --tests {out}/gate.csv"
    )
    return Section(
        name, run, limit, what, (*command.split(), "--under-way", "{scratch}/under-way.json", *arguments.split()),
        (*SMALL, *small.split()), fresh,
    )  # fmt: skip


def _tests(name: str, limit: int, what: str, wanted: str, small: str) -> Section:
    paths = sorted((ROOT / "tests" / "kernels").glob("test_*.py"))
    marked = [str(path.relative_to(ROOT)) for path in paths if "mark.gpu" in path.read_text()]
    command = ["-m", "pytest", *marked, "-m", "gpu", "-q", "--maxfail=30", "-p", "no:cacheprovider"]
    command += ["-p", "tools.gpu.gate", "--gate", "{out}/gate.csv", "--section", name]
    command += ["--under-way", "{scratch}/under-way.json"]
    # Most of the time is the compilation of kernels, which pytest-xdist does side by side.
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    added = ["-k", small, "--longest", "{step}"]
    if importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout", str(TEST_SECONDS), "--timeout-method", "thread"]
        added += ["--timeout", "{step}"]
    return Section(name, "a", limit, what, (*command, "-k", wanted), tuple(added))


def _tune(images: int, limit: int) -> Section:
    command = f"-m bench.tune --suite images-{images} --most 8 --out {{out}} --seconds {{seconds}}"
    return Section(
        f"tune-{images}", "b", limit, f"configs and plans for {images} images per call, into the table",
        (*command.split(), "--under-way", "{scratch}/under-way.json"),
        (*SMALL, "--most", "2", "--workers", "2", "--kernels", "fc2"),
    )  # fmt: skip


def _check(tool: str) -> Section:
    command = ("-m", "tools.compute_sanitizer", tool)
    return Section(tool, "c", 40, f"compute-sanitizer's {tool} on the compiled kernels", command)


_OURS = "eager,native,triton,triton_graph"
_COMPILE = f"--directions forward --variants {_OURS},compile,compile_no_graphs,compile_tapped"
_SMALL_COMPILE = "--variants eager,compile_no_graphs --longest 300"
_FEW = "--variants library,eager,native,triton --directions forward"
_FEWER = "--variants eager,native --directions forward"
_NARROW = "--variants tapped_eager,library,eager,native,triton,triton_single_pass,triton_sample_first"
SECTIONS = (
    Section(
        "build", "a", 120, "csrc for this GPU: a library that is there, else by nvcc and CUTLASS's headers",
        ("-m", "tools.build_cuda", "--out", "{out}"), always=True,
    ),
    _tests("smoke", 60, "every backend on the real shape, by every plan", "real_shape", "real_shape"),
    _tests(
        "matrix", 240, "every backend over the case matrix; plans, layouts, frozen inputs, streams, graphs",
        "not real_shape", "planted or (test_matrix and float32 and closed_gate)",
    ),
    _bench(
        "bench-8-untuned", "a", 180, "8 images, hidden 1024, without the tuned table",
        "--suite images-8 --untuned", f"--variants {PLANTED}",
    ),
    _tune(8, 150),
    _bench("bench-8", "b", 180, "8 images", "--suite images-8", _FEW),
    _tune(1, 45),
    _bench("bench-1", "b", 60, "1 image", "--suite images-1", _FEW),
    _tune(32, 45),
    _bench("bench-32", "b", 60, "32 images", "--suite images-32", _FEW),
    _bench(
        "compile-8", "c", 180, "two shapes of 8 images through torch.compile",
        f"--suite images-8 --only 768-stage4,1536-stage1 {_COMPILE}", _SMALL_COMPILE,
    ),
    _bench(
        "crop-resize", "c", 40, "crop_resize alone, the kernels also in CUDA graphs",
        "--suite images-8 --operation crop_resize", "--variants eager,native,triton",
    ),
    _bench(
        "gemm", "c", 40, "fc1 and fc2 with epilogues against plain products", "--suite images-8 --operation gemm",
    ),
    _bench(
        "tower", "c", 160, "the vision tower's forward pass and a training step",
        "--suite fila-llama3-8b --operation tower", "--suite tiny --variants fusion_native --directions forward",
    ),
    *(_check(tool) for tool in ("memcheck", "racecheck", "initcheck")),
    _bench("hidden-4096", "more", 240, "hidden 4096", "--suite hidden-4096-images-8,hidden-4096-images-1", _FEWER),
    _bench("hidden-4096-32", "more", 240, "hidden 4096, 32 images", "--suite hidden-4096-images-32", _FEWER),
    _bench("narrow", "more", 120, "widths of 512: one launch against several", f"--suite narrow {_NARROW}", _FEWER),
    _bench("float32", "more", 120, "float32, the widest and the largest map", "--suite float32", _FEWER),
    _bench(
        "also", "more", 240, "other dtypes, widths, grids; frozen features",
        "--suite float16,widths,grids,no-prefix,one-tile,frozen", _FEWER,
    ),
    _bench(
        "first-call", "more", 240, "first calls with empty compilation caches",
        "--suite images-8 --rounds 3 --only 1536-stage1,768-stage4 --variants eager,native,triton,compile_no_graphs",
        _FEWER, csv="first_call", fresh=True,
    ),
    *(
        _bench(
            f"compile-{images}-all", "more", 480, f"{images} images through torch.compile",
            f"--suite images-{images} {_COMPILE}", _SMALL_COMPILE,
        )
        for images in (8, 1, 32)
    ),
)  # fmt: skip
