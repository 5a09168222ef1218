"""Runs the compiled CUDA kernels on tiny shapes under NVIDIA's compute-sanitizer.

    python -m tools.compute_sanitizer memcheck|racecheck|initcheck

Every kernel runs forward and backward on aligned and odd sizes, each tensor in an allocation of its own. memcheck and
racecheck look at our kernels alone. initcheck has to see every write, so it looks at all kernels, and runs only what
reads nothing that a library computed. Where compute-sanitizer or the native backend's CUDA kernels are missing the
script says so and exits with 69. (`tools/sanitize.py` is about the CPU build.)
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from bench.variants import backend_obstacle
from fila_kernels import crop_resize, cvfm, dispatch
from fila_kernels.call import PLANS

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck", "initcheck")
# Tiles, images, grid side, D, H, C, map height and width: aligned for vectors and copy engines, odd, and wide.
SHAPES = ((3, 2, 4, 64, 128, 32, 10, 12), (2, 1, 3, 64, 64, 7, 9, 5), (2, 1, 4, 1024, 1024, 32, 6, 6))


def program() -> str | None:
    """compute-sanitizer, on PATH or in a CUDA toolkit."""
    folders = [f"{folder}/bin" for folder in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if folder]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def inputs(shape: tuple[int, ...], dtype: torch.dtype, prefix: int) -> dict[str, Tensor]:
    """Arguments of `cvfm`, made on the CPU and copied: initcheck counts a copy as a write."""
    tiles, images, grid, width, hidden, channels, height, columns = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return (torch.randn(*sizes, generator=generator) / 4).to(dtype).cuda()

    corner = torch.rand(tiles, 2, generator=generator) * torch.tensor([height, columns]) * 0.5
    return {
        "tokens": normal(tiles, prefix + grid * grid, width),
        "features": normal(images, height, columns, channels),
        "boxes": torch.cat([corner, corner + 1 + corner.flip(0)], dim=1).cuda(),
        "image_index": (torch.arange(tiles) % images).cuda(),
        "fc1_weight": normal(hidden, width + channels), "fc1_bias": normal(hidden),
        "fc2_weight": normal(width, hidden), "fc2_bias": normal(width),
        "alpha": torch.tensor([0.7], dtype=dtype).cuda(),
    }  # fmt: skip


def plans(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[str]:
    """The plans that the backend has for a shape on this GPU."""
    for plan in PLANS:
        try:
            dispatch.resolve("native", plan, torch.device("cuda", 0), dtype, (shape[3], shape[4]))
        except RuntimeError:
            continue
        yield plan


def run(tool: str) -> int:
    """Call everything; the number of calls."""
    calls = 0
    # fc1 computes whole tiles of rows, and throws away those of prefix tokens, whose samples nobody wrote. That is what
    # initcheck looks for, so that it gets no prefix token.
    prefix = 0 if tool == "initcheck" else 1
    for shape in SHAPES:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            arguments = inputs(shape, dtype, prefix)
            places = (arguments["boxes"], arguments["image_index"])
            features = arguments["features"]
            sampled = crop_resize(features, *places, shape[2], backend="native")
            torch.ops.fila.crop_resize_backward(sampled, *places, *features.shape[:3], check_values=False)
            calls += 2
            for plan in plans(shape, dtype):
                settings = {"num_prefix_tokens": prefix, "plan": plan, "backend": "native"}
                if tool != "initcheck":
                    leaves = {
                        n: t.detach().requires_grad_() if t.is_floating_point() and n != "boxes" else t
                        for n, t in arguments.items()
                    }
                    cvfm(**leaves, **settings).float().sum().backward()
                    calls += 2
                elif plan != "project_first" and dtype != torch.float32:
                    cvfm(**arguments, **settings)
                    calls += 1
    torch.cuda.synchronize()
    return calls


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("--inside", action="store_true", help="make the calls; the sanitizer is around them")
    options = parser.parse_args()
    if options.inside:
        print(f"{run(options.tool)} calls")
        return 0
    found = program()
    obstacle = backend_obstacle("native", torch.device("cuda")) or ("" if found else "compute-sanitizer was not found")
    if found is None or obstacle:
        print(f"skipped: {obstacle}")
        return os.EX_UNAVAILABLE
    command = [found, "--tool", options.tool, "--error-exitcode", "1"]
    if options.tool != "initcheck":
        command += ["--kernel-name", "kernel_substring=fila"]
    command += [sys.executable, "-m", "tools.compute_sanitizer", options.tool, "--inside"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
