"""Tests the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: `make test-sanitize`.

Builds the library and csrc/tests with both sanitizers (into build/sanitize), then runs the C++ tests,
tests/kernels/test_native.py and part of the fuzz over that library. Faults planted in C++ and in
Python show that the sanitizers find them.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.cuda_units import find_tool  # noqa: E402

BUILD = ROOT / "build" / "sanitize"
LIBRARY = BUILD / "libfila_kernels.so"
FUZZED_CALLS = 10000

# The tests then load the library that was just built. Leaks are not looked for: Python keeps much until it ends.
USE_LIBRARY = (
    "import pathlib, sys; from fila_kernels.backends.native import library; "
    "library.LIBRARY = pathlib.Path(sys.argv.pop(1)); "
)
RUN_PYTEST = USE_LIBRARY + "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
RUN_SCRIPT = USE_LIBRARY + "import runpy; sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
# A map in memory that was given back.
FREED_MAP = """
import ctypes, sys, torch
torch.ops.load_library(sys.argv[1])
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
address = libc.malloc(4 * 4 * 8 * 4)
maps = torch.frombuffer((ctypes.c_float * 128).from_address(address), dtype=torch.float32).view(1, 4, 4, 8)
libc.free(address)
torch.ops.fila.crop_resize(maps, torch.tensor([[0.0, 0.0, 4.0, 4.0]]), torch.tensor([0]), 2)
print("nobody saw it")
"""


def tool(name: str) -> str:
    path = find_tool(name)
    if path is None:
        raise SystemExit(f"error: {name} was not found")
    return path


def run(*command: str | Path, **variables: str) -> None:
    print("$", *command, flush=True)
    status = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, check=False).returncode
    if status != 0:
        raise SystemExit(f"error: exit status {status} from {command[0]}")


def build() -> None:
    import torch

    folder = Path(torch.__file__).parent
    options = [f"-DFILA_TORCH_DIR={folder}", "-DFILA_SANITIZE=ON", "-DFILA_BUILD_TESTS=ON"]
    run(tool("cmake"), "-S", ROOT, "-B", BUILD, *options)
    run(tool("cmake"), "--build", BUILD, "-j", str(min(os.cpu_count() or 1, 8)))


def preloaded() -> dict[str, str]:
    """The sanitizers' run-time libraries come first in a process that was not built with them; so does the C++ library,
    since they look for its exceptions when they start."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or tool("c++")
    found = [
        subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    missing = [name for name in found if not Path(name).is_absolute()]
    if missing:
        raise SystemExit(f"error: {compiler} has no {', '.join(missing)}; install GCC's sanitizers or set CXX=g++")
    return {
        "LD_PRELOAD": " ".join(os.path.realpath(name) for name in found),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
    }


def main() -> int:
    build()
    run(tool("ctest"), "--test-dir", BUILD, "--output-on-failure", ASAN_OPTIONS="detect_leaks=0")

    environment = preloaded()
    done = subprocess.run(
        [sys.executable, "-c", FREED_MAP, LIBRARY],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode == 0 or "heap-use-after-free" not in done.stderr:
        raise SystemExit(f"error: a planted fault was not seen\n{done.stdout}\n{done.stderr[-3000:]}")
    print("a planted read of freed memory was seen", flush=True)

    # The fuzz follows by itself; opcheck is about torch, and the symbols are those of a build without sanitizers.
    select = ["-q", "-p", "no:cacheprovider", "-k", "not ten_thousand and not opcheck and not symbols"]
    run(sys.executable, "-c", RUN_PYTEST, LIBRARY, "tests/kernels/test_native.py", *select, **environment)
    run(
        sys.executable, "-c", RUN_SCRIPT, LIBRARY, "tests/kernels/fuzz_native.py", str(FUZZED_CALLS), "1", **environment
    )
    print("test-sanitize: nothing found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
