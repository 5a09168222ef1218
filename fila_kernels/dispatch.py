"""Finds the backends that can run a call, in the order in which they are tried, and why the others cannot.

    auto, CUDA tensors      triton, native, eager: the first that can run
    auto, other tensors     native, eager
    a name                  that backend, or an error with the reason why it cannot run

`FILA_KERNELS_BACKEND` names the backend of calls that name none.
"""

import importlib.util
import os
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fila_kernels.backends import eager, native
from fila_kernels.backends.native import library
from fila_kernels.call import (
    NATIVE_SINGLE_PASS_CAPABILITY,
    NATIVE_SINGLE_PASS_WIDTH,
    TRITON_SINGLE_PASS_WIDTH,
    Call,
    Needs,
)

BACKENDS = ("reference", "eager", "native", "triton")
AUTO = "auto"
ENVIRONMENT_VARIABLE = "FILA_KERNELS_BACKEND"

# Both are settled before Triton is imported.
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
_TRITON_CAPABILITY = (8, 0)
# The tiles that a compute capability falls back to, by its first number; "" for those with tiles of their own.
_TRITON_PATHS = {8: "", 9: "", 10: "", 11: "10.0"}

Widths = tuple[int, int]  # of tokens and hidden activation


class Backend(Protocol):
    """Functions of every backend's module; a new backend enters `BACKENDS`, `_ORDER`, `available`, `implementation`."""

    def crop_resize(self, features: Tensor, boxes: Tensor, image_index: Tensor, size: int) -> Tensor: ...

    def crop_resize_backward(
        self, grad: Tensor, boxes: Tensor, image_index: Tensor, maps: tuple[int, int, int]
    ) -> Tensor: ...

    def forward(self, call: Call, hidden: Tensor | None, branch: Tensor | None) -> Tensor: ...

    def backward(
        self, call: Call, grad: Tensor, hidden: Tensor | None, branch: Tensor | None, needs: Needs
    ) -> list[Tensor | None]: ...


class Candidates(NamedTuple):
    """The backends that can run, in the order in which they are tried, and for every backend why or why not."""

    names: tuple[str, ...]
    reasons: dict[str, str]


def implementation(name: str) -> Backend:
    """The module of a backend other than the definition."""
    if name == "triton":
        from fila_kernels.backends.triton import cvfm  # imports triton, which not every machine has

        return cvfm
    return {"eager": eager, "native": native}[name]


def requested(backend: str | None) -> tuple[str, str]:
    """The name that a call asks for, or "auto", and who said so: the caller or the environment variable.

    Raises:
        ValueError: for an unknown name.
    """
    source = "requested by the caller"
    if backend is None or backend == AUTO:
        backend, source = os.environ.get(ENVIRONMENT_VARIABLE) or AUTO, f"set by {ENVIRONMENT_VARIABLE}"
    if not isinstance(backend, str):  # a list, say, which nothing can look up
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)} or 'auto', got {backend!r}")
    if backend != AUTO and backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)} or 'auto', got {backend!r} ({source})")
    return backend, "default" if backend == AUTO else source


def _triton_available(device: torch.device | None, dtype: torch.dtype | None) -> tuple[bool, str]:
    if not _TRITON_INSTALLED:
        return False, "the package triton is not installed"
    if dtype == torch.float64:
        return False, "its kernels compute in float32 and take no float64"
    if device is None:
        if _TRITON_INTERPRETED:
            return True, "Triton kernels in Triton's interpreter, on CPU tensors"
        if not torch.cuda.is_available():
            return False, "no CUDA device, and TRITON_INTERPRET=1 was not set"
        device = torch.device("cuda", torch.cuda.current_device())
    if _TRITON_INTERPRETED:
        return True, f"Triton kernels in Triton's interpreter, on {device.type} tensors"
    if device.type != "cuda":
        return False, (
            f"its kernels run on CUDA tensors, these are on {device.type}; TRITON_INTERPRET=1, set before the start, "
            "interprets them"
        )
    if not torch.cuda.is_available():
        return False, "no CUDA device"
    capability = torch.cuda.get_device_capability(device.index)
    if capability < _TRITON_CAPABILITY:
        return False, f"it needs compute capability 8.0, {device} has {capability[0]}.{capability[1]}"
    reason = "fused Triton kernels: NVIDIA GPUs of compute capability 8.0 and above"
    path = _TRITON_PATHS.get(capability[0], "8.x")
    if path:
        reason += f"; {capability[0]}.{capability[1]} has no tiles of its own and falls back to those of {path}"
    return True, reason


