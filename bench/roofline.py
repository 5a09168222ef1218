"""What the device can do, measured in the same run, and the least time that a case can take on it.

The roof has two edges: bytes a second of a large copy (read and written both counted) and operations a second of a
square matrix product, 8192 a side on a GPU. The floor of a case is the larger of its FLOPs at the one and its bytes at
the other, for whichever exact plan comes out lowest.
"""

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.cases import DTYPES, Case

ROOF_SIZES = {"cuda": (2**30, 8192), "cpu": (2**27, 1024)}  # bytes of the copied buffer, side of the product


@dataclass(frozen=True)
class Roof:
    """Measured ceilings: bytes a second and floating point operations a second, for one dtype."""

    bytes: float
    flops: float


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes of one way to compute a case."""

    flops: int
    bytes: int

    def seconds(self, roof: Roof) -> float:
        return max(self.flops / roof.flops, self.bytes / roof.bytes)


def _median_seconds(call: Callable[[], object], device: torch.device, rounds: int) -> float:
    call()
    times = []
    for _ in range(rounds):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e-3)
        else:
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def measure_roof(
    dtype: torch.dtype, device: torch.device, sizes: tuple[int, int] | None = None, rounds: int = 10
) -> Roof:
    """The device's copy bandwidth and matrix rate on random data (zeros run faster than real numbers do)."""
    copied, side = sizes or ROOF_SIZES[device.type]
    source = torch.randint(0, 255, (copied,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _median_seconds(functools.partial(target.copy_, source), device, rounds)
    del source, target
    left, right = (torch.randn(side, side, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    product = _median_seconds(lambda: torch.mm(left, right, out=out), device, rounds)
    return Roof(2 * copied / copy, 2 * side**3 / product)


def works(case: Case, direction: str) -> list[Work]:
    """The exact ways worth considering: activations kept for the backward pass, or computed again there.

    Resizing commutes with the pointwise first layer, so that its features' half costs one row for each sample or each
    cell, whichever are fewer.
    """
    size = DTYPES[case.dtype].itemsize
    d, h, c, rows = case.token_width, case.hidden_width, case.channels, case.samples
    tokens = case.tiles * (case.prefix + case.grid**2) * d
    cells = case.images * case.side**2
    sampled = 2 * min(rows, cells) * c * h  # the features' half of fc1, in any direction
    square = 2 * rows * d * h  # one GEMM between D and H
    forward = Work(2 * square + sampled, case.bytes())
    if direction == "forward":
        return [forward]
    # dA, dW2, dX, dW1x; dW1s and, unless the features are frozen, dF.
    backward_flops = 4 * square + sampled * (1 if case.frozen else 2)
    # dY, X and the weights read, F read for dW1s, dX and the weights' gradients written, all of dF written once.
    maps = case.cells_read * c + (0 if case.frozen else cells * c)
    backward_bytes = size * (3 * tokens + maps + 2 * case.parameters)
    kept = rows * (h + d)  # the hidden activation and the branch, written and read
    return [
        Work(forward.flops + backward_flops, forward.bytes + backward_bytes + 2 * size * kept),
        # Both GEMMs of the forward pass once more.
        Work(2 * forward.flops + backward_flops, forward.bytes + backward_bytes),
    ]


def floor(case: Case, direction: str, roof: Roof) -> Work:
    """The work of the way that the roof lets finish first."""
    return min(works(case, direction), key=lambda work: work.seconds(roof))


def crop_resize_work(case: Case, direction: str) -> Work:
    """`crop_resize` alone: samples and the cells they read; backward, dS read once and all of dF written once."""
    size = DTYPES[case.dtype].itemsize
    samples = case.samples * case.channels
    if direction == "forward":
        return Work(8 * samples, size * (samples + case.cells_read * case.channels))
    return Work(8 * samples, size * (samples + case.images * case.side**2 * case.channels))
