"""Builds csrc for the GPU that is here, into fila_kernels/lib: what `make gpu` does before it tests anything.

    python -m bench.build_native

Only this GPU's architecture, so that it takes a minute or two; a build that was cut off goes on where it stopped. Where
nvcc or the headers of CUTLASS (CUTLASS_PATH, else the package nvidia-cutlass) are missing it says so and exits with 69:
the backend `native` is then left out.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
# Compute capabilities whose kernels are written for them and no other.
SPECIFIC = {(9, 0), (10, 0)}


def architecture(capability: tuple[int, int]) -> str:
    """As TORCH_CUDA_ARCH_LIST names it: 9.0a for (9, 0)."""
    return f"{capability[0]}.{capability[1]}" + ("a" if capability in SPECIFIC else "")


def missing() -> str | None:
    """What this machine lacks to compile csrc/cuda, or None."""
    try:
        from tools import cuda_units
    except ImportError as error:  # setuptools, say
        return str(error)
    return cuda_units.missing_tool(disassemble=False)


def main() -> int:
    """Exit 0 when built, EX_UNAVAILABLE when skipped, else what the build returned."""
    lacking = missing()
    if lacking:
        print(f"skipped: {lacking}")
        return os.EX_UNAVAILABLE
    name = architecture(torch.cuda.get_device_capability())
    print(f"building csrc for {name}", flush=True)
    variables = {"FILA_KERNELS_BUILD_NATIVE": "1", "FILA_KERNELS_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": name}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    status = subprocess.run(command, cwd=ROOT, env=os.environ | variables, check=False).returncode
    if status == 0:
        from fila_kernels.backends.native import library

        print(library.describe_cuda())
    return status


if __name__ == "__main__":
    sys.exit(main())
