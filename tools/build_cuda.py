"""Builds csrc for this machine's GPU into fila_kernels/lib; `make gpu` does so before it tests anything.

    python -m tools.build_cuda

Only this GPU's architecture is built, which takes a minute or two; a build that was cut off goes on where it stopped.
Where nvcc or the headers of CUTLASS (CUTLASS_PATH, else the package nvidia-cutlass) are missing it says so and exits
with 69, and the native backend stays on the CPU.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch

from tools import cuda_units

ROOT = Path(__file__).resolve().parent.parent
SPECIFIC = {(9, 0), (10, 0)}  # compute capabilities with kernels of their own


def main() -> int:
    """Exit 0 when built, EX_UNAVAILABLE when skipped, else with what the build returned."""
    lacking = cuda_units.missing_tool(disassemble=False)
    if lacking:
        print(f"skipped: {lacking}")
        return os.EX_UNAVAILABLE
    major, minor = torch.cuda.get_device_capability()
    architecture = f"{major}.{minor}" + ("a" if (major, minor) in SPECIFIC else "")
    print(f"building csrc for {architecture}", flush=True)
    variables = {"FILA_KERNELS_BUILD_NATIVE": "1", "FILA_KERNELS_BUILD_CUDA": "1"}
    variables["TORCH_CUDA_ARCH_LIST"] = architecture
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    status = subprocess.run(command, cwd=ROOT, env=os.environ | variables, check=False).returncode
    if status == 0:
        subprocess.run([sys.executable, "-m", "fila_kernels.info"], cwd=ROOT, check=False)
    return status


if __name__ == "__main__":
    sys.exit(main())
