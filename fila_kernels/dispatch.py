"""Which backend runs, and why: one resolver, one environment variable, no silent fallback."""

import importlib.util
import os

import torch

from fila_kernels import native
from fila_kernels.call import (
    NATIVE_SINGLE_PASS_CAPABILITY,
    NATIVE_SINGLE_PASS_WIDTH,
    TRITON_SINGLE_PASS_WIDTH,
)

BACKENDS = ("reference", "torch", "triton", "cuda")
ENVIRONMENT_VARIABLE = "FILA_KERNELS_BACKEND"

# Both are settled before Triton is imported, and constant where torch.compile traces.
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
_TRITON_CAPABILITY = (8, 0)


@torch.compiler.assume_constant_result
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _triton_available(device: torch.device | None, dtype: torch.dtype | None) -> tuple[bool, str]:
    if not _TRITON_INSTALLED:
        return False, "the package triton is not installed; use 'torch', which runs on any device"
    if dtype == torch.float64:
        return False, "its kernels compute in float32 and take no float64; use 'torch' or 'reference'"
    if device is None:
        if _TRITON_INTERPRETED:
            return True, "Triton kernels in Triton's interpreter, on CPU tensors"
        if not torch.cuda.is_available():
            return False, "no CUDA device, and TRITON_INTERPRET=1 was not set; use 'torch', which runs on any device"
        device = torch.device("cuda", torch.cuda.current_device())
    if _TRITON_INTERPRETED:
        return True, f"Triton kernels in Triton's interpreter, on {device.type} tensors"
    if device.type != "cuda":
        return False, (
            f"its kernels run on CUDA tensors, these are on {device.type}; use 'torch', or set TRITON_INTERPRET=1 "
            "before the start to interpret the kernels"
        )
    if not torch.cuda.is_available():
        return False, "no CUDA device"
    capability = _capability(device.index)
    if capability < _TRITON_CAPABILITY:
        return False, f"it needs compute capability 8.0, {device} has {capability[0]}.{capability[1]}; use 'torch'"
    return True, "fused Triton kernels: NVIDIA GPUs of compute capability 8.0 and above"


# What the native library says about itself, in values that torch.compile can hold.
@torch.compiler.assume_constant_result
def _cuda_kernels() -> tuple[bool, str]:
    build = native.build()
    return build is not None and bool(build.architectures), native.describe_cuda()


@torch.compiler.assume_constant_result
def _cuda_runs_on(major: int, minor: int) -> bool:
    build = native.build()
    return build is not None and build.runs_on((major, minor))


@torch.compiler.assume_constant_result
def _cuda_has_single_pass() -> bool:
    build = native.build()
    return build is not None and any(name.startswith("9.0a") for name in build.architectures)


def _cuda_available(device: torch.device | None, dtype: torch.dtype | None) -> tuple[bool, str]:
    compiled, description = _cuda_kernels()
    if not compiled:
        return False, f"{description}; use 'torch', which runs on any device"
    if dtype == torch.float64:
        return False, "its kernels compute in float32 and take no float64; use 'torch' or 'reference'"
    if device is not None and device.type != "cuda":
        return False, f"its kernels run on CUDA tensors, these are on {device.type}; use 'torch'"
    if not torch.cuda.is_available():
        return False, f"no CUDA device for the {description}; use 'torch', which runs on any device"
    device = device or torch.device("cuda", torch.cuda.current_device())
    capability = _capability(device.index)
    if not _cuda_runs_on(*capability):
        return False, (
            f"it has {description}, and {device} has compute capability {capability[0]}.{capability[1]}; "
            "TORCH_CUDA_ARCH_LIST names others when it is built"
        )
    return True, f"{description}; products of float32, and of widths that are no multiples of 8, are PyTorch's"


