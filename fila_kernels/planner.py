"""Chooses the plan of each direction and the backend of each pass, from shapes, dtype and device alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

import torch

from fila_kernels import dispatch, tuned
from fila_kernels.call import DIRECTIONS, TRITON_SINGLE_PASS_WIDTH, UNMEASURED, Measured, Plan, Shape


@dataclass(frozen=True)
class Rates:
    """A device's throughput per second: floating point operations in a GEMM, and bytes in row gathers."""

    flops: float
    bytes: float


# Measured on two cores of an AMD EPYC with AVX512 and avx512_bf16.
CPU_RATES = {
    torch.float64: Rates(50e9, 20e9),
    torch.float32: Rates(140e9, 20e9),
    torch.bfloat16: Rates(400e9, 20e9),
    torch.float16: Rates(0.3e9, 20e9),
}
# A ratio typical of recent GPUs, not measured; a device's tuned table overrides it.
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


class _Means(NamedTuple):
    """The backend of each pass and the launch configs that carry out a plan."""

    forward_backend: str
    backward_backend: str
    configs: Measured


@lru_cache(maxsize=1024)
def _by_cost(shape: Shape, dtype: torch.dtype, device: torch.device, means: _Means) -> Plan:
    """The plan that the cost model prefers; every call on a device without a tuned table asks for it."""
    chosen, reasons = {}, {}
    for direction in DIRECTIONS:
        cost = {plan: _seconds(shape, plan, direction, dtype, device) for plan in ("sample_first", "project_first")}
        chosen[direction] = min(cost, key=cost.__getitem__)
        reasons[direction] = (
            f"cost model: sample_first {cost['sample_first'] * 1e3:.2f} ms for {shape.samples} samples, "
            f"project_first {cost['project_first'] * 1e3:.2f} ms for {shape.cells} cells"
        )
    return _plan(chosen, reasons, means)


def _plan(chosen: Mapping[str, str], reasons: Mapping[str, str], means: _Means) -> Plan:
    return Plan(chosen["forward"], chosen["weight_gradient"], chosen["feature_gradient"], reasons, *means)


@lru_cache(maxsize=1024)
def _requested(plan: str, means: _Means) -> Plan:
    chosen = dict.fromkeys(DIRECTIONS, plan)
    reasons = dict.fromkeys(DIRECTIONS, "requested by the caller")
    if plan == "single_pass":
        for direction in DIRECTIONS[1:]:
            chosen[direction] = "sample_first"
            reasons[direction] = "single_pass is a plan of the forward pass; its gradients sample first"
    return _plan(chosen, reasons, means)


def choose(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    requested: str | None = None,
    backend: str | None = None,
) -> Plan:
    """The plan of each direction and the backend of each pass.

    A plan is `requested`, else the tuned table's nearest entry, else the cost model's. A backend is the one that was
    named, else the first that can run: `dispatch.resolve`.

    Raises:
        ValueError: for an unknown backend. RuntimeError: if a backend or plan that was asked for cannot run.
    """
    name, _ = dispatch.resolve(backend, requested, device, dtype, (shape.token_width, shape.hidden_width))
    table = tuned.load(_device_name(device)) if name == "triton" else None
    # Both passes go to one backend: tables hold plans and configs, and name none.
    means = _Means(name, name, UNMEASURED if table is None else table.configs(dtype))
    if requested:
        return _requested(requested, means)
    measured = None if table is None else table.plan(shape, dtype)
    if measured is not None and "single_pass" in measured[0].values():
        # An entry half as wide is near, and what it measured cannot run here.
        measured = measured if max(shape.token_width, shape.hidden_width) <= TRITON_SINGLE_PASS_WIDTH else None
    if measured is None:
        return _by_cost(shape, dtype, device, means)
    chosen, exact = measured
    reason = f"tuned table of {_device_name(device)}: " + ("measured" if exact else "nearest entry")
    return _plan(chosen, dict.fromkeys(DIRECTIONS, reason), means)
