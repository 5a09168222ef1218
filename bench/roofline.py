"""Measures the roof of the device in the same run, and counts the floor of a workload: its unavoidable work.

The roof has two edges: the byte rate of a large copy (read and written both counted) and the rate of operations in a
square matrix product, 8192 on a side on a GPU. The floor of a workload is the larger of its FLOPs at the one rate and
its bytes at the other, for whichever exact way comes out lowest.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bench.engine import Runner, in_turns, quantile
from bench.workloads import DTYPES, Work, Workload

ROOF_SIZES = {"cuda": (2**30, 8192), "cpu": (2**27, 1024)}  # bytes of the copied buffer, side of the product


@dataclass(frozen=True)
class Roof:
    """Measured ceilings: bytes per second, and floating point operations per second in one dtype."""

    bytes: float
    flops: float

    def seconds(self, work: Work) -> float:
        return max(work.flops / self.flops, work.bytes / self.bytes)

    def floor(self, ways: Sequence[Work]) -> Work:
        """The way that the roof lets finish first."""
        return min(ways, key=self.seconds)


@functools.cache
def measure_roof(
    dtype: torch.dtype,
    device: torch.device,
    clock: str = "wall",
    sizes: tuple[int, int] | None = None,
    rounds: int = 10,
) -> Roof:
    """The device's copy bandwidth and matrix rate on random data, since zeros are faster; once per process.

    The clock must be that of the contestants: on a busy machine the wall's makes a low roof.
    """
    copied, side = sizes or ROOF_SIZES[device.type]
    source = torch.randint(0, 255, (copied,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(side, side, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    runners = {
        "copy": Runner([lambda: target.copy_(source)], device, clock),
        "product": Runner([lambda: torch.mm(left, right, out=out)], device, clock),
    }
    seconds = {name: quantile(taken, 0.5) for name, taken in in_turns(runners, rounds).items()}
    return Roof(2 * copied / seconds["copy"], 2 * side**3 / seconds["product"])


def cvfm_works(workload: Workload, direction: str) -> list[Work]:
    """The exact ways worth considering: activations kept for the backward pass, or computed again there.

    Resizing commutes with the pointwise first layer, so that its features' half costs one row per sample or one per
    cell, whichever are fewer.
    """
    size = DTYPES[workload.dtype].itemsize
    d, h, c = workload.token_width, workload.hidden_width, workload.channels
    samples, cells = workload.samples, workload.images * workload.side**2
    projected = 2 * min(samples, cells) * c * h  # the features' half of fc1, in any direction
    square = 2 * samples * d * h  # one GEMM between D and H
    forward = Work(2 * square + projected, workload.work().bytes)
    if direction == "forward":
        return [forward]
    # dA, dW2, dX, dW1x; dW1s and, unless the features are frozen, dF.
    flops = 4 * square + projected * (1 if workload.frozen else 2)
    # dY, X and the weights read, F read for dW1s, dX and the weights' gradients written, all of dF written once.
    maps = workload.cells_read * c + (0 if workload.frozen else cells * c)
    bytes_ = size * (3 * workload.rows * d + maps + 2 * workload.parameters)
    kept = samples * (h + d)  # the hidden activation and the branch, written and read
    return [
        Work(forward.flops + flops, forward.bytes + bytes_ + 2 * size * kept),
        Work(2 * forward.flops + flops, forward.bytes + bytes_),  # both GEMMs of the forward pass once more
    ]


def crop_resize_work(workload: Workload, direction: str) -> Work:
    """`crop_resize` alone: samples and the cells they read; backward, dS read once and all of dF written once."""
    samples = workload.samples * workload.channels
    cells = workload.cells_read if direction == "forward" else workload.images * workload.side**2
    return Work(8 * samples, DTYPES[workload.dtype].itemsize * (samples + cells * workload.channels))


def gemm_work(workload: Workload, part: str) -> Work:
    """The plain product of fc1 ([X ; S] times W1') or fc2 (A times W2') over all rows, prefix tokens included."""
    d, h, rows = workload.token_width, workload.hidden_width, workload.rows
    depth, width = (d + workload.channels, h) if part == "fc1" else (h, d)
    size = DTYPES[workload.dtype].itemsize
    return Work(2 * rows * depth * width, size * (rows * (depth + width) + depth * width))