def available(backend: str, device: torch.device | None = None, dtype: torch.dtype | None = None) -> tuple[bool, str]:
    """Whether `backend` can run here, or on tensors of a device and dtype, and why or why not."""
    if backend not in BACKENDS:
        return False, f"unknown; the backends are {', '.join(BACKENDS)}"
    if backend == "triton":
        return _triton_available(device, dtype)
    if backend == "cuda":
        return _cuda_available(device, dtype)
    if backend == "reference":
        return True, "the definition in plain PyTorch: any device, slow, keeps every intermediate for autograd"
    return True, "PyTorch calls with planned order and a gathering backward: any device"


def _default(device: torch.device | None, dtype: torch.dtype | None) -> tuple[str, str]:
    """The fused kernels for CUDA tensors where they can run, else PyTorch calls."""
    if device is not None and device.type == "cuda":
        usable, reason = _triton_available(device, dtype)
        return ("triton", f"default; {reason}") if usable else ("torch", f"default, since triton cannot run: {reason}")
    return "torch", f"default; {available('torch')[1]}"


def _single_pass_obstacle(
    backend: str, device: torch.device | None, dtype: torch.dtype | None, widths: tuple[int, int] | None
) -> str:
    """Why the one fused kernel cannot run, or ""."""
    if backend == "triton":
        if widths is not None and max(widths) > TRITON_SINGLE_PASS_WIDTH:
            return (
                f"expected token and hidden widths of at most {TRITON_SINGLE_PASS_WIDTH}, which stay on chip, "
                f"got {max(widths)}"
            )
        return ""
    if backend != "cuda":
        return "it is one fused kernel, which only the backends 'triton' and 'cuda' have"
    if dtype not in (torch.bfloat16, torch.float16, None):
        return f"its kernel multiplies bfloat16 and float16, got {dtype}"
    if widths is not None and widths != (NATIVE_SINGLE_PASS_WIDTH, NATIVE_SINGLE_PASS_WIDTH):
        return f"expected token and hidden widths of {NATIVE_SINGLE_PASS_WIDTH}, got {widths[0]} and {widths[1]}"
    capability = NATIVE_SINGLE_PASS_CAPABILITY if device is None else _capability(device.index)
    if capability != NATIVE_SINGLE_PASS_CAPABILITY or not _cuda_has_single_pass():
        return "its kernel is for compute capability 9.0, compiled as 9.0a"
    return ""


def resolve(
    backend: str | None = None,
    plan: str | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    widths: tuple[int, int] | None = None,
) -> tuple[str, str]:
    """The backend to use and the reason.

    Args:
        backend: a name, or None or "auto" for the environment variable `FILA_KERNELS_BACKEND`, else the default.
        plan: a requested plan, which the backend has to offer.
        device, dtype: of the tensors; None asks about this machine in general.
        widths: of tokens and hidden activation, which the plan "single_pass" has to hold on chip.

    Raises:
        ValueError: for an unknown name. RuntimeError: if a backend or plan that was asked for by name cannot run.
    """
    if backend in (None, "auto"):
        named = os.environ.get(ENVIRONMENT_VARIABLE) or None
        source = f"set by {ENVIRONMENT_VARIABLE}"
        if named in (None, "auto"):
            named, source = _default(device, dtype)
    else:
        named, source = backend, "requested by the caller"
    if named not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)} or 'auto', got {named!r} ({source})")
    usable, reason = available(named, device, dtype)
    if not usable:
        raise RuntimeError(f"backend {named!r} ({source}) cannot run: {reason}")
    if plan == "single_pass":
        obstacle = _single_pass_obstacle(named, device, dtype, widths)
        if obstacle:
            raise RuntimeError(
                f"plan 'single_pass' cannot run on backend {named!r}: {obstacle}; use 'sample_first', 'project_first' "
                "or None"
            )
    return named, source


def backend_report() -> dict[str, dict[str, object]]:
    """For each backend whether it is available and why."""
    return {name: dict(zip(("available", "reason"), available(name), strict=True)) for name in BACKENDS}