def _native_available(device: torch.device | None, dtype: torch.dtype | None) -> tuple[bool, str]:
    loaded, reason = library.load()
    if not loaded:
        return False, f"the native library is {reason}"
    if device is None:
        return True, f"compiled kernels for the CPU; {library.describe_cuda()}"
    if device.type == "cpu":
        if dtype not in (*library.CPU_DTYPES, None):
            return False, f"its CPU kernels take float32, bfloat16 and float64, not {dtype}"
        return True, "compiled CPU kernels"
    if device.type != "cuda":
        return False, f"its kernels run on CPU and CUDA tensors, these are on {device.type}"
    description = library.describe_cuda()
    build = library.build()
    if build is None or not build.architectures:
        return False, description
    if dtype == torch.float64:
        return False, "its CUDA kernels compute in float32 and take no float64"
    if not torch.cuda.is_available():
        return False, f"no CUDA device for the {description}"
    capability = torch.cuda.get_device_capability(device.index)
    if not build.runs_on(capability):
        return False, (
            f"it has {description}, and {device} has compute capability {capability[0]}.{capability[1]}; "
            "TORCH_CUDA_ARCH_LIST names others when it is built"
        )
    return True, f"{description}; products of float32, and of widths that are not multiples of 8, are PyTorch's"


def available(backend: str, device: torch.device | None = None, dtype: torch.dtype | None = None) -> tuple[bool, str]:
    """Whether `backend` can run here, or on tensors of a device and dtype, and why or why not."""
    if backend == "triton":
        return _triton_available(device, dtype)
    if backend == "native":
        return _native_available(device, dtype)
    if backend == "eager":
        return True, "PyTorch calls with planned order and a gathering backward: any device"
    if backend == "reference":
        return True, "the definition in plain PyTorch: any device, slow, keeps every intermediate for autograd"
    return False, f"unknown; the backends are {', '.join(BACKENDS)}"


def _single_pass_obstacle(
    backend: str, device: torch.device | None, dtype: torch.dtype | None, widths: Widths | None
) -> str:
    """Why a backend that can run cannot run the one fused kernel, or ""."""
    if backend == "triton":
        if widths is not None and max(widths) > TRITON_SINGLE_PASS_WIDTH:
            return (
                f"expected token and hidden widths of at most {TRITON_SINGLE_PASS_WIDTH}, which stay on chip, "
                f"got {max(widths)}"
            )
        return ""
    if backend != "native" or (device is not None and device.type == "cpu"):
        return "it is one fused kernel, which only 'triton' and, on a GPU, 'native' have"
    if dtype not in (torch.bfloat16, torch.float16, None):
        return f"its kernel multiplies bfloat16 and float16, got {dtype}"
    if widths is not None and widths != (NATIVE_SINGLE_PASS_WIDTH, NATIVE_SINGLE_PASS_WIDTH):
        return f"expected token and hidden widths of {NATIVE_SINGLE_PASS_WIDTH}, got {widths[0]} and {widths[1]}"
    build = library.build()
    compiled = build is not None and any(name.startswith("9.0a") for name in build.architectures)
    there = device is None or torch.cuda.get_device_capability(device.index) == NATIVE_SINGLE_PASS_CAPABILITY
    return "" if compiled and there else "its kernel is for compute capability 9.0, compiled as 9.0a"


def _runs(
    backend: str, plan: str | None, device: torch.device | None, dtype: torch.dtype | None, widths: Widths | None
) -> tuple[bool, str]:
    usable, reason = available(backend, device, dtype)
    if usable and plan == "single_pass":
        obstacle = _single_pass_obstacle(backend, device, dtype, widths)
        if obstacle:
            return False, f"plan 'single_pass': {obstacle}"
    return usable, reason


def _order(device: torch.device | None) -> tuple[str, ...]:
    return ("triton", "native", "eager") if device is not None and device.type == "cuda" else ("native", "eager")


def candidates(
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    plan: str | None = None,
    widths: Widths | None = None,
) -> Candidates:
    """The backends that "auto" chooses from, in its order, and for every backend why it can run or cannot.

    Args:
        device, dtype: of the tensors; None asks about this machine in general.
        plan: a requested plan, which a candidate has to offer.
        widths: of tokens and hidden activation, which the plan "single_pass" has to hold on chip.

    Example:
        >>> candidates(torch.device("cpu"), torch.float16).names
        ('eager',)
    """
    found = {name: _runs(name, plan, device, dtype, widths) for name in BACKENDS}
    names = tuple(name for name in _order(device) if found[name][0])
    return Candidates(names, {name: reason for name, (_, reason) in found.items()})


def resolve(
    backend: str | None = None,
    plan: str | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    widths: Widths | None = None,
) -> tuple[str, str]:
    """The backend to use and the reason. Arguments as in `candidates`.

    Args:
        backend: a name, or None or "auto" for the environment variable `FILA_KERNELS_BACKEND`, else the first
            candidate.

    Raises:
        ValueError: for an unknown name. RuntimeError: if a backend or plan that was asked for by name cannot run.
    """
    name, source = requested(backend)
    tried = _order(device) if name == AUTO else (name,)
    passed = ""
    for candidate in tried:
        usable, reason = _runs(candidate, plan, device, dtype, widths)
        if usable:
            return candidate, f"{source}; {reason}{passed}" if name == AUTO else source
        passed += f"; not {candidate!r}: {reason}"
    if name == AUTO:
        raise RuntimeError(f"no backend can run this{passed}")
    raise RuntimeError(f"backend {name!r} ({source}) cannot run: {reason}")


def backend_report() -> dict[str, dict[str, object]]:
    """For each backend whether it is available and why."""
    return {name: dict(zip(("available", "reason"), available(name), strict=True)) for name in BACKENDS}
