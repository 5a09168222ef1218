"""Which backend runs, and why: one resolver, one environment variable, no silent fallback."""

import os

BACKENDS = ("reference", "torch", "triton", "cuda")
ENVIRONMENT_VARIABLE = "FILA_KERNELS_BACKEND"

_UNAVAILABLE = {
    "triton": "this version has no Triton kernels; use 'torch', which runs on any device",
    "cuda": "this version has no CUDA kernels; use 'torch', which runs on any device",
}


def available(backend: str) -> tuple[bool, str]:
    """Whether `backend` can run here, and why or why not."""
    if backend not in BACKENDS:
        return False, f"unknown; the backends are {', '.join(BACKENDS)}"
    if backend in _UNAVAILABLE:
        return False, _UNAVAILABLE[backend]
    if backend == "reference":
        return True, "the definition in plain PyTorch: any device, slow, keeps every intermediate for autograd"
    return True, "PyTorch calls with planned order and a gathering backward: any device"


def resolve(backend: str | None = None, plan: str | None = None) -> tuple[str, str]:
    """The backend to use and the reason.

    Args:
        backend: a name, or None or "auto" for the environment variable `FILA_KERNELS_BACKEND`, else the default.
        plan: a requested plan, which the backend has to offer.

    Raises:
        ValueError: for an unknown name. RuntimeError: if a backend or plan that was asked for by name cannot run.
    """
    if backend in (None, "auto"):
        named = os.environ.get(ENVIRONMENT_VARIABLE) or None
        source = f"set by {ENVIRONMENT_VARIABLE}"
        if named in (None, "auto"):
            named, source = "torch", f"default; {available('torch')[1]}"
    else:
        named, source = backend, "requested by the caller"
    if named not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)} or 'auto', got {named!r} ({source})")
    usable, reason = available(named)
    if not usable:
        raise RuntimeError(f"backend {named!r} ({source}) cannot run: {reason}")
    if plan == "single_pass":
        raise RuntimeError(
            f"plan 'single_pass' cannot run on backend {named!r}: it is one fused kernel, which only the 'triton' and "
            "'cuda' backends can offer and this version of them does not; use 'sample_first', 'project_first' or None"
        )
    return named, source


def backend_report() -> dict[str, dict[str, object]]:
    """For each backend whether it is available and why."""
    return {name: dict(zip(("available", "reason"), available(name), strict=True)) for name in BACKENDS}
