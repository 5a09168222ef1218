"""Gives this machine's GPU a native library of csrc; `make gpu` does so before it tests anything.

    python -m tools.build_cuda --out runs/gpu

A library that was built before for this GPU is taken: the one in `fila_kernels/lib`, or in the results folder. Else it
is built for this GPU's architecture alone, a minute or two on 16 cores, and copied to the results folder. nvcc and the
headers of CUTLASS are needed for that: CUTLASS_PATH, the package nvidia-cutlass, or its wheel in `runs/travel`. Where
they are missing it says so and what to do, and exits with 69: the native backend stays on the CPU.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from bench import files
from tools import cuda_units

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "fila_kernels" / "lib" / "libfila_kernels.so"
TRAVEL = ROOT / "runs" / "travel"
SPECIFIC = {(9, 0), (10, 0)}  # compute capabilities with kernels of their own
ADVICE = """native is skipped on this GPU. To have it, either
  pip download --no-deps -d runs/travel nvidia-cutlass==4.2.0.0   where there is a registry, and take runs/travel (6 MB)
  along to a machine with nvcc, or take along a fila_kernels/lib that was built for this GPU (docs/cuda.md)"""


def runs_here() -> bool:
    """Whether the library has kernels for this GPU, by a process of its own: a library is loaded once."""
    code = (
        "import sys, torch; from fila_kernels import dispatch\n"
        "sys.exit(not dispatch.available('native', torch.device('cuda', 0))[0])"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def headers(folder: Path) -> dict[str, str]:
    """CUTLASS_PATH of the wheel in `runs/travel`, unpacked; nothing where the variable or a package names others."""
    wheels = sorted(TRAVEL.glob("nvidia_cutlass-*.whl"))
    if not wheels or "CUTLASS_PATH" in os.environ:
        return {}
    with zipfile.ZipFile(wheels[-1]) as wheel:
        wheel.extractall(folder, [name for name in wheel.namelist() if "/source/include/" in name])
    return {"CUTLASS_PATH": str(folder / "cutlass_library" / "source")}


def build() -> int:
    major, minor = torch.cuda.get_device_capability()
    architecture = f"{major}.{minor}" + ("a" if (major, minor) in SPECIFIC else "")
    print(f"building csrc for {architecture}", flush=True)
    variables = {"FILA_KERNELS_BUILD_NATIVE": "1", "FILA_KERNELS_BUILD_CUDA": "1"}
    variables["TORCH_CUDA_ARCH_LIST"] = architecture
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=ROOT, env=os.environ | variables, check=False).returncode


def main(arguments: list[str] | None = None) -> int:
    """Exit 0 with a library for this GPU, EX_UNAVAILABLE when skipped, else with the build's own status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="folder of results")
    saved = parser.parse_args(arguments).out / LIBRARY.name
    if not torch.cuda.is_available():
        print("skipped: no CUDA device")
        return os.EX_UNAVAILABLE
    if not runs_here() and saved.exists():
        files.replace(LIBRARY, saved.read_bytes())
    if runs_here():
        print("a library for this GPU was there")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(headers(Path(folder)))
        lacking = cuda_units.missing_tool(disassemble=False)
        if lacking:
            print(f"{ADVICE}\nskipped: {lacking}")
            return os.EX_UNAVAILABLE
        status = build()
    if status == 0:
        saved.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(LIBRARY, saved)
        subprocess.run([sys.executable, "-m", "fila_kernels.info"], cwd=ROOT, check=False)
    return status


if __name__ == "__main__":
    sys.exit(main())
