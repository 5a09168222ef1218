"""Which of the exact ways to compute the operation is used, decided from shapes, dtype and device alone."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

PLANS = ("sample_first", "project_first", "single_pass")


class Shape(NamedTuple):
    """Sizes of one call: T tiles, P prefix tokens, G grid side, D, H, C widths, B maps of h x w cells."""

    tiles: int
    prefix: int
    grid: int
    token_width: int
    hidden_width: int
    feature_width: int
    images: int
    height: int
    width: int

    @property
    def patches(self) -> int:
        return self.grid * self.grid

    @property
    def samples(self) -> int:
        return self.tiles * self.patches

    @property
    def cells(self) -> int:
        return self.images * self.height * self.width


@dataclass(frozen=True)
class Plan:
    """A plan for each direction, and why."""

    forward: str
    weight_gradient: str
    feature_gradient: str
    reasons: dict[str, str]


@dataclass(frozen=True)
class Rates:
    """What a device does in a second: floating point operations in a GEMM, and bytes moved by row gathers."""

    flops: float
    bytes: float


# Measured on two cores of an AMD EPYC with AVX512 and avx512_bf16.
CPU_RATES = {
    torch.float64: Rates(50e9, 20e9),
    torch.float32: Rates(140e9, 20e9),
    torch.bfloat16: Rates(400e9, 20e9),
    torch.float16: Rates(0.3e9, 20e9),
}
# A ratio typical of recent GPUs; the torch backend is only a fallback there.
GPU_RATES = Rates(400e12, 2e12)


def rates(dtype: torch.dtype, device: torch.device) -> Rates:
    return CPU_RATES[dtype] if device.type == "cpu" else GPU_RATES


def _seconds(shape: Shape, plan: str, dtype: torch.dtype, device: torch.device) -> float:
    """Time of the parts in which the plans differ: the features' half of fc1's GEMM, and the gather of four taps."""
    rate = rates(dtype, device)
    rows, gathered = (
        (shape.samples, shape.feature_width) if plan == "sample_first" else (shape.cells, shape.hidden_width)
    )
    gemm = 2 * rows * shape.feature_width * shape.hidden_width / rate.flops
    # Four taps read and one row written for each sample; the GEMM's own result is read back or written once.
    moved = (5 * shape.samples * gathered + rows * shape.hidden_width) * dtype.itemsize / rate.bytes
    return gemm + moved


def choose(shape: Shape, dtype: torch.dtype, device: torch.device, requested: str | None = None) -> Plan:
    """The plan for every direction; `requested` fixes all of them."""
    if requested:
        why = "requested by the caller"
        return Plan(
            requested, requested, requested, dict.fromkeys(("forward", "weight_gradient", "feature_gradient"), why)
        )
    cost = {plan: _seconds(shape, plan, dtype, device) for plan in ("sample_first", "project_first")}
    best = min(cost, key=cost.__getitem__)
    why = (
        f"cost model: sample_first {cost['sample_first'] * 1e3:.2f} ms for {shape.samples} samples, "
        f"project_first {cost['project_first'] * 1e3:.2f} ms for {shape.cells} cells"
    )
    return Plan(best, best, best, dict.fromkeys(("forward", "weight_gradient", "feature_gradient"), why))
