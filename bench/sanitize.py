"""The compiled CUDA kernels under compute-sanitizer, on tiny shapes.

    python -m bench.sanitize memcheck|racecheck|initcheck

Every kernel runs forward and backward on aligned and odd sizes, each tensor in an allocation of its own. Where
compute-sanitizer or the backend `native` is missing it says so and exits with 69. memcheck and racecheck look at our
kernels; initcheck has to see every write, so it looks at all, and runs only what reads nothing that a library computed.
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

from fila_kernels import crop_resize, cvfm, dispatch

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck", "initcheck")
# Tiles, images, grid side, D, H, C, map height and width: one that vectors and copy engines take, one that they do not.
SHAPES = ((3, 2, 4, 64, 128, 32, 10, 12), (2, 1, 3, 64, 64, 7, 9, 5))


def sanitizer() -> str | None:
    """compute-sanitizer, on PATH or in a CUDA toolkit."""
    folders = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    found = (
        shutil.which(name) for name in ("compute-sanitizer", *(f"{f}/bin/compute-sanitizer" for f in folders if f))
    )
    return next((path for path in found if path), None)


def prefix(tool: str) -> int:
    """Prefix tokens a tile.

    None under initcheck: fc1 takes whole tiles of rows, and those of prefix tokens are computed from samples that were
    allocated and never written, then thrown away. That costs less than writing them, but is what initcheck looks for.
    """
    return 0 if tool == "initcheck" else 1


def inputs(shape: tuple[int, ...], dtype: torch.dtype, prefix: int) -> dict[str, Tensor]:
    """Arguments of `cvfm`, made on the CPU and copied: a copy counts as a write that initcheck sees."""
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
    for plan in ("sample_first", "project_first", "single_pass"):
        try:
            dispatch.resolve("native", plan, torch.device("cuda", 0), dtype, (shape[3], shape[4]))
        except RuntimeError:
            continue
        yield plan


def run(tool: str) -> int:
    """Call everything; the number of calls."""
    calls = 0
    wide = ((2, 1, 4, 1024, 1024, 32, 6, 6),)
    for shape in SHAPES + wide:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            arguments = inputs(shape, dtype, prefix(tool))
            sampled = torch.ops.fila.crop_resize(
                arguments["features"], arguments["boxes"], arguments["image_index"], shape[2], check_values=False
            )
            torch.ops.fila.crop_resize_backward(
                sampled, arguments["boxes"], arguments["image_index"], *arguments["features"].shape[:3],
                check_values=False,
            )  # fmt: skip
            calls += 2
            for plan in plans(shape, dtype):
                if tool != "initcheck":
                    leaves = {n: t.requires_grad_() if t.is_floating_point() and n != "boxes" else t
                              for n, t in inputs(shape, dtype, prefix(tool)).items()}  # fmt: skip
                    cvfm(**leaves, num_prefix_tokens=prefix(tool), plan=plan, backend="native").float().sum().backward()
                    calls += 2
                elif plan != "project_first" and dtype != torch.float32:
                    cvfm(**arguments, num_prefix_tokens=prefix(tool), plan=plan, backend="native")
                    calls += 1
    crop_resize(*(arguments[name] for name in ("features", "boxes", "image_index")), 4, backend="native")
    torch.cuda.synchronize()
    return calls + 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sanitize", description=__doc__.splitlines()[0])
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("--inside", action="store_true", help="make the calls; the sanitizer is around them")
    options = parser.parse_args()
    if options.inside:
        print(f"{run(options.tool)} calls")
        return 0
    usable, reason = dispatch.available("native", torch.device("cuda", 0))
    program = sanitizer()
    if program is None or not usable:
        print(f"skipped: {'compute-sanitizer was not found' if usable else reason}")
        return os.EX_UNAVAILABLE
    command = [program, "--tool", options.tool, "--error-exitcode", "1"]
    if options.tool != "initcheck":
        command += ["--kernel-name", "kernel_substring=fila"]
    command += [sys.executable, "-m", "bench.sanitize", options.tool, "--inside"]
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.run(command, cwd=ROOT, env=os.environ | variables, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
