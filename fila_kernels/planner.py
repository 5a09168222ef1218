"""Which of the exact ways to compute the operation is used, decided from shapes, dtype and device alone."""

from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch

from fila_kernels import tuned
from fila_kernels.call import DIRECTIONS, TRITON_SINGLE_PASS_WIDTH, UNMEASURED, Plan, Shape


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
# A ratio typical of recent GPUs, not measured; a device's tuned table goes before it.
GPU_RATES = Rates(400e12, 2e12)


def rates(dtype: torch.dtype, device: torch.device) -> Rates:
    return CPU_RATES[dtype] if device.type == "cpu" else GPU_RATES


def _moved(shape: Shape, plan: str, direction: str) -> int:
    """Elements that gathers move: four taps read for each sample, and what is written beside the results.

    Sample-first gathers rows of C, project-first rows of H; going back, one row is written for each cell.
    """
    samples, cells = shape.samples, shape.cells
    if plan == "sample_first":
        width = shape.feature_width
        written = {"forward": samples, "weight_gradient": samples, "feature_gradient": samples}
    else:
        width = shape.hidden_width
        written = {"forward": samples + cells, "weight_gradient": cells, "feature_gradient": cells}
    return (4 * samples + written[direction]) * width


def _seconds(shape: Shape, plan: str, direction: str, dtype: torch.dtype, device: torch.device) -> float:
    """Time of the parts in which the plans differ: the GEMM of the features' half of fc1, and the gathers."""
    rate = rates(dtype, device)
    rows = shape.samples if plan == "sample_first" else shape.cells
    gemm = 2 * rows * shape.feature_width * shape.hidden_width / rate.flops
    return gemm + _moved(shape, plan, direction) * dtype.itemsize / rate.bytes


@cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@lru_cache(maxsize=1024)
def _by_cost(shape: Shape, dtype: torch.dtype, device: torch.device) -> Plan:
    """What the cost model prefers; asked at every call of a device that was never tuned."""
    chosen, reasons = {}, {}
    for direction in DIRECTIONS:
        cost = {plan: _seconds(shape, plan, direction, dtype, device) for plan in ("sample_first", "project_first")}
        chosen[direction] = min(cost, key=cost.__getitem__)
        reasons[direction] = (
            f"cost model: sample_first {cost['sample_first'] * 1e3:.2f} ms for {shape.samples} samples, "
            f"project_first {cost['project_first'] * 1e3:.2f} ms for {shape.cells} cells"
        )
    return Plan(chosen["forward"], chosen["weight_gradient"], chosen["feature_gradient"], reasons)


@cache
def _requested(plan: str) -> Plan:
    chosen = dict.fromkeys(DIRECTIONS, plan)
    reasons = dict.fromkeys(DIRECTIONS, "requested by the caller")
    if plan == "single_pass":
        for direction in DIRECTIONS[1:]:
            chosen[direction] = "sample_first"
            reasons[direction] = "single_pass is a plan of the forward pass; its gradients sample first"
    return Plan(chosen["forward"], chosen["weight_gradient"], chosen["feature_gradient"], reasons)


def choose(
    shape: Shape, dtype: torch.dtype, device: torch.device, requested: str | None = None, backend: str = "torch"
) -> Plan:
    """The plan for each direction: `requested`, else the tuned table's nearest entry, else the cost model's."""
    table = tuned.load(_device_name(device)) if backend == "triton" else None
    configs = UNMEASURED if table is None else table.configs(dtype)
    if requested:
        return replace(_requested(requested), configs=configs)
    measured = None if table is None else table.plan(shape, dtype)
    if measured is not None and "single_pass" in measured[0].values():
        # An entry half as wide is near, and what it measured cannot run here.
        measured = measured if max(shape.token_width, shape.hidden_width) <= TRITON_SINGLE_PASS_WIDTH else None
    if measured is None:
        return replace(_by_cost(shape, dtype, device), configs=configs)
    plans, exact = measured
    reason = f"tuned table of {_device_name(device)}: " + ("measured" if exact else "nearest entry")
    reasons = dict.fromkeys(DIRECTIONS, reason)
    return Plan(plans["forward"], plans["weight_gradient"], plans["feature_gradient"], reasons, configs)
